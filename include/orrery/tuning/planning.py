"""What the planner knows of a search: its key, where its trials are committed, and whose parameters a training takes.

A study is named by everything that its trials share (code, project folder, environment, data, sample), so a search
that is run again finds its trials done, and another one shares nothing with it. Light.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orrery import platform
from orrery.contract import VERBS as ALL
from orrery.errors import RequestError, SpecError
from orrery.store import Manifest, Ref
from orrery.tuning.outcome import CHAMPION, TUNED

if TYPE_CHECKING:
    from orrery.bundle import Bundle
    from orrery.plan import Planner, Request
    from orrery.spec import Tune

Inputs = dict[str, tuple[Ref, ...]]
VERBS = ("trial", "tune")


def terms(planner: Planner) -> Tune:
    """Return how the spec wants the search. Raises `RequestError` when it wants none."""
    if planner.spec.tune is None:
        raise RequestError(
            f"{planner.project} is not tuned: its spec.yaml has no `tune`", hint="add `tune: {trials: 20, parallel: 2}`"
        )
    return planner.spec.tune


def within_search(planner: Planner, request: Request, packed: Bundle) -> Request:
    """Return a request for `trial` or `tune` with what it must know of its study."""
    tune, train = terms(planner), planner.spec.train
    options: dict[str, Any] = dict(request.options)
    if request.verb == "trial":
        number = options.get("number")
        if not isinstance(number, int) or not 0 <= number < tune.trials:
            raise RequestError(
                f"trial {number!r} is none of this search: they go from 0 to {tune.trials - 1}",
                hint="`tune` runs the whole search",
            )
    key, trials = _study(planner, request, packed)
    options |= {"study": key, "storage": storage(planner), "trials": trials}
    compute = tune.compute or train.compute if request.verb == "trial" else ALL[request.verb].compute
    return replace(request, options=options, compute=request.compute or compute)


def storage(planner: Planner) -> str:
    """Return where studies are kept. Raises `SpecError` for a folder that the trials' machines do not share."""
    where = planner.platform.tuning
    if "://" not in where or where.startswith("file://"):
        name = terms(planner).compute or planner.spec.train.compute
        rented = planner.platform.compute_class(name).sagemaker is not None
        if rented or platform.profile() == "kubernetes":
            machines = "SageMaker's machines" if rented else "pods"
            raise SpecError(
                f"the trials of a search share a study, and {machines} do not share {where}",
                hint="give ORRERY_TUNING (or `tuning` in platform.yaml) as postgresql://user:$NAME@host/database",
            )
    elif not where.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
        kind = where.partition("://")[0]
        raise SpecError(f"tuning is {kind}://…, where no study can be kept", hint="a folder, or postgresql://…")
    return where


def _study(planner: Planner, request: Request, packed: Bundle) -> tuple[str, tuple[str, ...]]:
    """Return the study's key and the address of each of its trials, by number."""
    from orrery.plan import address_of

    asked, verb = replace(request, verb="trial"), ALL["trial"]
    features = planner.features_of(request)
    shared = {"features": features}
    key = address_of(planner.fingerprint(verb, asked, packed, {}, shared), asked)

    def address(number: int) -> str:
        inputs = trial_inputs(planner, replace(asked, options={"number": number}), features)
        return address_of(planner.fingerprint(verb, asked, packed, {"number": number, "study": key}, inputs), asked)

    return key, tuple(address(number) for number in range(terms(planner).trials))


def trial_inputs(planner: Planner, request: Request, features: tuple[Ref, ...]) -> Inputs:
    """Return the window's features; for the second trial also the champion, whose parameters it tries."""
    inputs = {"features": features}
    champion = planner.champion() if request.options["number"] == CHAMPION else None
    if champion is not None:
        inputs["champion"] = (planner.model_of(champion).ref,)
    return inputs


def tune_inputs(planner: Planner, request: Request, features: tuple[Ref, ...]) -> Inputs:
    """Return the features and all trials by number. Raises `RequestError` when some are not there yet."""
    folder = f"{request.project}/trial"
    found = [planner.store.manifest(f"{folder}/{address}/manifest.json") for address in request.options["trials"]]
    missing = [str(number) for number, trial in enumerate(found) if trial is None]
    if missing:
        shown = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
        raise RequestError(
            f"{len(missing)} of the search's {len(found)} trials are not there for {request.key}: {shown}",
            hint=f"run {request.project}.tune (what is done is not done again), or: "
            f"orrery run {request.project} tune --window {request.key}",
        )
    return {"features": features, "trials": tuple(trial.ref for trial in found if trial is not None)}


def newest_tuned(planner: Planner, request: Request) -> Manifest | None:
    """Return the search whose parameters a training takes: the newest of this window's end or an earlier one.

    None where the spec tunes nothing, there has been no search yet, or the newest one has kept the defaults.
    """
    if planner.spec.tune is None:
        return None
    ends = {key: key.rpartition("..")[2] for key in planner.store.keys(request.project, "tuned")}
    ends = {key: end for key, end in ends.items() if end <= request.partitions[-1]}
    last = [planner.latest("tuned", key, "tune") for key, end in ends.items() if end == max(ends.values())]
    newest = max(last, key=lambda found: found.created, default=None)
    return newest if newest is not None and newest.result.get("verdict") == TUNED else None
