"""What trainings cost: time (`effort`) and money, from the ledger alone. Light.

An *attempt* is one ledger entry (`attempts.Attempt`). A *training* is every attempt at one address (one fingerprint),
in whatever run, from the first up to the one that is done: several runs may share a training, since a run goes on
from the checkpoint that another has left. After it is done, another attempt at the same address begins a new training.
What is still going on is counted when it has ended.

money = wall time x the compute class's price per hour as it was when the attempt began. Of a SageMaker job: the seconds
it bills, whose price is the one on demand, since spot's discount is in the seconds. An attempt on a class without a
price counts as unpriced, never as free.

Saved by spot = what the same useful work would have cost on demand, less all that was paid, lost work and restarts
included. On demand nothing is interrupted: one start-up (the median one), each attempt's useful, evaluating and other
time as far as its steps were kept, no saves. A spot attempt's time is priced at its class's
`on_demand_price_per_hour`, or else at the fallback class's price, as if that were as fast; other attempts at their own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orrery import effort
from orrery.attempts import Attempt, folder_of
from orrery.effort import Parts
from orrery.errors import UserError
from orrery.ledger import KEPT, Entry, Ledger
from orrery.platform import Platform
from orrery.spec import ModelSpec

TRAINS = ("train", "trial")  # the verbs whose attempts are trainings; the others have no steps to keep or lose
Rates = Mapping[str, float]  # compute class -> price per hour of the same work on demand


@dataclass(frozen=True)
class Spent:
    """An attempt on record, with where it belongs. `address` is empty when it cannot be known."""

    verb: str
    key: str
    run: str
    slot: str  # the task and what it works on: attempts of one slot of a run follow each other
    address: str
    attempt: Attempt

    @property
    def done(self) -> bool:
        """Whether it ended with a result that counts."""
        return self.attempt.cause is None

    @property
    def price(self) -> float | None:
        """Price per hour, None when it is not known."""
        return self.attempt.price_per_hour or None

    @property
    def cost(self) -> float | None:
        """What it cost, None when its price is not known."""
        return None if self.price is None else self.price * self.billed_s / 3600

    @property
    def billed_s(self) -> float:
        """Seconds that are paid for: the wall time, or what SageMaker bills."""
        managed = (self.attempt.model_extra or {}).get("sagemaker")
        billed = managed.get("billable_s") if isinstance(managed, Mapping) else None
        return float(billed) if isinstance(billed, int | float) else effort.wall(self.attempt)


@dataclass(frozen=True)
class Account:
    """Several attempts added up. `cost` is of the priced ones; `on_demand` is None where nothing ran on spot."""

    parts: Parts
    attempts: int
    causes: Mapping[str, int]  # why attempts ended before their time -> how many
    kept: int  # optimiser steps that count
    done: int  # optimiser steps that were taken
    cost: float | None
    unpriced: int  # attempts whose price is not known
    on_demand: float | None  # what the same useful work would have cost
    classes: tuple[str, ...]

    @property
    def goodput(self) -> float | None:
        """Share of the wall time that went into the model, None where no step was reported."""
        return self.parts.useful / self.parts.wall if self.done and self.parts.wall > 0 else None

    @property
    def saved(self) -> float | None:
        """Money saved by spot, net of what it lost; below zero when it was dearer."""
        return None if self.on_demand is None or self.cost is None else self.on_demand - self.cost

    @property
    def interrupted(self) -> int:
        """Attempts that were taken away: interrupted, or lost with their machine or worker."""
        return self.causes.get("interrupted", 0) + self.causes.get("lost", 0)

    def told(self) -> dict[str, Any]:
        """Return all of it as JSON has it; money in the platform's currency, times in seconds."""
        return {
            "attempts": self.attempts,
            "causes": dict(self.causes),
            "classes": list(self.classes),
            "seconds": self.parts.told(),
            "steps": {"kept": self.kept, "done": self.done},
            "goodput": _round(self.goodput),
            "cost": _round(self.cost),
            "unpriced": self.unpriced,
            "on_demand": _round(self.on_demand),
            "saved": _round(self.saved),
        }


@dataclass(frozen=True)
class Training:
    """The attempts at one address up to the one that is done, oldest first, with the steps of each that count."""

    spent: tuple[Spent, ...]
    kept: tuple[int, ...]

    @property
    def address(self) -> str:
        """Where its model is committed; empty when that is not known."""
        return self.spent[-1].address

    @property
    def finished(self) -> bool:
        """Whether there is a model."""
        return self.spent[-1].done

    def account(self, rates: Rates) -> Account:
        """Return it added up."""
        return added(self.spent, self.kept, rates)

    def parts(self) -> list[Parts]:
        """Return the parts of each attempt."""
        return [effort.parts(s.attempt, count) for s, count in zip(self.spent, self.kept, strict=True)]


# -- from the ledger ----------------------------------------------------------------------------------


def read(entries: Iterable[Entry], *verbs: str) -> list[Spent]:
    """Return the attempts that entries of kind `run` tell of (of some verbs), oldest first, but for skipped ones."""
    found = []
    for entry in entries:
        p, folder = entry.payload, (folder_of(entry.payload) or entry.key).split("/")
        if not isinstance(p.get("attempt"), dict) or p.get("skipped") or (verbs and p.get("verb") not in verbs):
            continue
        run, slot = (folder[2], folder[3]) if len(folder) > 4 else (entry.key, "")
        attempt = Attempt.model_validate(p["attempt"])
        address = attempt.address or _address(str(p.get("output") or ""))
        found.append(Spent(str(p.get("verb", "")), str(p.get("key", "")), run, slot, address, attempt))
    return sorted(found, key=lambda s: s.attempt.started)


def _address(manifest: str) -> str:
    """Return the address that a manifest's path holds, or nothing."""
    path = manifest.split("/")
    return path[-2] if len(path) >= 3 and path[-1] == "manifest.json" else ""


def trainings(spent: Iterable[Spent]) -> list[Training]:
    """Return the trainings that attempts belong to, by the start of their last attempt, oldest first.

    An attempt whose address is not on record belongs to what its own run's task came to next.
    """
    groups: dict[tuple[str, str], list[Spent]] = {}
    known: dict[tuple[str, str], str] = {}
    for one in sorted((s for s in spent if s.verb in TRAINS), key=lambda s: s.attempt.started, reverse=True):
        own = (one.run, one.slot)
        address = known[own] = one.address or known.get(own, "")
        groups.setdefault((one.verb, address) if address else own, []).append(one)
    found: list[Training] = []
    for group in groups.values():
        ours: list[Spent] = []
        for one in reversed(group):
            ours.append(one)
            if one.done:
                found.append(_training(ours))
                ours = []
        if ours:
            found.append(_training(ours))
    return sorted(found, key=lambda t: t.spent[-1].attempt.started)


def _training(spent: Sequence[Spent]) -> Training:
    return Training(tuple(spent), tuple(effort.kept([s.attempt for s in spent])))


def of_model(found: Iterable[Training], manifest: str) -> Training | None:
    """Return the training that a model version came from: the first that was done at its manifest's address."""
    address = _address(manifest)
    return next((t for t in found if address and t.finished and t.address == address), None)


# -- money --------------------------------------------------------------------------------------------


def rates(platform: Platform, fallback: str | None) -> dict[str, float]:
    """Return what an hour of each compute class's work costs on demand, as far as the platform says so."""
    found = {}
    for name, compute in platform.compute.items():
        other = platform.compute[fallback].price_per_hour if fallback in platform.compute else 0.0
        own = compute.on_demand_price_per_hour or (compute.price_per_hour if compute.sagemaker else other)
        price = own if compute.spot else compute.price_per_hour
        if price:
            found[name] = price
    return found


def added(spent: Sequence[Spent], kept: Sequence[int], prices: Rates) -> Account:
    """Return attempts added up."""
    each = [effort.parts(s.attempt, count) for s, count in zip(spent, kept, strict=True)]
    causes = [s.attempt.cause for s in spent if s.attempt.cause]
    costs = [s.cost for s in spent if s.cost is not None]
    unpriced = sum(s.cost is None and effort.wall(s.attempt) > 0 for s in spent)
    return Account(
        parts=sum(each, Parts()),
        attempts=len(spent),
        causes={c: causes.count(c) for c in sorted(set(causes))},
        kept=sum(kept),
        done=sum(max(effort.steps(s.attempt), count) for s, count in zip(spent, kept, strict=True)),
        cost=sum(costs) if costs else None,
        unpriced=unpriced,
        on_demand=None if unpriced else _on_demand(spent, kept, each, prices),
        classes=tuple(dict.fromkeys(s.attempt.compute for s in spent if s.attempt.compute)),
    )


def _on_demand(spent: Sequence[Spent], kept: Sequence[int], each: Sequence[Parts], prices: Rates) -> float | None:
    """Return what the useful work would have cost on demand; None where nothing ran on spot, or a price is missing."""
    hourly = [prices.get(s.attempt.compute) if s.attempt.spot else s.price for s in spent]
    if not any(s.attempt.spot for s in spent) or any(price is None for price in hourly):
        return None
    total = 0.0
    for one, count, part, price in zip(spent, kept, each, hourly, strict=True):
        taken = effort.steps(one.attempt)
        share = min(count / taken, 1.0) if taken else float(one.done)
        total += (part.useful + share * (part.evaluating + part.other)) * (price or 0.0) / 3600
    starts = [p.startup for p, s in zip(each, spent, strict=True) if s.attempt.progress]
    return total + (statistics.median(starts) * (hourly[0] or 0.0) / 3600 if starts else 0.0)


def of_run(book: Ledger, project: str, run: str, *verbs: str) -> list[Spent]:
    """Return the attempts of one run (its name in the ledger), of some verbs."""
    prefix = f"{project}/runs/{run}/"[:KEPT]  # a longer key is kept shortened
    return [s for s in read(book.find(project, "run", phase="done", prefix=prefix), *verbs) if s.run == run]


def refuse_over_budget(
    book: Ledger, project: str, run: str, spec: ModelSpec, price_per_hour: float | None = None
) -> None:
    """Raise `UserError` when a run's trainings have used up `train.budget`: asked before each attempt.

    `run` is the run's name in the ledger; a cleared run is another one, with a budget of its own. `price_per_hour` is
    that of the class which the attempt would use. What is running now is not counted, and no attempt is stopped.
    """
    budget = spec.train.budget
    if budget is None:
        return
    spent = of_run(book, project, run, *TRAINS)
    nameless = [s.attempt.compute or "?" for s in spent if s.cost is None and effort.wall(s.attempt) > 0]
    if price_per_hour == 0 or nameless:
        where = f"compute class {nameless[0]!r} has" if nameless else "the attempt's compute class has"
        raise UserError(
            f"train.budget is {budget:g}, and {where} no price: nobody knows what is spent",
            hint="set its price_per_hour in platform.yaml, or leave train.budget out",
        )
    paid = sum(s.cost or 0.0 for s in spent)
    if paid < budget:
        return
    taken = sum(s.attempt.cause in ("interrupted", "lost") for s in spent)
    committed = max((effort.committed(s.attempt) for s in spent), default=0)
    raise UserError(
        f"the budget is spent: {len(spent)} attempts ({taken} interrupted) have cost {paid:.4g} of train.budget "
        f"{budget:g}, so no other one is started",
        hint=f"clear the task to spend as much again: it goes on from step {committed:,}. For trainings to come raise "
        "`train.budget` in spec.yaml (a changed spec is another training, from its first step) or use a cheaper class",
    )


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
