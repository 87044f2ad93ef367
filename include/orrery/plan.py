"""How steps of a model are planned: each verb's inputs and params. What all kinds share is in `planner`."""

from __future__ import annotations

from typing import ClassVar

from orrery import approvals, attempts, budgets, bundle, partitions, platform
from orrery.budgets import Budgets
from orrery.contract import LOOK_BACK, VERBS, Kind, Params, SourceRef, Verb
from orrery.errors import RequestError
from orrery.ledger import Ledger
from orrery.partitions import Grain
from orrery.planner import BasePlanner, Plan, Request, address_of, attempt_folder, grace, safe_name
from orrery.spec import ModelSpec, Source, load_model, seconds
from orrery.store import Manifest, Ref
from orrery.tuning import planning

__all__ = ["Plan", "Planner", "Request", "address_of", "attempt_folder", "grace", "outlives", "safe_name"]

# Verbs that save their state when they are told to stop, and what their ends take beside the saving.
SAVES = frozenset({"train", "trial"})
AFTER_SAVING_S = 3.0


class Planner(BasePlanner):
    """Makes plans for one model."""

    kind: ClassVar[Kind] = "model"
    first_dag: ClassVar[str] = "ingest"

    def __init__(self, project: str, *, ledger: Ledger | None = None) -> None:
        super().__init__(project, ledger=ledger)
        self.spec: ModelSpec = load_model(self.folder)

    @property
    def grain(self) -> Grain:
        """The partition size that the sources share."""
        return self.spec.grain

    def keys_of(self, model: Manifest) -> tuple[str, ...]:
        """Return the partitions that a model was trained on."""
        return tuple(ref.key for ref in model.inputs["features"])

    def outlives(self, name: str) -> float:
        """Return how many seconds a step may need to save its state when it is told to stop."""
        return outlives(name, self.spec)

    def budgets(self, name: str) -> Budgets:
        """Return how often a step may fail, by cause."""
        return budgets.of(name, self.spec)

    def _within(self, request: Request, packed: bundle.Bundle) -> Request:
        return planning.within_search(self, request, packed) if request.verb in planning.VERBS else request

    def _compute(self, verb: Verb) -> str:
        return self.spec.train.compute if verb.name == "train" else verb.compute

    def _params_of(self, verb: Verb, request: Request, inputs: dict[str, tuple[Ref, ...]]) -> Params:
        if verb.name == "score":
            return self._params_score(inputs["model"][0])
        return super()._params_of(verb, request, inputs)

    # -- inputs, verb by verb ----------------------------------------------------------------------

    def _inputs_validate(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        return {"raw": (self._latest("raw", request.key, "ingest").ref,)}

    def _inputs_materialize(self, request: Request) -> dict[str, tuple[Ref, ...]]:
        return self._clean_and_history(request.key)

    def _clean_and_history(self, partition: str) -> dict[str, tuple[Ref, ...]]:
        """Return the partition itself and the earlier ones that feed its views, as far as they are there."""
        clean = self._fresh("clean", partition, "validate", "raw")
        earlier = []
        for back in range(self.spec.features.history, 0, -1):
            key = partitions.shift(partition, self.grain, -back)
            found = self.store.latest_manifest(self.project, "clean", key)
            if found is not None:
                earlier.append(found.ref)
        return {"clean": (clean.ref,), "history": tuple(earlier)}

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
        earlier = (partitions.shift(request.key, self.grain, -back) for back in range(LOOK_BACK, 0, -1))
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

    # -- params, verb by verb ----------------------------------------------------------------------

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
