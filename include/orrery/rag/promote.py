"""`promote`: a generation that the gate let through is opened once more, and then it is the live one.

A desired state: run twice, or killed in between, it ends the same. Services follow `<project>/live.json`, which is put
whole; on a Qdrant server the alias `<project>` follows it, for whoever asks the server directly. The ledger is written
by the orchestrator.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from orrery.contract import Result
from orrery.errors import UserError
from orrery.rag.contract import PublishParams
from orrery.rag.engines import Engine
from orrery.rag.generations import POINTS, facts_of, open_generation, verified
from orrery.rag.retrieval import retrieve
from orrery.step import Work
from orrery.store import Manifest

LIVE = "live.json"
PROBE = "Is anybody there?"


def run(work: Work, params: PublishParams) -> Result:
    """Make a generation the live one. Raises `UserError` when it is not what was evaluated."""
    generation, evaluation = work.input("candidate"), work.input("evaluation")
    if evaluation.inputs["generation"][0].path != generation.path:
        raise UserError(f"{evaluation.path} is of another generation than {generation.path}", hint="run evaluate again")
    verdict = work.input("verdict")
    if verdict.result["verdict"] != "promote" or verdict.inputs["evaluation"][0].path != evaluation.path:
        raise UserError(f"{verdict.path} does not say that {generation.path} may go live", hint="run gate again")
    return publish(work, params, generation, evaluation, proven=bool(verdict.facts["proven"]), how="live")


def publish(
    work: Work, params: PublishParams, generation: Manifest, evaluation: Manifest | None, *, proven: bool, how: str
) -> Result:
    """Look whether a generation is whole and answers, then let alias and pointer name it."""
    facts = facts_of(work.store, generation)
    count = whole(work, params, generation)
    if facts.collection is not None and params.qdrant is not None:
        from orrery.rag.engines.server import connect, point_alias

        point_alias(connect(params.qdrant), work.config.project, facts.collection, params.qdrant)
    put(work, pointer(params.version, generation, evaluation, proven=proven))
    said = f"version {params.version} is {how}: {count:,} passages of {generation.key}"
    return Result(
        reasons=[said, *([] if proven else ["unproven: no questions were asked of it"])],
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


def pointer(version: str, generation: Manifest, evaluation: Manifest | None, *, proven: bool) -> dict[str, Any]:
    """Return what services follow."""
    return {
        "version": version,
        "generation": generation.path,
        "digest": generation.digest,
        "evaluation": evaluation.path if evaluation is not None else None,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "proven": proven,
    }


def put(work: Work, told: dict[str, Any]) -> None:
    """Put the pointer; one that says the same stays, so that nobody switches for nothing."""
    path = f"{work.config.project}/{LIVE}"
    try:
        now = work.store.read_json(path)
    except (FileNotFoundError, ValueError):
        now = None
    if not isinstance(now, dict) or {**now, "at": None} != {**told, "at": None}:
        work.store.put(path, json.dumps(told, indent=1, sort_keys=True).encode())
