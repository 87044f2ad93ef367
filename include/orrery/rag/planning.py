"""How steps of a knowledge base are planned: each verb's inputs and params. Light."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from orrery import bundle, fingerprint, platform
from orrery.contract import Kind, Params, Result, Verb
from orrery.errors import RequestError, SpecError, nearest
from orrery.ledger import Ledger
from orrery.partitions import Grain
from orrery.planner import BasePlanner, Request
from orrery.rag import pointer
from orrery.rag.contract import OriginRef
from orrery.rag.spec import DocumentSource, KnowledgeBaseSpec
from orrery.spec import load_knowledge
from orrery.store import Manifest, Ref

Inputs = dict[str, tuple[Ref, ...]]
# What each pure verb reads of the spec: a change elsewhere in the project folder repeats nothing.
READS: dict[str, tuple[str, ...]] = {
    "chunk": ("chunk", "embedder"),
    "embed": ("embedder",),
    "index": ("embedder",),
    "evaluate": ("questions", "embedder", "retrieval", "answers"),
    "gate": ("questions", "gate"),
}
# What they make, or look at, on a server may have been changed behind their back: there they are never left out.
ON_A_SERVER = ("index", "evaluate")
# Of so many days, the last ones, the documents collected last are looked for.
NEWEST = 14
USE_QDRANT = (*ON_A_SERVER, "promote", "rollback")
QDRANT_KEY = "ORRERY_QDRANT_KEY"
LIVE = "live"  # an option of `evaluate`: look at the live generation instead of the one just made


class KnowledgePlanner(BasePlanner):
    """Makes plans for one knowledge base."""

    kind: ClassVar[Kind] = "knowledge_base"
    first_dag: ClassVar[str] = "reindex"

    def __init__(self, project: str, *, ledger: Ledger | None = None) -> None:
        super().__init__(project, ledger=ledger)
        self.spec: KnowledgeBaseSpec = load_knowledge(self.folder)

    @property
    def grain(self) -> Grain:
        """A generation is named by the day on which its sources were read."""
        return "day"

    def keys_of(self, model: Manifest) -> tuple[str, ...]:
        """Return the partitions that a generation is of."""
        return (model.key,)

    # -- what differs from a model's steps -----------------------------------------------------------

    def _within(self, request: Request, packed: bundle.Bundle) -> Request:
        if request.sample != 1:
            raise RequestError("a knowledge base is not tried on a sample", hint="leave --sample out")
        return request

    def _scope(self, request: Request) -> dict[str, Any]:
        """A day names a generation and chooses nothing: on one on which nothing changed, nothing is made."""
        return {}

    def _wholly(self) -> tuple[str, ...]:
        found = (origin for source in self.spec.sources.values() for origin in (source.uri, source.notion))
        return tuple(origin for origin in found if origin and inside(origin))

    def _depends(self, verb: Verb, packed: bundle.Bundle) -> str:
        reads = READS.get(verb.name)
        if reads is None:
            return packed.digest
        told: dict[str, Any] = self.spec.model_dump(mode="json", include=set(reads))
        if "questions" in reads and self.spec.questions:
            told["questions"] = fingerprint.digest(self._questions().decode("utf-8", "replace"))
        return fingerprint.digest(told)

    def _questions(self) -> bytes:
        file = self.folder / str(self.spec.questions)
        try:
            return file.read_bytes()
        except OSError as e:
            raise SpecError(f"{file}: {e.strerror}", hint="`questions` in spec.yaml names this file") from None

    def _address(self, verb: Verb, print_: dict[str, str], request: Request) -> str | None:
        if self.platform.qdrant is not None and verb.name in ON_A_SERVER:
            return None
        return super()._address(verb, print_, request)

    def _released(self, request: Request, inputs: Inputs) -> Result | None:
        """Return the end of a release with nothing to do; what services follow counts, not the ledger alone."""
        done = super()._released(request, inputs)
        if done is None or done.verdict == "kept":
            return done
        live, verdict = pointer.read(self.store, self.project), self.store.need(inputs["verdict"][0])
        same = live.get("generation") == inputs["candidate"][0].path
        proven = bool(live.get("proven"))
        # Evaluated anew, on other questions or settings, it is told anew; without questions what was proven stands.
        told = live.get("evaluation") == inputs["evaluation"][0].path and proven == bool(verdict.facts.get("proven"))
        return done if same and (told or (proven and not verdict.facts.get("proven"))) else None

    def _publishes(self, request: Request) -> bool:
        # A look at what is live must not become the evaluation of the candidate of that day.
        return super()._publishes(request) and not request.options.get(LIVE)

    def _compute(self, verb: Verb) -> str:
        return self.spec.embedder.compute if verb.name == "embed" else verb.compute

    def _secrets(self, verb: Verb) -> dict[str, str]:
        found = {"MLFLOW_TRACKING_URI": self.platform.mlflow} if verb.name == "evaluate" else {}
        # In a pod it comes from the cluster's Secret: here it would stand in the pod's document.
        if verb.name in USE_QDRANT and platform.profile() == "local" and os.environ.get(QDRANT_KEY):
            found[QDRANT_KEY] = os.environ[QDRANT_KEY]
        return found

    # -- inputs, verb by verb ------------------------------------------------------------------------

    def _inputs_chunk(self, request: Request) -> Inputs:
        return {"documents": (self._latest("documents", request.key, "collect").ref,)}

    def _inputs_embed(self, request: Request) -> Inputs:
        return {"chunks": (self._chunks(request.key).ref,)}

    def _chunks(self, key: str) -> Manifest:
        return self._fresh("chunks", key, "chunk", "documents")

    def _inputs_index(self, request: Request) -> Inputs:
        vectors = self._fresh("vectors", request.key, "embed", "chunks")
        return {"chunks": (self._chunks(request.key).ref,), "vectors": (vectors.ref,)}

    def _inputs_evaluate(self, request: Request) -> Inputs:
        """Return a generation with what it was made from, and the live one when that is another."""
        live = self._live()
        if request.options.get(LIVE):
            if live is None:
                raise RequestError(f"{self.project} has no live generation yet", hint=f"run {self.project}.reindex")
            generation, live = live, None
        else:
            generation = self._fresh("generation", request.key, "index", "vectors")
        chunks = generation.inputs["chunks"]
        inputs = {
            "generation": (generation.ref,),
            "chunks": chunks,
            "documents": self.store.need(chunks[0]).inputs["documents"],
        }
        if live is None or live.path == generation.path:
            return inputs
        promised = self._evaluation_of(live)  # counts where it cannot be asked any more
        return {**inputs, "live": (live.ref,), **({"promised": (promised.ref,)} if promised is not None else {})}

    def _live(self) -> Manifest | None:
        now = self.champion()
        return None if now is None else self.model_of(now)

    def _inputs_gate(self, request: Request) -> Inputs:
        return {"evaluation": (self._fresh("evaluation", request.key, "evaluate", "generation").ref,)}

    def _inputs_promote(self, request: Request) -> Inputs:
        verdict = self._latest("verdict", request.key, "gate")
        evaluation = self.store.need(verdict.inputs["evaluation"][0])
        candidate = evaluation.inputs["generation"]
        if verdict.result["verdict"] == "promote":
            self._refuse_another_rival(evaluation, candidate[0].path)
        return {"candidate": candidate, "evaluation": verdict.inputs["evaluation"], "verdict": (verdict.ref,)}

    def _refuse_another_rival(self, evaluation: Manifest, candidate: str) -> None:
        """Raise `RequestError` unless the candidate is live already, or was compared with what is live now."""
        now = self.champion()
        if now is None or now.model == candidate:
            return
        rival = evaluation.inputs.get("live", ())
        if not rival or rival[0].path != now.model:
            raise RequestError(
                f"the generation of {evaluation.key} was not compared with the live one (version {now.version})",
                hint="another has become live since: run evaluate and gate again",
            )

    def _inputs_rollback(self, request: Request) -> Inputs:
        now, chosen = self.champion(), request.options.get("previous")
        if now is None or now.version != chosen:
            raise RequestError(
                f"the live generation is {f'version {now.version}' if now else 'none'} now, not version {chosen}",
                hint=f"look again: orrery ledger {self.project}",
            )
        model = self.store.manifest(str(request.options["model"]))
        if model is None:
            raise RequestError(f"the generation of version {request.options.get('version')} is gone from the store")
        evaluation = self._evaluation_of(model)
        return {"model": (model.ref,), **({"evaluation": (evaluation.ref,)} if evaluation is not None else {})}

    def _evaluation_of(self, generation: Manifest) -> Manifest | None:
        """Return the evaluation that a generation went live on, by the ledger: services abstain by it."""
        promotions = self.ledger.find(self.project, "promotion", phase="done")
        mine = [e.payload for e in promotions if e.payload["model"] == generation.path]
        path = mine[-1].get("evidence", {}).get("evaluation") if mine else None
        return self.store.manifest(path) if path else None

    # -- params, verb by verb ------------------------------------------------------------------------

    def _params_of(self, verb: Verb, request: Request, inputs: Inputs) -> Params:
        if verb.name == "promote":
            return self._publish(request, inputs["candidate"][0].path)
        if verb.name == "rollback":
            return self._publish(request, inputs["model"][0].path)
        if verb.name == "evaluate":
            return self._evaluating(rival="live" in inputs)
        return super()._params_of(verb, request, inputs)

    def _publish(self, request: Request, model: str) -> Params:
        now = self.champion()
        told = {
            "version": self.version_of(model),
            "previous": now.version if now else None,
            "actor": request.actor,
            "reason": request.reason,
            "qdrant": self.platform.qdrant,
        }
        return self.verbs[request.verb].params.model_validate(told)

    def version_of(self, generation: str) -> str:
        """Return a generation's version: as it was live before, else the number after all that were."""
        versions = self.ledger.versions(self.project)
        known = [version for version, path in versions.items() if path == generation]
        return known[-1] if known else str(max(map(int, versions), default=0) + 1)

    def _params_collect(self, request: Request) -> Params:
        values = {"root": str(platform.home()), "data": self.platform.data}
        sources = {name: self._origin(name, source, values) for name, source in self.spec.sources.items()}
        told = {"sources": sources, "before": self._newest_documents(request.key), **request.options}
        return self.verbs["collect"].params.model_validate(told)

    def _newest_documents(self, key: str) -> str | None:
        """Return the manifest of the documents collected last, whatever their day is called: sources have none."""
        keys = self.store.keys(self.project, "documents")
        there = (self.store.latest(self.project, "documents", k) for k in dict.fromkeys([*keys[-NEWEST:], key]))
        last = max((p for p in there if p is not None), key=lambda p: p.created, default=None)
        return last.manifest if last is not None else None

    def _origin(self, name: str, source: DocumentSource, values: dict[str, str]) -> OriginRef:
        filled = {}
        for field in ("uri", "notion"):
            text = getattr(source, field)
            where = f"{self.folder / 'spec.yaml'}: sources.{name}.{field}"
            filled[field] = platform.substitute(text, values, where) if text else None
        return OriginRef(uri=filled["uri"], notion=filled["notion"], pages=source.pages, sitemap=source.sitemap)

    def _params_embed(self, request: Request) -> Params:
        on_gpu = platform.profile() == "kubernetes" and self.platform.compute_class(self.spec.embedder.compute).gpu
        return self.verbs["embed"].params.model_validate({"device": "cuda" if on_gpu else "cpu"})

    def _params_index(self, request: Request) -> Params:
        return self.verbs["index"].params.model_validate({"qdrant": self.platform.qdrant})

    def _evaluating(self, *, rival: bool) -> Params:
        named = {"judge": self.spec.judge, "llm": self.spec.llm}
        models = {field: self.endpoint(name, field) for field, name in named.items() if name is not None}
        proven = rival and bool(pointer.read(self.store, self.project).get("proven", True))
        told = {"qdrant": self.platform.qdrant, "live_is_proven": proven, **models}
        return self.verbs["evaluate"].params.model_validate(told)

    def endpoint(self, name: str, field: str) -> dict[str, Any]:
        """Return a language model of platform.yaml. Raises `SpecError` that lists what there is."""
        if name not in self.platform.llms:
            raise SpecError(
                f"{self.folder / 'spec.yaml'}: {field}: {name!r} is not among `llms` of platform.yaml",
                hint=nearest(name, self.platform.llms),
            )
        return self.platform.llms[name].model_dump(mode="json")


def inside(uri: str) -> bool:
    """Tell whether a source is a folder inside of the project folder: a relative path."""
    return "://" not in uri and not uri.startswith(("/", "~", "$"))
