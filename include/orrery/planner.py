"""From "run this verb on that partition" to the attempt's config: inputs resolved, fingerprint taken, or skipped.

Runs in the orchestrator (or the command line) before any process or pod is asked for, so it is light: it
reads small JSON documents of the store and nothing else. What a kind of project adds is in `plan` (models) and in
`rag.planning` (knowledge bases).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from orrery import bundle, fingerprint, partitions, platform
from orrery.budgets import Budgets
from orrery.catalogue import CATALOGUE, verb
from orrery.contract import Kind, Params, Result, StepConfig, Verb, refuse_uneven
from orrery.errors import RequestError, nearest
from orrery.fields import seconds
from orrery.ledger import Champion, Ledger
from orrery.partitions import Grain
from orrery.store import Manifest, Ref, Store

LEAST_GRACE_S = 30  # Kubernetes' own; a light step ends within it
ENDING_S = 3  # from the end of a save to the end of the process


@dataclass(frozen=True)
class Request:
    """What is asked for: one verb of one project, on a partition or a window, by somebody, for a reason."""

    project: str
    verb: str
    partitions: tuple[str, ...]
    run: str
    task: str
    attempt: int = 1
    sample: float = 1.0
    actor: str = "unknown"
    reason: str = ""
    force: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    compute: str = ""  # class of platform.yaml; none: the verb's
    placed: str = ""  # why it is another class than the spec's
    queued_s: float = 0.0  # how long the attempt has waited to be started
    cleared: tuple[str, ...] = ()  # the run's names before it was cleared, which attempts may have been lost under
    kind: Kind = "model"

    @property
    def key(self) -> str:
        """The partition, or the window's text."""
        scope = CATALOGUE[self.kind][self.verb].scope
        return self.partitions[0] if scope == "partition" else partitions.window_name(self.partitions)


@dataclass(frozen=True)
class Plan:
    """A request made exact. `done` is set when there is nothing to do; `packed` is pushed when the step is prepared.

    `compute` is the class that the step is to run on; `outlive` the seconds after SIGTERM in which it saves its state.
    """

    config: StepConfig
    verb: Verb
    environment: dict[str, str]
    done: Result | None = None
    packed: bundle.Bundle | None = None
    compute: str = ""
    outlive: float = 0.0
    # What the launcher tells of the attempt, for the ledger: beside the fields of `attempts.Attempt`.
    told: dict[str, Any] = field(default_factory=dict)


class BasePlanner(ABC):
    """Makes plans for one project, of whatever kind, on one platform."""

    kind: ClassVar[Kind]
    first_dag: ClassVar[str]  # the verb of the Dag that begins the loop

    def __init__(self, project: str, *, ledger: Ledger | None = None) -> None:
        self.folder: Path = platform.project_folder(project)
        self.project = project
        self.platform = platform.load()
        self.store = Store(self.platform.store)
        self._ledger = ledger

    @property
    def ledger(self) -> Ledger:
        """The ledger, opened when first needed."""
        if self._ledger is None:
            self._ledger = Ledger(self.platform.ledger)
        return self._ledger

    @property
    @abstractmethod
    def grain(self) -> Grain:
        """The size of a partition."""

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """The steps that a project of this kind has."""
        return CATALOGUE[self.kind]

    def partitions_of(self, partition: str | None, window: str | None) -> tuple[str, ...]:
        """Return the keys that a request names, checked. Raises `RequestError` when it names none, or both."""
        if bool(partition) == bool(window):
            given = "both" if partition else "neither"
            raise RequestError(f"give a partition or a window, not {given}", hint="nothing chooses data by the clock")
        if partition:
            partitions.parse(partition, self.grain)
            return (partition,)
        return partitions.window(str(window), self.grain)

    def plan(self, request: Request) -> Plan:
        """Resolve inputs, take the fingerprint, and find out whether the work is done already."""
        asked = verb(self.kind, request.verb)
        if not request.partitions:
            raise RequestError(f"{asked.name} was asked for without a partition or window")
        for key in request.partitions:
            partitions.parse(key, self.grain)
        if asked.scope == "partition" and len(request.partitions) != 1:
            raise RequestError(f"{asked.name} works on one partition, was asked for {len(request.partitions)}")
        if asked.effect and request.sample != 1:
            raise RequestError(
                f"{asked.name} cannot be tried on a sample", hint="it acts on the registry: leave it out"
            )
        packed = bundle.pack(self.folder, self._wholly())
        request = self._within(request, packed)
        inputs = getattr(self, f"_inputs_{asked.name}", self._no_inputs)(request)
        params = self._params(asked, request, inputs)
        self._refuse_pods(asked, request, params)
        values = params.model_dump(mode="json")
        print_ = {} if asked.effect else self.fingerprint(asked, request, packed, values, inputs)
        address = None if asked.effect or asked.observes else self._address(asked, print_, request)
        run = safe_name(request.run)
        config = StepConfig(
            project=request.project,
            kind=self.kind,
            verb=asked.name,
            key=request.key,
            partitions=request.partitions,
            sample=request.sample,
            publish=self._publishes(request),
            params=values,
            inputs=inputs,
            store=self.store.uri,
            bundle=packed.digest,
            address=address,
            fingerprint=print_,
            run=run,
            task=request.task,
            attempt=request.attempt,
            folder=attempt_folder(request),
            requested=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        done = self._released(request, inputs) if asked.name in ("register", "promote") else self._done(config, asked)
        return Plan(
            config, asked, self._secrets(asked), done, packed, self.compute_of(request), self.outlives(asked.name)
        )

    def compute_of(self, request: Request) -> str:
        """Return the compute class that a request runs on."""
        return request.compute or self._compute(self.verbs[request.verb])

    def _refuse_pods(self, verb: Verb, request: Request, params: Params) -> None:
        """Raise `RequestError` for a compute class of several pods that the step cannot be spread over."""
        name = self.compute_of(request)
        compute = self.platform.compute.get(name)
        if compute is None or compute.pods == 1:
            return
        if not verb.spreads:
            raise RequestError(
                f"{verb.name} works in one pod, and compute class {name!r} has pods: {compute.pods}",
                hint=f"only {', '.join(v.name for v in self.verbs.values() if v.spreads)} can be spread over several",
            )
        refuse_uneven(getattr(params, "processes", 1), compute.pods, name)

    def _released(self, request: Request, inputs: dict[str, tuple[Ref, ...]]) -> Result | None:
        """Return the end of a release with nothing (more) to do: refused, or promoted already."""
        kept = self._kept(inputs)
        if kept is not None or request.verb != "promote":
            return kept
        now = self.champion()
        if now is not None and now.model == inputs["candidate"][0].path:
            return Result(skipped=f"version {now.version} is the champion since {now.since}")
        return None

    def _kept(self, inputs: dict[str, tuple[Ref, ...]]) -> Result | None:
        """Return the end of a release that the gate refused: nothing to register or promote, and a green run."""
        verdict = self.store.need(inputs["verdict"][0])
        if verdict.result["verdict"] == "promote":
            return None
        why = "the gate kept the champion" if self.champion() else "the gate refused the candidate"
        return Result(verdict="kept", skipped=why, reasons=list(verdict.result["reasons"]))

    def fingerprint(
        self,
        verb: Verb,
        request: Request,
        packed: bundle.Bundle,
        values: dict[str, Any],
        inputs: dict[str, tuple[Ref, ...]],
    ) -> dict[str, str]:
        """Return what a step's output depends on, part by part."""
        config = {k: v for k, v in values.items() if k not in verb.hints}
        config |= self._scope(request)
        # The project's name is no part: a copied project has the same outputs. The store keeps them apart.
        return {
            "verb": verb.name,
            "code": fingerprint.code(verb.module),
            "project": self._depends(verb, packed),
            "environment": fingerprint.pins(platform.home(), verb.environment),
            "config": fingerprint.digest(config),
            "inputs": fingerprint.digest(
                {n: [[r.key, r.path if verb.by_address else r.digest] for r in refs] for n, refs in inputs.items()}
            ),
        }

    def _done(self, config: StepConfig, verb: Verb) -> Result | None:
        """Return the committed result for this fingerprint, when its files are all there."""
        if not config.address:
            return None
        found = self.store.manifest(f"{config.project}/{verb.name}/{config.address}/manifest.json")
        if found is None or self.store.missing_files(found):
            return None
        if verb.dataset and config.publish:
            now = self.store.latest(config.project, verb.dataset, config.key)
            if now is None or now.manifest != found.path:
                return None  # committed, but not what counts: the step publishes it
        result = Result.model_validate(found.result)
        result.output, result.digest = found.path, found.digest
        result.skipped = f"unchanged since {found.created}: same code, project, environment, config and inputs"
        return result

    def _no_inputs(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        return {}

    def _latest(self, dataset: str, key: str, maker: str) -> Manifest:
        found = self.store.latest_manifest(self.project, dataset, key)
        if found is None:
            there = self.store.keys(self.project, dataset)
            have = f"there is {there[0]} to {there[-1]} ({len(there)})" if there else "there is none yet"
            raise RequestError(
                f"{self.project} has no {dataset} for {key}; {have}", hint=f"run {maker} for {key} first"
            )
        return found

    def _fresh(self, dataset: str, key: str, maker: str, source: str) -> Manifest:
        """Return a partition whose own input has not been superseded since. Raises `RequestError` when it has."""
        found = self._latest(dataset, key, maker)
        now = self.store.latest(self.project, source, key)
        used = found.inputs.get(source, ())
        if now is not None and used and used[0].digest != now.digest:
            raise RequestError(
                f"{dataset} of {key} was made from {source} data that landed again at {now.created}",
                hint=f"run {self.project}.{self.first_dag} for {key}",
            )
        return found

    def latest(self, dataset: str, key: str, maker: str) -> Manifest:
        """Return what counts as a dataset's `key`. Raises `RequestError` that names what there is, and the step."""
        return self._latest(dataset, key, maker)

    def model_of(self, champion: Champion) -> Manifest:
        """Return the training of a champion. Raises `RequestError` when it is gone."""
        return self._model_of(champion)

    def _model_of(self, champion: Champion) -> Manifest:
        model = self.store.manifest(champion.model)
        if model is None:
            raise RequestError(
                f"the model of champion version {champion.version} ({champion.model}) is gone from {self.store.uri}",
                hint=f"restore it, or: orrery rollback {self.project}",
            )
        return model

    def champion(self) -> Champion | None:
        """Return the model version in use, by the ledger."""
        return self.ledger.champion(self.project)

    def _params(self, verb: Verb, request: Request, inputs: dict[str, tuple[Ref, ...]]) -> Params:
        try:
            params = self._params_of(verb, request, inputs)
        except ValidationError as e:
            first = e.errors()[0]
            allowed = nearest(str(first["loc"][-1]), verb.params.model_fields)
            raise RequestError(
                f"{verb.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint=allowed
            ) from None
        return params

    def _no_params(self, request: Request) -> Params:
        return self.verbs[request.verb].params.model_validate(dict(request.options))

    # -- what a kind of project says for itself ------------------------------------------------------

    def outlives(self, name: str) -> float:
        """Return how many seconds a step may need to save its state when it is told to stop."""
        return 0.0

    def _publishes(self, request: Request) -> bool:
        """Tell whether the output becomes its dataset's partition."""
        return request.sample == 1

    def _scope(self, request: Request) -> dict[str, Any]:
        """Return what of the request shapes an output: the partitions that were asked for, and how much of them."""
        return {"key": request.key, "partitions": list(request.partitions), "sample": request.sample}

    def budgets(self, name: str) -> Budgets:
        """Return how often a step may fail, by cause."""
        return Budgets()

    def _within(self, request: Request, packed: bundle.Bundle) -> Request:
        """Return the request with what it must know of a larger undertaking that it belongs to."""
        return request

    def _wholly(self) -> tuple[str, ...]:
        """Return the folders of the project that travel with all their files, documents for people too."""
        return ()

    def _depends(self, verb: Verb, packed: bundle.Bundle) -> str:
        """Return a digest of what a step's output depends on in the project folder."""
        return packed.digest

    @abstractmethod
    def keys_of(self, model: Manifest) -> tuple[str, ...]:
        """Return the partitions that a champion was made from."""

    def _address(self, verb: Verb, print_: dict[str, str], request: Request) -> str | None:
        """Return where a pure step's output is committed; none: the step says so itself (`Work.at`)."""
        return address_of(print_, request)

    def _compute(self, verb: Verb) -> str:
        """Return the compute class of a verb."""
        return verb.compute

    def _params_of(self, verb: Verb, request: Request, inputs: dict[str, tuple[Ref, ...]]) -> Params:
        params: Params = getattr(self, f"_params_{verb.name}", self._no_params)(request)
        return params

    def _secrets(self, verb: Verb) -> dict[str, str]:
        """Return the environment variables a step needs beyond its config; addresses may hold credentials."""
        return {}


def grace(compute: platform.Compute, outlive: float) -> int:
    """Return the seconds from SIGTERM to SIGKILL: the compute class's, or what the step needs to save (`outlives`)."""
    if compute.grace is not None:
        return seconds(compute.grace)
    return max(LEAST_GRACE_S, math.ceil(outlive) + ENDING_S if outlive else 0)


def attempt_folder(request: Request, run: str | None = None) -> str:
    """Return the folder in the store of a request's attempt (`run`: as it was called under another name of the run)."""
    slot = safe_name(f"{request.task}-{request.key}")
    return f"{request.project}/runs/{safe_name(run or request.run)}/{slot}/{request.attempt}"


def address_of(fingerprint_: Mapping[str, str], request: Request) -> str:
    """Return where an output with this fingerprint is committed.

    A forced run is a new output on purpose: it must not collide with what is committed.
    """
    forced = {"forced": request.run} if request.force else {}
    return fingerprint.digest({**fingerprint_, **forced})[:32]


def safe_name(text: str) -> str:
    """Return `text` as one segment of a store path, at most 120 characters; a safe name stays as it is.

    What is not plain becomes `_`, what is too long is cut; a digest then keeps two names apart.
    """
    plain = re.sub(r"[^A-Za-z0-9_.=+-]", "_", text, flags=re.ASCII).lstrip(".-=+")[:120] or "_"
    return plain if plain == text else f"{plain[:111]}-{fingerprint.digest(text)[:8]}"
