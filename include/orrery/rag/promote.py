"""`promote`: a generation that the gate let through is opened once more, and then it is the live one.

A desired state: run twice, or killed in between, it ends the same. Services follow `<project>/live.json`, which is put
whole; on a Qdrant server the alias `<project>` follows it, for whoever asks the server directly. The ledger is written
by the orchestrator.

An unproven generation does not take a proven one's place: the gate has said so of what it saw, and this is the moment
that counts. On a server, generations that were live before the last `BEFORE` are removed (`retention`).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from orrery.contract import Result
from orrery.errors import UserError
from orrery.rag import pointer as pointing
from orrery.rag.contract import PublishParams
from orrery.rag.engines import Engine
from orrery.rag.generations import POINTS, facts_of, open_generation, verified
from orrery.rag.retention import retire
from orrery.rag.retrieval import retrieve
from orrery.step import Work
from orrery.store import Manifest

PROBE = "Is anybody there?"
# How many generations that were live before the present one a rollback finds on a server.
BEFORE = 3


def run(work: Work, params: PublishParams) -> Result:
    """Make a generation the live one. Raises `UserError` when it is not what was evaluated."""
    generation, evaluation = work.input("candidate"), work.input("evaluation")
    if evaluation.inputs["generation"][0].path != generation.path:
        raise UserError(f"{evaluation.path} is of another generation than {generation.path}", hint="run evaluate again")
    verdict = work.input("verdict")
    if verdict.result["verdict"] != "promote" or verdict.inputs["evaluation"][0].path != evaluation.path:
        raise UserError(f"{verdict.path} does not say that {generation.path} may go live", hint="run gate again")
    now, proven = pointing.read(work.store, work.config.project), bool(verdict.facts["proven"])
    if not proven and now.get("proven") and now.get("generation") != generation.path:
        raise UserError(
            f"{generation.path} is unproven, and what is live (version {now.get('version')}) has been proven",
            hint="name a questions file in spec.yaml, then run evaluate and gate again",
        )
    if not proven and now.get("proven") and (earlier := _manifest(work, now.get("evaluation"))) is not None:
        # The same generation, evaluated once more without questions: what was proven of it stands.
        evaluation, proven = earlier, True
    return publish(work, params, generation, evaluation, proven=proven, how="live")


def _manifest(work: Work, path: object) -> Manifest | None:
    return work.store.manifest(path) if isinstance(path, str) else None


def publish(
    work: Work, params: PublishParams, generation: Manifest, evaluation: Manifest | None, *, proven: bool, how: str
) -> Result:
    """Look whether a generation is whole and answers, then let alias and pointer name it."""
    facts = facts_of(work.store, generation)
    count = whole(work, params, generation)
    if facts.collection is not None and params.qdrant is not None:
        from orrery.rag.engines.server import connect, point_alias

        point_alias(connect(params.qdrant), work.config.project, facts.collection, params.qdrant)
    told = pointer(
        params.version,
        generation,
        evaluation,
        proven=proven,
        before=earlier(pointing.read(work.store, work.config.project), generation),
    )
    put(work, told)
    removed = retire(work, params.qdrant, [generation.path, *(one["generation"] for one in told["before"])])
    said = f"version {params.version} is {how}: {count:,} passages of {generation.key}"
    return Result(
        reasons=[
            said,
            *([] if proven else ["unproven: no questions were asked of it"]),
            *(f"removed from the server: {collection}" for collection in removed),
        ],
        metrics={"passages": float(count)},
        facts={"model_version": params.version, "previous": params.previous, "proven": proven},
    )


def whole(work: Work, params: PublishParams, generation: Manifest) -> int:
    """Open a generation as a service would, and ask it something; return how many passages it has.

    Raises `UserError` when its points are not those that were committed, or it does not answer.
    """
    listed = verified(work.store, generation, POINTS).decode().split()
    opened = open_generation(work.store, generation.path, work.scratch / "probe", qdrant=params.qdrant, threads=1)
    try:
        there = sorted(opened.engine.ids())
        if there != sorted(listed):
            missing, extra = set(listed) - set(there), set(there) - set(listed)
            raise UserError(
                f"{generation.path}: {len(missing)} of its points are missing and {len(extra)} are strays",
                hint=f"run {work.config.project}.reindex again: index mends it on a server, else it makes another",
            )
        groups = _groups(opened.engine)
        if there and not retrieve(opened, PROBE, groups=groups, top_k=1):
            raise UserError(f"{generation.path} finds nothing for any question", hint="run reindex again")
        return len(there)
    finally:
        opened.close()


def _groups(engine: Engine) -> frozenset[str]:
    """Return every group that may read anything of a generation."""
    return frozenset(group for _, row in engine.rows(["groups"]) for group in row["groups"])


def pointer(
    version: str,
    generation: Manifest,
    evaluation: Manifest | None,
    *,
    proven: bool,
    before: list[dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Return what services follow; `before`: what was live before, the last first."""
    return {
        "version": version,
        "generation": generation.path,
        "digest": generation.digest,
        "evaluation": evaluation.path if evaluation is not None else None,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "proven": proven,
        "before": before or [],
    }


def earlier(now: dict[str, Any], generation: Manifest) -> list[dict[str, str]]:
    """Return what was live before `generation`, the last first: each once, and `BEFORE` of them."""
    given = now.get("before")
    known = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    stack = [{"version": now.get("version"), "generation": now.get("generation")}, *known]
    found: dict[str, dict[str, str]] = {}
    for one in stack:
        path = one.get("generation")
        if isinstance(path, str) and path != generation.path and path not in found:
            found[path] = {"version": str(one.get("version")), "generation": path}
    return list(found.values())[:BEFORE]


def put(work: Work, told: dict[str, Any]) -> None:
    """Put the pointer; one that says the same stays, so that nobody switches for nothing."""
    now = pointing.read(work.store, work.config.project)
    if {**now, "at": None} != {**told, "at": None}:
        work.store.put(pointing.path(work.config.project), json.dumps(told, indent=1, sort_keys=True).encode())
