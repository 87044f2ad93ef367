"""spot_month: what a month of trainings on interruptible machines costs, and whether models come in time.

Every day a training is asked for that needs `--work` hours of undisturbed steps and must be there `--deadline` hours
after its first attempt began; a day without a model is a miss, and the next day's training begins. Machines are taken
away by a Poisson process; `--notice` of the times with a warning. The product's own functions decide and count: the
interval of the saves (`interval.optimum`), where the next attempt runs (`placement.placement`), where the time went and
what it cost (`effort`, `costs`). The rest is this page: an attempt waits for a machine (not paid), starts, takes steps and
saves; with a warning it saves and goes, without one it loses what is not saved. One attempt's fate depends on the seed,
the rate, the day and its number only, so that the strategies meet like weather.

    orrery     spot; Young's and Daly's interval; saves when warned; `fallback` when the deadline or 20 interruptions ask
    epoch      spot; a save every `--epoch` minutes, none when warned, no fallback
    zero       spot; begins again after each interruption
    on demand  the same machine at its full price, never interrupted

Measured: the seconds of a save and of a start, for 204 MB of state on two busy cores (a save stands in the way for
0.06 s and is whole after 2.5 s, imports take 3 s, loading the state 3 s; the rest of the start is data). Assumed: prices,
the share of warnings, the wait for a machine. Give your own: `orrery cost PROJECT --version V` tells them.

    bench_spot_month.py           the table's figures as JSON rows; var/bench/spot_month.{json,md,png}
    bench_spot_month.py --docs    writes the table and the plot into include/orrery/training/ as well
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from orrery import budgets, costs, effort
from orrery.attempts import Attempt
from orrery.costs import Account, Spent
from orrery.goodput import Progress
from orrery.placement import placement
from orrery.platform import Compute
from orrery.spec import Spot, Train
from orrery.training import interval

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "include" / "orrery" / "training"
OUT = ROOT / "var" / "bench"
SEED = 20130401
DAYS, HOUR, DAY = 30, 3600.0, 86400.0
BETWEEN = {"once an hour": HOUR, "once in 15 minutes": 900.0}
STRATEGIES = ("orrery", "epoch", "zero", "on demand")
NAMES = {
    "orrery": "Orrery", "epoch": "a save per epoch", "zero": "from zero", "on demand": "on demand",
}  # fmt: skip
FIRST = datetime(2013, 4, 1, tzinfo=UTC)


@dataclass(frozen=True)
class World:
    """What the simulation is told; times in seconds, prices per hour."""

    work: float
    deadlines: tuple[float, ...]
    step: float
    save: float
    whole: float
    start: float
    wait: float
    notice: float
    epoch: float
    spot: float
    firm: float
    months: int

    @property
    def steps(self) -> int:
        return math.ceil(self.work / self.step)


@dataclass(frozen=True)
class Fate:
    """When an attempt's machine is taken away (seconds after it was given), and whether with a warning."""

    life: float
    warned: bool


@dataclass(frozen=True)
class Job:
    """One day's training: its attempts, and when it was there (seconds after its first attempt began; None: never)."""

    spent: tuple[Spent, ...]
    there: float | None


def fate(world: World, between: float, day: int, number: int) -> Fate:
    """Return an attempt's fate: the same for every strategy."""
    rng = random.Random(f"{SEED}/{between}/{day}/{number}")
    return Fate(rng.expovariate(1 / between), rng.random() < world.notice)


def attempt(world: World, fate: Fate | None, resumed: int, every: float | None, warned_saves: bool) -> Attempt:
    """Return how an attempt goes that is given a machine at second 0 and resumes from a step.

    `every`: seconds of steps between saves; None: it saves nothing.
    """
    life = fate.life if fate else math.inf
    left = (world.steps - resumed) * world.step
    saves = int(left / every) if every else 0
    need = world.start + left + saves * world.save
    if life < world.start:
        return _attempt(life, None, cause="interrupted")
    if need <= life:
        seconds = {"step": left, "checkpoint": saves * world.save}
        told = Progress(began=world.start, now=need, resumed=resumed, step=world.steps, committed=world.steps,
                        total=world.steps, step_s=world.step, seconds=seconds)  # fmt: skip
        return _attempt(need, told, cause=None)
    return _interrupted(world, life - world.start, resumed, every, warned_saves and fate is not None and fate.warned)


def _interrupted(world: World, trained: float, resumed: int, every: float | None, saves_now: bool) -> Attempt:
    """Return an attempt that is taken away after it has trained for so long."""
    cycle = every + world.save if every else math.inf
    full = int(trained / cycle)
    rest = trained - full * cycle if full else trained
    stood = full * world.save + max(rest - (every or math.inf), 0.0)
    step = resumed + int((trained - stood) / world.step)
    # The last save may not have become whole yet.
    safe = full if rest + world.save >= world.whole else max(full - 1, 0)
    committed = resumed + (int(safe * every / world.step) if every else 0)
    wall = world.start + trained
    if saves_now:
        committed, wall, stood = step, wall + world.whole, stood + world.whole
    seconds = {"step": trained - full * world.save, "checkpoint": stood}
    told = Progress(began=world.start, now=wall, resumed=resumed, step=step, committed=committed, total=world.steps,
                    step_s=world.step, seconds=seconds)  # fmt: skip
    return _attempt(wall, told, cause="interrupted")


def _attempt(wall: float, told: Progress | None, cause: Any) -> Attempt:
    committed, resumed = (told.committed, told.resumed) if told else (0, 0)
    return Attempt(cause=cause, started="", wall_s=wall, progress=told, committed=committed, resumed=resumed)


def job(world: World, strategy: str, between: float, deadline: float, day: int) -> Job:
    """Return one day's training."""
    classes = {"spot": Compute(spot=True, price_per_hour=world.spot), "firm": Compute(price_per_hour=world.firm)}
    spot = Spot(deadline=f"{round(deadline / 60)}m", fallback="firm")
    train = Train(compute="spot", spot=spot)
    every = {"orrery": interval.optimum(world.save, between), "epoch": world.epoch}.get(strategy)
    history: list[Attempt] = []
    now, began = 0.0, None
    while not history or history[-1].cause is not None:
        where = "firm" if strategy == "on demand" else "spot"
        if strategy == "orrery":
            where = placement(history, train, classes, FIRST + timedelta(seconds=now)).compute
        queued = world.wait + (budgets.INTERRUPTED_S if history else 0.0)
        now += queued
        began = now if began is None else began
        if now - began > DAY:
            return Job(_spent(history), None)
        safe = max((a.committed for a in history), default=0) if every else 0
        own = None if where == "firm" else fate(world, between, day, len(history))
        one = attempt(world, own, safe, every, strategy == "orrery")
        history.append(_placed(one, where, classes[where], now, queued, len(history) + 1))
        now += one.wall_s
    return Job(_spent(history), now - (began or 0.0))


def _placed(one: Attempt, name: str, compute: Compute, now: float, queued: float, number: int) -> Attempt:
    """Return an attempt with where and when it ran."""
    began = FIRST + timedelta(seconds=now)
    told = one.progress
    if told is not None:
        moment = began.timestamp()
        told = told.model_copy(update={"began": told.began + moment, "now": told.now + moment})
    values = {"compute": name, "spot": compute.spot, "price_per_hour": compute.price_per_hour, "number": number,
              "started": began.isoformat(), "queued_s": queued, "progress": told}  # fmt: skip
    return one.model_copy(update=values)


def _spent(history: list[Attempt]) -> tuple[Spent, ...]:
    return tuple(Spent("train", "", "", "", "", a) for a in history)


def months(world: World, strategy: str, between: float, deadline: float) -> dict[str, Any]:
    """Return the figures of one row: means per month, over all months."""
    jobs = [job(world, strategy, between, deadline, day) for day in range(DAYS * world.months)]
    accounts: list[Account] = []
    for one in jobs:
        kept = effort.kept([s.attempt for s in one.spent])
        accounts.append(costs.added(one.spent, kept, {"spot": world.firm}))
    parts = sum((a.parts for a in accounts), effort.Parts())
    met = [j.there is not None and j.there <= deadline for j in jobs]
    by_month = [sum(met[m * DAYS : (m + 1) * DAYS]) for m in range(world.months)]
    wall = parts.wall
    return {
        "strategy": strategy,
        "between": between,
        "deadline": deadline,
        "goodput": (parts.useful / wall) if all(j.there is not None for j in jobs) else _made(jobs, accounts) / wall,
        "cost": sum(a.cost or 0.0 for a in accounts) / world.months,
        "models": sum(j.there is not None for j in jobs) / world.months,
        "met": sum(met) / world.months,
        "met_worst": min(by_month),
        "jobs": len(jobs),
        "interruptions": sum(a.interrupted for a in accounts) / len(jobs),
        "fallback": sum("firm" in a.classes and "spot" in a.classes for a in accounts) / len(jobs),
        "latest": max((j.there for j in jobs if j.there is not None), default=0.0) / HOUR,
        "parts": {name: round(value / wall, 5) for name, value in parts.told().items()},
    }


def _made(jobs: list[Job], accounts: list[Account]) -> float:
    """Return the useful seconds of trainings that came to a model; the others were for nothing."""
    return sum(a.parts.useful for j, a in zip(jobs, accounts, strict=True) if j.there is not None)


def everything(world: World) -> list[dict[str, Any]]:
    """Return a row per rate, deadline and strategy."""
    return [
        months(world, strategy, between, deadline)
        for between in BETWEEN.values()
        for deadline in world.deadlines
        for strategy in STRATEGIES
    ]


# -- table and plot -----------------------------------------------------------------------------------


def markdown(rows: list[dict[str, Any]], world: World) -> str:
    """Return the table."""
    rates = {v: k for k, v in BETWEEN.items()}
    lines = [
        f"{DAYS} trainings a month of {world.work / HOUR:g} h undisturbed work each, {world.months} months; spot "
        f"{world.spot:.2f}, on demand {world.firm:.2f} an hour. In time: of {DAYS}, in the worst month in brackets.",
        "",
        "| interrupted | deadline | strategy | goodput | cost a month | against on demand | models | in time | latest "
        "| went to `fallback` |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        firm = next(x["cost"] for x in rows if x["strategy"] == "on demand" and _same(x, r))
        name = f"**{NAMES[r['strategy']]}**" if r["strategy"] == "orrery" else NAMES[r["strategy"]]
        fallback = f"{100 * r['fallback']:.0f} %" if r["strategy"] == "orrery" else "–"
        latest = f"{r['latest']:.1f} h" if r["models"] else "–"
        lines.append(
            f"| {rates[r['between']]} | {r['deadline'] / HOUR:g} h | {name} | {100 * r['goodput']:.1f} % "
            f"| {r['cost']:,.0f} | {100 * (r['cost'] / firm - 1):+.0f} % | {r['models']:.1f} "
            f"| {r['met']:.1f} ({r['met_worst']}) | {latest} "
            f"| {fallback} |"
        )
    return "\n".join(lines) + "\n"


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return bool(a["between"] == b["between"] and a["deadline"] == b["deadline"])


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Draw, for each rate at the tighter deadline: where the paid time went; cost and models in time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tight = min(r["deadline"] for r in rows)
    colours = {"useful": "#009E73", "startup": "#56B4E9", "checkpointing": "#E69F00", "lost": "#D55E00"}
    said = {"useful": "useful", "startup": "start-up", "checkpointing": "saving", "lost": "lost, or of no use"}
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=(3, 2))
    figure.suptitle(f"{DAYS} trainings a month, each due after {tight / HOUR:g} h", fontsize=11)
    most = max(r["cost"] for r in rows)
    for line, (rate, between) in enumerate(BETWEEN.items()):
        shown = [r for r in rows if r["between"] == between and r["deadline"] == tight][::-1]
        names = [NAMES[r["strategy"]] for r in shown]
        left = [0.0] * len(shown)
        share = {r["strategy"]: {**r["parts"], "useful": r["goodput"]} for r in shown}
        for s in share.values():
            s["lost"] = max(1 - s["useful"] - s["startup"] - s["checkpointing"], 0.0)
        bars, money = axes[line]
        for part, colour in colours.items():
            values = [100 * share[r["strategy"]][part] for r in shown]
            bars.barh(names, values, left=left, color=colour, label=said[part], height=0.62)
            left = [a + b for a, b in zip(left, values, strict=True)]
        bars.set(xlim=(0, 100), title=f"paid time, %: interrupted {rate}")
        money.barh(names, [r["cost"] for r in shown], color="#7F7F7F", height=0.62)
        for i, r in enumerate(shown):
            money.text(r["cost"] + most * 0.02, i, f"{r['met']:.1f} of {DAYS} in time", va="center", fontsize=9)
        money.set(xlim=(0, most * 1.5), title="cost of a month")
        money.tick_params(labelleft=False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that `make bench` prints: goodput and cost at the tighter deadline, deadlines over all rows."""
    tight = min(r["deadline"] for r in rows)
    out = []
    for rate, name in ((HOUR, "spot_goodput_1h"), (900.0, "spot_goodput_15min")):
        of = {r["strategy"]: r for r in rows if r["between"] == rate and r["deadline"] == tight}
        ours, zero, firm = of["orrery"], of["zero"], of["on demand"]
        against = f"from zero: {100 * zero['goodput']:.1f} % (ratio: cost of on demand / ours)"
        value = 100 * ours["goodput"]
        out.append(
            {"name": name, "value": value, "unit": "%", "against": against, "ratio": firm["cost"] / ours["cost"]}
        )
    mine = [r for r in rows if r["strategy"] == "orrery"]
    late = sum(r["jobs"] - r["met"] * r["jobs"] / DAYS for r in mine)
    total = sum(r["jobs"] for r in mine)
    zero = [r for r in rows if r["strategy"] == "zero"]
    against = f"from zero: {sum(r['met'] for r in zero) / sum(DAYS for _ in zero):.0%} in time (of {total:,} trainings)"
    out.append({"name": "spot_deadlines_missed", "value": round(late, 6), "unit": "trainings", "against": against,
                "ratio": 0.0})  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=float, default=4.0, help="hours of undisturbed steps of one training")
    parser.add_argument("--deadline", type=float, nargs="+", default=[4.5, 8.0], help="hours")
    parser.add_argument("--step", type=float, default=0.2, help="seconds of an optimiser step")
    parser.add_argument("--save", type=float, default=0.06, help="seconds that the training stands still for a save")
    parser.add_argument("--whole", type=float, default=2.5, help="seconds until a save can be taken up")
    parser.add_argument("--start", type=float, default=20.0, help="seconds from an attempt's start to its first step")
    parser.add_argument("--wait", type=float, default=120.0, help="seconds until a machine is there (not paid)")
    parser.add_argument("--notice", type=float, default=0.8, help="share of interruptions that are announced")
    parser.add_argument("--epoch", type=float, default=30.0, help="minutes, for the strategy that saves each epoch")
    parser.add_argument("--spot", type=float, default=0.90, help="price of an hour")
    parser.add_argument("--firm", type=float, default=2.70, help="price of an hour on demand")
    parser.add_argument("--months", type=int, default=20)
    parser.add_argument("--docs", action="store_true", help="write the table and the plot into the room as well")
    a = parser.parse_args()
    deadlines = tuple(h * HOUR for h in a.deadline)
    world = World(a.work * HOUR, deadlines, a.step, a.save, a.whole, a.start, a.wait, a.notice, a.epoch * 60, a.spot,
                  a.firm, a.months)  # fmt: skip
    rows = everything(world)
    table = markdown(rows, world)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "spot_month.json").write_text(json.dumps(rows, indent=1) + "\n")
    (OUT / "spot_month.md").write_text(table)
    plot(rows, OUT / "spot_month.png")
    if a.docs:
        plot(rows, ROOM / "spot_month.png")
        page = ROOM / "README.md"
        marked = r"(?s)(<!-- spot_month -->\n).*?(<!-- /spot_month -->)"
        page.write_text(re.sub(marked, lambda m: m[1] + "\n" + table + "\n" + m[2], page.read_text()))
    print(json.dumps(figures(rows)))


if __name__ == "__main__":
    main()
