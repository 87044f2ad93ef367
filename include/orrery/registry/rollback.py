"""`rollback`: an earlier version is champion again, after it has scored rows of the newest features."""

from __future__ import annotations

from orrery.contract import PromoteParams, Result
from orrery.evaluation import exported
from orrery.registry import client, probe
from orrery.registry.promote import crown
from orrery.registry.register import owned
from orrery.step import Work


def run(work: Work, params: PromoteParams) -> Result:
    """Make an earlier version the champion again. Raises `UserError` when it is unknown or cannot score."""
    server, project = client.needed(), work.config.project
    training = work.input("model")
    version = owned(server, project, params.version, training)
    model = exported.load(work.open_input, training, f"version {params.version}")
    rows = probe.sound(work, model, work.input("features"))
    crown(server, project, version, params, "rolled_back")
    return Result(
        reasons=[f"version {version.number} is champion again: it scored {rows} rows first"],
        facts={"model_version": str(version.number), "previous": params.previous},
        links={"MLflow model": server.version_page(project, version.number)},
    )
