"""The whole of housekeeping but for the cluster: the store, and this machine. For the Dag and the command line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orrery import platform
from orrery.errors import RequestError, UserError, nearest
from orrery.housekeeping import machine, report
from orrery.housekeeping.inventory import OWN, PROJECT
from orrery.housekeeping.sweep import Report, Sweep
from orrery.ledger import Ledger
from orrery.plan import safe_name
from orrery.store import Store


@dataclass(frozen=True)
class Asked:
    """What a run of housekeeping is asked for. `logs`: Airflow's folder of task logs, where it is on this machine."""

    run: str
    actor: str
    dry_run: bool = False
    project: str | None = None
    share: float | None = None
    logs: Path | None = None


def keep(asked: Asked, say: Callable[[str], None]) -> dict[str, Any]:
    """Do it, and say what; return the figures. Raises `UserError` where it looks wrong: then nothing goes."""
    where = platform.load()
    _check(asked)
    run = safe_name(asked.run)
    with tempfile.TemporaryDirectory(prefix="orrery-") as held:
        sweep = Sweep(
            Store(where.store), Ledger(where.ledger), where.retention, run, only=asked.project, share=asked.share,
            dry_run=asked.dry_run, actor=asked.actor, held=Path(held),
        )  # fmt: skip
        found = sweep()
    local = machine.studies(found.studies, where.retention)
    if asked.project is None:
        local += machine.temporary()
        local += machine.logs(asked.logs, where.retention) if asked.logs else []
    if not found.refused and not asked.dry_run:
        local = machine.remove(local, say)
        _write(sweep.store, run, found)
    for line in report.lines(found, local):
        say(line)
    if found.refused and not asked.dry_run:
        raise UserError(
            f"nothing was removed: {'; '.join(found.refused)}",
            hint="look at what would go (above): if it is right, allow it once with --share 100% (the Dag's `share`)",
        )
    return report.told(found, local)


def _check(asked: Asked) -> None:
    if asked.project is not None and not PROJECT.fullmatch(asked.project):
        known = nearest(asked.project, platform.project_names())
        raise RequestError(f"{asked.project[:80]!r} is no project", hint=known)
    if asked.share is not None and not 0 < asked.share <= 1:
        raise RequestError(f"share {asked.share} is not above 0 and at most 1")


def _write(store: Store, run: str, found: Report) -> None:
    """Keep what went, one by one with its reason: the ledger has the figures alone."""
    if found.removed:
        told = {**report.told(found), "each": report.details(found.removed), "kept": found.kept}
        store.put(f"{OWN}/reports/{run}.json", json.dumps(told, indent=1).encode())
