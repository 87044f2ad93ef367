"""From "run this verb on that partition" to the attempt's config: inputs resolved, fingerprint taken, or skipped.

Runs in the orchestrator (or the command line) before any process or pod is asked for, so it is light: it
reads small JSON documents of the store and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orrery import approvals, attempts, bundle, fingerprint, partitions, platform
from orrery.contract import LOOK_BACK, VERBS, Params, Result, SourceRef, StepConfig, Verb, refuse_uneven
from orrery.errors import RequestError, nearest
from orrery.ledger import Champion, Ledger
from orrery.spec import ModelSpec, Source, load_model, seconds
from orrery.store import Manifest, Ref, Store
from orrery.tuning import planning

# Verbs that save their state when they are told to stop, and what their ends take beside the saving.
SAVES = frozenset({"train", "trial"})
AFTER_SAVING_S = 3.0
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

    @property
    def key(self) -> str:
        """The partition, or the window's text."""
        scope = VERBS[self.verb].scope
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


class Planner:
    """Makes plans for one project, on one platform."""

    def __init__(self, project: str, *, ledger: Ledger | None = None) -> None:
        self.folder: Path = platform.project_folder(project)
        self.project = project
        self.spec: ModelSpec = load_model(self.folder)
        self.platform = platform.load()
        self.store = Store(self.platform.store)
        self._ledger = ledger

    @property
    def ledger(self) -> Ledger:
        """The ledger, opened when first needed."""
        if self._ledger is None:
            self._ledger = Ledger(self.platform.ledger)
        return self._ledger

    def partitions_of(self, partition: str | None, window: str | None) -> tuple[str, ...]:
        """Return the keys that a request names, checked. Raises `RequestError` when it names none, or both."""
        if bool(partition) == bool(window):
            given = "both" if partition else "neither"
            raise RequestError(f"give a partition or a window, not {given}", hint="nothing chooses data by the clock")
        if partition:
            partitions.parse(partition, self.spec.grain)
            return (partition,)
        return partitions.window(str(window), self.spec.grain)

    def plan(self, request: Request) -> Plan:
        """Resolve inputs, take the fingerprint, and find out whether the work is done already."""
        verb = VERBS.get(request.verb)
        if verb is None:
            raise RequestError(f"unknown step {request.verb!r}", hint=nearest(request.verb, VERBS))
        if not request.partitions:
            raise RequestError(f"{verb.name} was asked for without a partition or window")
        for key in request.partitions:
            partitions.parse(key, self.spec.grain)
        if verb.scope == "partition" and len(request.partitions) != 1:
            raise RequestError(f"{verb.name} works on one partition, was asked for {len(request.partitions)}")
        if verb.effect and request.sample != 1:
            raise RequestError(f"{verb.name} cannot be tried on a sample", hint="it acts on the registry: leave it out")
        packed = bundle.pack(self.folder)
        if verb.name in planning.VERBS:
            request = planning.within_search(self, request, packed)
        inputs = getattr(self, f"_inputs_{verb.name}", self._no_inputs)(request)
        params = self._params(verb, request, inputs)
        self._refuse_pods(verb, request, params)
        values = params.model_dump(mode="json")
        print_ = {} if verb.effect else self.fingerprint(verb, request, packed, values, inputs)
        address = None if verb.effect or verb.observes else address_of(print_, request)
        run = safe_name(request.run)
        config = StepConfig(
            project=request.project,
            verb=verb.name,
            key=request.key,
            partitions=request.partitions,
            sample=request.sample,
            publish=request.sample == 1,
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
        done = self._released(request, inputs) if verb.name in ("register", "promote") else self._done(config, verb)
        outlive = outlives(verb.name, self.spec)
        return Plan(config, verb, self._secrets(verb), done, packed, self.compute_of(request), outlive)

    def compute_of(self, request: Request) -> str:
        """Return the compute class that a request runs on."""
        verb = VERBS[request.verb]
        return request.compute or (self.spec.train.compute if verb.name == "train" else verb.compute)

    def _refuse_pods(self, verb: Verb, request: Request, params: Params) -> None:
        """Raise `RequestError` for a compute class of several pods that the step cannot be spread over."""
        name = self.compute_of(request)
        compute = self.platform.compute.get(name)
        if compute is None or compute.pods == 1:
            return
        if not verb.spreads:
            raise RequestError(
                f"{verb.name} works in one pod, and compute class {name!r} has pods: {compute.pods}",
                hint=f"only {', '.join(v.name for v in VERBS.values() if v.spreads)} can be spread over several",
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
        config |= {"key": request.key, "partitions": list(request.partitions), "sample": request.sample}
        # The project's name is no part: a copied project has the same outputs. The store keeps them apart.
        return {
            "verb": verb.name,
            "code": fingerprint.code(verb.module),
            "project": packed.digest,
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

    # -- inputs, verb by verb ----------------------------------------------------------------------

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

    def _inputs_validate(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        return {"raw": (self._latest("raw", request.key, "ingest").ref,)}

    def _inputs_materialize(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        return self._clean_and_history(request.key)

    def _clean_and_history(self, partition: str) -> dict[str, tuple[Ref, ...]]:
        """Return the partition itself and the earlier ones that feed its views, as far as they are there."""
        clean = self._fresh("clean", partition, "validate", "raw")
        earlier = []
        for back in range(self.spec.features.history, 0, -1):
            key = partitions.shift(partition, self.spec.grain, -back)
            found = self.store.latest_manifest(self.project, "clean", key)
            if found is not None:
                earlier.append(found.ref)
        return {"clean": (clean.ref,), "history": tuple(earlier)}

    def _fresh(self, dataset: str, key: str, maker: str, source: str) -> Manifest:
        """Return a partition whose own input has not been superseded since. Raises `RequestError` when it has."""
        found = self._latest(dataset, key, maker)
        now = self.store.latest(self.project, source, key)
        used = found.inputs.get(source, ())
        if now is not None and used and used[0].digest != now.digest:
            raise RequestError(
                f"{dataset} of {key} was made from {source} data that landed again at {now.created}",
                hint=f"run {self.project}.ingest for {key}",
            )
        return found

    def _inputs_train(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        inputs = {"features": self.features_of(request)}
        tuned = planning.newest_tuned(self, request)
        return inputs if tuned is None else {**inputs, "tuned": (tuned.ref,)}

    def _inputs_trial(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        return planning.trial_inputs(self, request, self.features_of(request))

    def _inputs_tune(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        return planning.tune_inputs(self, request, self.features_of(request))

    def features_of(self, request: Request) -> tuple[Ref, ...]:
        """Return the features of a request's partitions. Raises `RequestError` when one is missing or stale."""
        return tuple(self._fresh_features(key) for key in request.partitions)

    def _fresh_features(self, key: str) -> Ref:
        """Return a partition's features. Raises `RequestError` when they, or what they were made from, are stale."""
        found = self._fresh("features", key, "materialize", "clean")
        now = self._clean_and_history(key)["history"]
        if [r.digest for r in found.inputs.get("history", ())] != [r.digest for r in now]:
            raise RequestError(
                f"features of {key} look back at data that have landed (again) since", hint=f"run materialize for {key}"
            )
        for earlier in now:
            self._fresh("clean", earlier.key, "validate", "raw")
        return found.ref

    def _inputs_evaluate(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        candidate = self._latest("candidate", request.key, "train")
        inputs = {"features": candidate.inputs["features"], "candidate": (candidate.ref,)}
        champion = self.champion()
        if champion is not None:
            inputs["champion"] = (self._model_of(champion).ref,)
        return inputs

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

    def _inputs_gate(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        return {"evaluation": (self._latest("evaluation", request.key, "evaluate").ref,)}

    def _inputs_register(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        verdict = self._latest("verdict", request.key, "gate")
        evaluation = self.store.need(verdict.inputs["evaluation"][0])
        if self.spec.approval is not None and verdict.result["verdict"] == "promote":
            now = self.champion()
            if now is None or now.model != evaluation.inputs["candidate"][0].path:
                approvals.require(self.ledger, self.project, request.key, verdict.path)
        return {
            "candidate": evaluation.inputs["candidate"],
            "evaluation": verdict.inputs["evaluation"],
            "verdict": (verdict.ref,),
        }

    def _inputs_promote(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        inputs = self._inputs_register(request)
        verdict = self.store.need(inputs["verdict"][0])
        if verdict.result["verdict"] == "promote" and "version" in request.options:
            self._check_promotion(request, inputs)
        return inputs

    def _check_promotion(self, request: Request, inputs: dict[str, tuple[Ref, ...]]) -> None:
        """Raise `RequestError` unless the version is this candidate, compared with the champion of now."""
        candidate, version = inputs["candidate"][0].path, str(request.options.get("version"))
        versions = self.ledger.registered(self.project)
        if versions.get(version) != candidate:
            mine = [v for v, model in versions.items() if model == candidate]
            known = f"its version is {mine[-1]}" if mine else "it is not registered yet: run register"
            raise RequestError(f"version {version!r} is not the candidate of {request.key}", hint=known)
        now = self.champion()
        if now is not None and now.model == candidate:
            return  # it is the champion already
        compared = self.store.need(inputs["evaluation"][0]).inputs.get("champion", ())
        with_whom = compared[0].path if compared else None
        if with_whom != (now.model if now else None):
            raise RequestError(
                f"the candidate of {request.key} was not compared with the present champion "
                f"({f'version {now.version}' if now else 'none'})",
                hint="the champion has changed since: run evaluate and gate again",
            )

    def _inputs_rollback(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        """Return the model, and the newest features: it must be able to score what comes next, not what it knew."""
        now, chosen = self.champion(), request.options.get("previous")
        if now is None or now.version != chosen:
            raise RequestError(
                f"the champion is {f'version {now.version}' if now else 'none'} now, not version {chosen}",
                hint=f"look again: orrery ledger {self.project}",
            )
        model = self.store.manifest(str(request.options["model"]))
        if model is None:
            raise RequestError(f"the model of version {request.options.get('version')} is gone from the store")
        keys = self.store.keys(self.project, "features")
        newest = self._latest("features", keys[-1], "materialize").ref if keys else model.inputs["features"][-1]
        return {"model": (model.ref,), "features": (newest,)}

    def _inputs_score(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        champion = self.champion()
        if champion is None:
            raise RequestError(
                f"{self.project} has no champion yet",
                hint=f"run {self.project}.train; why a candidate was refused: orrery ledger {self.project}",
            )
        return {"features": (self._fresh_features(request.key),), "model": (self._model_of(champion).ref,)}

    def _inputs_report(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        """Return the scores, the very features and model that they were made from, and what that was trained on."""
        scores = self._latest("scores", request.key, "score")
        model = self.store.need(scores.inputs["model"][0])
        return {
            "scores": (scores.ref,),
            "features": scores.inputs["features"],
            "model": (model.ref,),
            "training": model.inputs["features"],
        }

    def _inputs_monitor(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        """Return scores and labels, the model that scored with the evaluation it was promoted on, and what came before.

        Raises `RequestError` when one is not there: the hint says which step makes it.
        """
        scores = self._latest("scores", request.key, "score")
        model = self.store.need(scores.inputs["model"][0])
        earlier = (partitions.shift(request.key, self.spec.grain, -back) for back in range(LOOK_BACK, 0, -1))
        found = [self.store.latest_manifest(self.project, "health", key) for key in earlier]
        return {
            "scores": (scores.ref,),
            "features": (self._fresh_features(request.key),),
            "model": (model.ref,),
            "evaluation": (self._promise_of(model).ref,),
            "clean": (self._fresh("clean", request.key, "validate", "raw").ref,),
            "history": tuple(health.ref for health in found if health is not None),
        }

    def _promise_of(self, model: Manifest) -> Manifest:
        """Return the evaluation that a model was promoted on, by the ledger: its own promise, and no other's."""
        promotions = self.ledger.find(self.project, "promotion", phase="done")
        mine = [e.payload for e in promotions if e.payload["model"] == model.path]
        paths = [payload.get("evidence", {}).get("evaluation") for payload in mine]
        found = self.store.manifest(paths[-1]) if paths and paths[-1] else None
        if found is None:
            lost = f"{self.store.uri}/{paths[-1]} is gone" if paths and paths[-1] else "the ledger knows of none"
            raise RequestError(
                f"the model that scored was promoted on an evaluation that cannot be found: {lost}",
                hint=f"restore it; or train and promote again, then score again: orrery ledger {self.project}",
            )
        return found

    def champion(self) -> Champion | None:
        """Return the model version in use, by the ledger."""
        return self.ledger.champion(self.project)

    # -- params, verb by verb ----------------------------------------------------------------------

    def _params(self, verb: Verb, request: Request, inputs: dict[str, tuple[Ref, ...]]) -> Params:
        try:
            if verb.name == "score":
                return self._params_score(inputs["model"][0])
            params: Params = getattr(self, f"_params_{verb.name}", self._no_params)(request)
        except ValidationError as e:
            first = e.errors()[0]
            allowed = nearest(str(first["loc"][-1]), verb.params.model_fields)
            raise RequestError(
                f"{verb.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint=allowed
            ) from None
        return params

    def _no_params(self, request: Request) -> Params:
        return VERBS[request.verb].params.model_validate(dict(request.options))

    def _params_ingest(self, request: Request) -> Params:
        values = {"root": str(platform.home()), "data": self.platform.data}
        sources = {name: self._source(name, source, request.key, values) for name, source in self.spec.sources.items()}
        return VERBS["ingest"].params.model_validate({"sources": sources})

    def _source(self, name: str, source: Source, key: str, values: dict[str, str]) -> SourceRef:
        if source.table is not None:
            return SourceRef(
                table=source.table, time_column=source.time_column, secret_env=f"ORRERY_SOURCE_{name.upper()}"
            )
        assert source.uri is not None
        uri = platform.substitute(source.uri, values, f"{self.folder / 'spec.yaml'}: sources.{name}.uri")
        return SourceRef(uri=uri.replace("{partition}", key), format=source.format)

    def _params_materialize(self, request: Request) -> Params:
        feast = self.platform.feast
        options = {"feast_registry": feast.registry, "feast_online": feast.online, **request.options}
        return VERBS["materialize"].params.model_validate(options)

    def _params_train(self, request: Request) -> Params:
        train = self.spec.train
        values = {"processes": train.processes, "seed": train.seed, "overrides": train.params}
        values |= attempts.observed(self.ledger, self.project, train.compute)
        values |= dict(request.options)
        return VERBS["train"].params.model_validate(values)

    def _params_register(self, request: Request) -> Params:
        return VERBS["register"].params.model_validate({"actor": request.actor, "reason": request.reason})

    def _params_promote(self, request: Request) -> Params:
        now = self.champion()
        values = {**request.options, "previous": now.version if now else None}
        values.pop("model", None)  # rollback's, which is an input
        return VERBS[request.verb].params.model_validate({**values, "actor": request.actor, "reason": request.reason})

    _params_rollback = _params_promote

    def _params_score(self, model: Ref) -> Params:
        """The version is that of the very model that was taken: a promotion may have come since."""
        spark = self.platform.spark
        version = [v for v, path in self.ledger.versions(self.project).items() if path == model.path][-1]
        values = {"model_version": version, "spark_master": spark.master, "spark_conf": dict(spark.conf)}
        return VERBS["score"].params.model_validate(values)

    def _secrets(self, verb: Verb) -> dict[str, str]:
        """Return the environment variables a step needs beyond its config; addresses may hold credentials."""
        if verb.name not in ("train", "trial", "tune", "register", "promote", "rollback"):
            return {}
        found = {"MLFLOW_TRACKING_URI": self.platform.mlflow}
        if self.platform.wandb is not None and verb.name in ("train", "trial"):
            found["ORRERY_WANDB"] = self.platform.wandb.model_dump_json()
        return found


def outlives(verb: str, spec: ModelSpec) -> float:
    """Return how many seconds a step may need to save its state when it is told to stop."""
    return seconds(spec.train.checkpoint.within) + AFTER_SAVING_S if verb in SAVES else 0.0


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
