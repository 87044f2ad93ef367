"""What housekeeping found and did, in lines for a log and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orrery.housekeeping.decisions import Kind, Removal
from orrery.housekeeping.machine import Leftover
from orrery.housekeeping.sweep import Report, counts

NAMES: dict[Kind, str] = {
    "attempt": "attempts",
    "checkpoints": "checkpoints of unfinished trainings",
    "output": "outputs withdrawn (files go a day later)",
    "withdrawn": "files of withdrawn outputs",
    "restore": "outputs brought back",
    "leftover": "half-written leftovers",
    "pointer": "older versions of partitions",
    "marker": "notes on outputs that are gone",
    "lease": "old leases",
    "bundle": "bundles",
    "temporary": "temporary files",
    "report": "old reports",
    "log": "runs' task logs",
}
SHOWN = 20  # of each kind, one by one; the numbers are of all


def lines(report: Report, local: Sequence[Leftover] = ()) -> list[str]:
    """Return a table, then what goes and why, then what was spared."""
    going = report.planned if report.dry_run or report.refused else report.removed
    verb = "would go" if report.dry_run or report.refused else "gone"
    said = [f"{report.objects:,} objects, {size(report.size)} in the store; looked in {report.seconds:.1f} s"]
    table = counts(going)
    for kind, told in table.items():
        said.append(
            f"  {NAMES[kind]:<42} {told['units']:>7,} {verb}  {told['objects']:>8,} objects  {size(told['bytes']):>9}"
        )
    if local:
        of_all = size(sum(one.size for one in local))
        said.append(f"  {'on this machine':<42} {len(local):>7,} {verb}  {'':>16}  {of_all:>9}")
    if not table and not local:
        said.append("  nothing to remove")
    for kind in table:
        mine = [r for r in going if r.kind == kind]
        said += [f"{r.path}: {r.why}" for r in mine[:SHOWN]]
        if len(mine) > SHOWN:
            said.append(f"… and {len(mine) - SHOWN:,} more {NAMES[kind]}")
    said += [f"{one.path}: {one.why}" for one in local[:SHOWN]]
    said += [f"spared: {line}" for line in report.kept[:SHOWN]]
    said += [f"note: {line}" for line in report.notes]
    said += [f"refused: {line}: nothing goes" for line in report.refused]
    return said


def told(report: Report, local: Sequence[Leftover] = ()) -> dict[str, Any]:
    """Return it as JSON: what was planned and what is gone, by kind; sizes in bytes."""
    return {
        "dry_run": report.dry_run,
        "objects": report.objects,
        "bytes": report.size,
        "planned": counts(report.planned),
        "removed": counts(report.removed),
        "on_this_machine": {"units": len(local), "bytes": sum(one.size for one in local)},
        "spared": len(report.kept),
        "refused": report.refused,
        "notes": report.notes,
        "seconds": round(report.seconds, 3),
    }


def details(removals: Sequence[Removal]) -> list[dict[str, Any]]:
    """Return each removal: kind, path, reason, objects and bytes."""
    return [{"kind": r.kind, "path": r.path, "why": r.why, "objects": r.count, "bytes": r.size} for r in removals]


def size(count: int) -> str:
    """Return bytes as people read them."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
