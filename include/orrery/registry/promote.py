"""`promote`: the version in the registry is loaded and gives the predictions that were evaluated; then it is champion.

A desired state: run twice, or killed in between, it ends the same. The ledger is written by the orchestrator.
"""

from __future__ import annotations

from orrery.contract import PromoteParams, Result
from orrery.evaluation.exported import Exported, read_schema
from orrery.registry import client, probe
from orrery.registry.client import Mlflow, Version
from orrery.registry.register import MAX_TAG, approved, owned
from orrery.step import Work


def run(work: Work, params: PromoteParams) -> Result:
    """Make a version the champion. Raises `UserError` when it is not what was evaluated."""
    server, project = client.needed(), work.config.project
    training, evaluation = approved(work), work.input("evaluation")
    version = owned(server, project, params.version, training)
    features = [work.store.need(ref) for ref in evaluation.inputs["features"]]
    rows, wanted = probe.recorded(work, features, evaluation)
    worst = probe.compare(_fetch(work, server, version), rows, wanted)
    crown(server, project, version, params, "promoted")
    return Result(
        reasons=[
            f"version {version.number} is champion: {len(wanted)} rows as evaluated, largest difference {worst:.1g}"
        ],
        facts={"model_version": str(version.number), "previous": params.previous},
        links={"MLflow model": server.version_page(project, version.number)},
    )


def _fetch(work: Work, server: Mlflow, version: Version) -> Exported:
    """Load the version as anybody would who uses the registry: from its own files, not from our store."""
    folder = work.scratch / f"version-{version.number}"
    folder.mkdir(exist_ok=True)
    for name in ("model.onnx", "schema.json"):
        (folder / name).write_bytes(server.get_file(f"{version.source}/{name}"))
    name = f"version {version.number} in MLflow"
    return Exported(folder / "model.onnx", read_schema(folder / "schema.json", name), name)


def crown(server: Mlflow, project: str, version: Version, params: PromoteParams, how: str) -> None:
    """Move the alias `champion`, and note on the version who did it and why. The note first: it explains the move."""
    notes = {f"orrery.{how}_by": params.actor, f"orrery.{how}_why": params.reason, "orrery.previous": params.previous}
    server.tag_version(project, version.number, {k: v[:MAX_TAG] for k, v in notes.items() if v})
    server.set_alias(project, "champion", version.number)
    if server.alias(project, "challenger") == version.number:
        server.delete_alias(project, "challenger")
