"""The figures of `orrery cost` and of the Model tab: plain JSON-able values, times in seconds, money in the platform's.

`seconds` and the other terms are defined in `effort` and `costs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orrery import costs, effort
from orrery.costs import Rates, Spent, Training
from orrery.errors import RequestError, nearest


def project(spent: Sequence[Spent], prices: Rates, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return each training, and what each verb's steps cost. `versions`: model version -> its training's manifest."""
    found = costs.trainings(spent)
    return {
        "trainings": trainings(found, prices, versions),
        "steps": {verb: _verb([s for s in spent if s.verb == verb]) for verb in dict.fromkeys(s.verb for s in spent)},
        "total": _verb(spent),
    }


def trainings(found: Iterable[Training], prices: Rates, versions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one row per training, oldest first; a training of no version is one that did not pass, or goes on."""
    found = list(found)
    made: dict[int, list[str]] = {}
    for version, manifest in versions.items():
        if (training := costs.of_model(found, manifest)) is not None:
            made.setdefault(id(training), []).append(version)
    return [_training(t, prices, made.get(id(t), [])) for t in found]


def attempts(found: Iterable[Training], others: Iterable[Spent] = ()) -> list[dict[str, Any]]:
    """Return one row per attempt, oldest first: of trainings, and of other steps."""
    rows = [_attempt(s, count) for t in found for s, count in zip(t.spent, t.kept, strict=True)]
    rows += [_attempt(s, 0) for s in others]
    return sorted(rows, key=lambda row: str(row["started"]))


def run(spent: Sequence[Spent], name: str) -> list[dict[str, Any]]:
    """Return the attempts of one run. Raises `RequestError` for a run that has none on record."""
    mine = [s for s in spent if s.run == name]
    if not mine:
        known = list(dict.fromkeys(s.run for s in reversed(spent)))
        raise RequestError(f"no attempt of a run {name!r} is on record", hint=nearest(name, known[:50]))
    of_trainings = [t for t in costs.trainings(spent) if any(s.run == name for s in t.spent)]
    others = [s for s in mine if s.verb not in costs.TRAINS]
    return [row for row in attempts(of_trainings, others) if row["run"] == name]


def version(spent: Sequence[Spent], versions: Mapping[str, str], name: str) -> list[dict[str, Any]]:
    """Return the attempts that a model version was trained by. Raises `RequestError` for one that is not on record."""
    training = costs.of_model(costs.trainings(spent), versions.get(name, ""))
    if training is None:
        what = "was trained before attempts were counted" if name in versions else "is not registered"
        raise RequestError(f"version {name!r} {what}", hint=nearest(name, versions))
    return attempts([training])


def _training(training: Training, prices: Rates, made: list[str]) -> dict[str, Any]:
    last = training.spent[-1]
    return {
        "versions": made,
        "verb": last.verb,
        "key": last.key,
        "address": training.address,
        "runs": list(dict.fromkeys(s.run for s in training.spent)),
        "finished": training.finished,
        "started": training.spent[0].attempt.started,
        "ended": last.attempt.ended.isoformat(timespec="milliseconds"),
        **training.account(prices).told(),
    }


def _attempt(spent: Spent, kept: int) -> dict[str, Any]:
    told, progress = spent.attempt, spent.attempt.progress
    return {
        "run": spent.run,
        "verb": spent.verb,
        "key": spent.key,
        "number": told.number,
        "started": told.started,
        "cause": told.cause,
        "compute": told.compute,
        "spot": told.spot,
        "placed": told.placed,
        "price_per_hour": spent.price,
        "steps": {
            "resumed": progress.resumed,
            "reached": progress.resumed + max(effort.steps(told), kept),
            "committed": effort.committed(told),
            "kept": kept,
            "total": progress.total,
        }
        if progress
        else None,
        "seconds": effort.parts(told, kept).told(),
        "cost": None if spent.cost is None else round(spent.cost, 6),
    }


def _verb(spent: Sequence[Spent]) -> dict[str, Any]:
    paid = [s.cost for s in spent if s.cost is not None]
    return {
        "attempts": len(spent),
        "wall": round(sum(effort.wall(s.attempt) for s in spent), 3),
        "cost": round(sum(paid), 6) if paid else None,
        "unpriced": sum(s.cost is None for s in spent),
    }
