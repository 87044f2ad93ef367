"""alarms: how often the monitor's verdict cries wolf, and how surely it sees a model that got worse; beside two rivals.

A deployment: a model is evaluated on a holdout and makes a promise; then months are scored, their labels come, and the
product's own functions measure (`certainty.of_auc`, `performance.loss`, `drift.psi` …) and decide (`verdict.decide`),
each month with the verdicts before it. From month `CHANGE` on the world is as a scenario says, until the last month; the
model is never replaced, so a false promise can cry again and again.

The world: twelve normal features (four of them "weather"), three categories that mean nothing, a logistic model of the
twelve with an AUC of 0.75 at 22 % positives. Rows are never drawn one by one: given a day, a row's score and label
depend on one number, so a month is a multinomial draw of (day, label, score bin), exact for a model whose scores have
128 steps, and costs the same for a thousand rows and for a million. A feature's histogram is a multinomial, too.

The rivals see features only, as they do in use. `PSI > 0.2`: any of the 15 features, ten bins by quantiles of the
training window (three months). Evidently: its own default tests, called on rows as DataDriftPreset calls them (up to
30,000 rows of training, and the month), and its own rule, half of the columns. The whole Report on a million rows takes
minutes, its tests on rows seconds, so the rows of the largest months are fewer repetitions; the table says how many.

    bench_alarms.py             the table's figures as JSON rows; var/bench/alarms.{json,md,png}
    bench_alarms.py --docs      writes the table and the plot into include/orrery/monitoring/ as well
    bench_alarms.py --quick     few repetitions, to try it (--redraw: table and plot of the last run)
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from orrery.evaluation import certainty
from orrery.evaluation.bootstrap import Units
from orrery.evaluation.certainty import Certainty
from orrery.monitoring import drift, performance
from orrery.monitoring.verdict import EFFECT, Policy, Seen, Sure, decide
from orrery.spec import Monitor

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "include" / "orrery" / "monitoring"
OUT = ROOT / "var" / "bench"

SIZES = (1_000, 10_000, 100_000, 1_000_000)
NUMERIC, WEATHER, CATEGORIES = 12, 4, 3
STRONG = 0.3  # share of the score's variance that feature 0 carries: the one that breaks
SPREAD, BASE = 1.06, -1.45  # of the score; AUC 0.75, 22 % positive (checked below)
BINS, DAYS = 128, 30
EDGES = np.linspace(-6.5, 6.5, BINS - 1)
CENTRES = np.concatenate([[EDGES[0] - 0.1], (EDGES[1:] + EDGES[:-1]) / 2, [EDGES[-1] + 0.1]])
GRID = np.linspace(-14, 14, 4001)
MAX_REFERENCE = 30_000
# Deployments of ours (no change, a change); runs and months of the rivals: at large sizes chance plays no part.
RUNS = {"quiet": 1_000, "change": 300}
RIVAL_RUNS = {1_000: (30, 6), 10_000: (12, 6), 100_000: (3, 3), 1_000_000: (1, 2)}
# Rough months differ from each other, at any size.
ROUGH_RUNS = {1_000: (30, 6), 10_000: (12, 6), 100_000: (5, 6), 1_000_000: (3, 6)}
HOLDOUTS = (1.0, 0.45)  # of a month's rows: alike; and the default split, 15 % of three months
MONTHS, CHANGE = 10, 4  # months 1 to 3 as promised, then the scenario
SEED = 20130401


@dataclass(frozen=True)
class World:
    """How one month differs from training. Shifts are in standard deviations of a feature.

    `kept`: how much of the score's bond with the label is left (correlation). `prior` is added to the label's log odds.
    `day`, `day_prior`: how far the weather and the odds of single days scatter; `month`: the weather of whole months.
    """

    shift: float = 0.0
    kept: float = 1.0
    prior: float = 0.0
    broken: bool = False
    day: float = 0.0
    day_prior: float = 0.0
    month: float = 0.0


ROUGH = {"day": 0.5, "day_prior": 0.5, "month": 0.35}
# Correlation that is left -> AUC: found below by bisection, so that the loss is what its name says.
SCENARIOS = {
    "no change": "nothing changes; rows are independent",
    "no change, rough days": "nothing changes for the model; rows of a day share weather and luck, months their weather",
    "mean shift": "four features move by half a standard deviation, what they mean stays",
    "feature broken": "the strongest feature is constant from one day on",
    "label shift": "22 % positives become 33 %, the ranking stays",
    "3 points lost": "the features lose some of their meaning: AUC less 0.03 at once; no feature moves",
    "3 points lost, rough days": "the same, on rough days",
    "slow drift": "half a point of AUC each month, four features move by a tenth of a deviation each month",
}
QUIET = ("no change", "no change, rough days")


def world(name: str, month: int) -> World:
    """Return the world of a month (from 1) of a scenario."""
    rough = ROUGH if name.endswith("rough days") else {}
    if month < CHANGE or name in QUIET:
        return World(**rough)
    steps = month - CHANGE + 1
    match name.removesuffix(", rough days"):
        case "mean shift":
            return World(shift=0.5)
        case "feature broken":
            return World(broken=True)
        case "label shift":
            return World(prior=math.log(0.33 / 0.67) - math.log(0.22 / 0.78))
        case "3 points lost":
            return World(kept=kept_of(0.03), **rough)
        case "slow drift":
            return World(kept=kept_of(0.005 * steps), shift=0.1 * steps)
    raise ValueError(name)


# -- the world, exactly ------------------------------------------------------------------------------


def weights() -> np.ndarray:
    """The score's coefficients: feature 0 carries `STRONG` of the variance, the others share the rest."""
    rest = np.full(NUMERIC - 1, math.sqrt((1 - STRONG) / (NUMERIC - 1)))
    return SPREAD * np.concatenate([[math.sqrt(STRONG)], rest])


def cells(w: World, rng: np.random.Generator | None, days: int) -> np.ndarray:
    """Return the chances of (label, score bin) of each day [days, 2, BINS]; the score is what the model sees."""
    beta = weights()
    of_weather = beta[1 : 1 + WEATHER].sum()
    shift = np.full(days, w.shift)
    prior = np.full(days, w.prior)
    if rng is not None and (w.day or w.month):
        shift = shift + w.month * rng.normal() + w.day * rng.normal(size=days)
        prior = prior + w.day_prior * rng.normal(size=days)
    hidden = beta[0] if w.broken else 0.0
    spread = math.sqrt(max(SPREAD**2 - hidden**2, 1e-12))
    mean = of_weather * shift
    edges = (EDGES[None, :] - mean[:, None]) / spread
    below = np.concatenate([np.zeros((days, 1)), _normal(edges), np.ones((days, 1))], axis=1)
    mass = np.diff(below, axis=1)
    # What the label follows: the score (as far as it still means something), and what the model does not see.
    other = math.sqrt(hidden**2 + SPREAD**2 * (1 - w.kept**2))
    chance = np.interp(w.kept * CENTRES[None, :] + (BASE + prior)[:, None], GRID, link(other))
    return np.stack([mass * (1 - chance), mass * chance], axis=1)


@lru_cache(maxsize=64)
def link(other: float) -> np.ndarray:
    """Return the chance of a positive on `GRID`, over a normal part of the log odds that is not seen."""
    nodes, weight = np.polynomial.hermite_e.hermegauss(41)
    return np.asarray((weight / weight.sum() / (1 + np.exp(-(GRID[:, None] + other * nodes)))).sum(axis=1))


def _normal(x: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return np.asarray(ndtr(x))


def true_auc(w: World) -> float:
    """Return the AUC of a world without rough days."""
    negative, positive = cells(replace(w, day=0, day_prior=0, month=0), None, 1)[0]
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / (positive.sum() * negative.sum()))


@lru_cache(maxsize=16)
def kept_of(loss: float) -> float:
    """Return the correlation that costs this much AUC."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if true_auc(World()) - true_auc(World(kept=middle)) > loss else (low, middle)
    return (low + high) / 2


# -- a deployment, measured by the product -----------------------------------------------------------


def draw(w: World, rng: np.random.Generator, rows: int, days: int) -> np.ndarray:
    """Return counts [days, 2, BINS] of `rows` rows."""
    per_day = np.full(days, rows // days)
    per_day[: rows % days] += 1
    p = cells(w, rng, days).reshape(days, -1)
    return rng.multinomial(per_day, p / p.sum(axis=1, keepdims=True)).reshape(days, 2, BINS)


def measure(counts: np.ndarray) -> Certainty | None:
    """Measure counts as the monitor measures rows, by days."""
    day, label, place = np.nonzero(counts)
    units = Units("day", len(counts), day)
    return certainty.of_auc(label.astype(float), CENTRES[place], units, counts[day, label, place].astype(float))


def policy() -> Policy:
    own = Monitor()
    return Policy("auc", EFFECT["binary"], False, own.persistence, own.cooldown, own.labelled)


def deployment(months: Sequence[World], rng: np.random.Generator, rows: int, holdout: float) -> list[str]:
    """Return the verdict of each month."""
    first = replace(months[0], shift=0.0)
    days = DAYS if holdout >= 1 else max(10, round(DAYS * holdout))
    reference = draw(first, rng, max(100, int(rows * holdout)), days)
    promise = measure(reference)
    promised = performance.sure_of(promise.told("auc")) if promise else None
    before = _tenths(reference.sum(axis=(0, 1)))
    history: list[Seen] = []
    for number, w in enumerate(months):
        counts = draw(w, rng, rows, DAYS)
        observed = measure(counts)
        now, then = (
            np.bincount(before, weights=c.sum(axis=(0, 1)), minlength=10).astype(int) for c in (counts, reference)
        )
        loss = performance.loss("auc", observed, promised)
        seen = Seen(
            f"{number:02d}", "1", loss.value if loss else None,
            Sure(observed.value, observed.se, observed.freedom) if observed else None, promised, 1.0,
            drift.psi(then, now) - drift.psi_noise(then, now), drift.chi_square(then, now),
        )  # fmt: skip
        history.insert(0, replace(seen, verdict=decide(policy(), history[:6], seen).word))
    return [s.verdict for s in reversed(history)]


def _tenths(counts: np.ndarray) -> np.ndarray:
    """Return each score bin's tenth of the reference, as the product's quantile bins."""
    middle = (np.cumsum(counts) - counts / 2) / counts.sum()
    return np.minimum((middle * 10).astype(int), 9)


# -- the rivals --------------------------------------------------------------------------------------


def feature_means(w: World, rng: np.random.Generator) -> np.ndarray:
    """Return each numeric feature's mean in a month. Days that scatter widen a feature little; months move it."""
    mean = np.zeros(NUMERIC)
    mean[1 : 1 + WEATHER] = w.shift + w.month * rng.normal()
    return mean


def rows_of(w: World, rng: np.random.Generator, n: int) -> list[np.ndarray]:
    """Return the features' columns, numeric ones first."""
    mean = feature_means(w, rng)
    out = [mean[i] + rng.normal(size=n) for i in range(NUMERIC)]
    if w.day:
        of_day = (w.day * rng.normal(size=DAYS))[np.arange(n) % DAYS]
        for i in range(1, 1 + WEATHER):
            out[i] = out[i] + of_day
    if w.broken:
        out[0] = np.zeros(n)
    return out + [rng.choice(5, size=n, p=[0.4, 0.3, 0.15, 0.1, 0.05]) for _ in range(CATEGORIES)]


def psi_fires(reference: list[np.ndarray], edges: list[np.ndarray], columns: list[np.ndarray]) -> bool:
    """Tell whether the PSI of any feature is above 0.2."""
    for before, cut, now in zip(reference, edges, columns, strict=True):
        counts = np.bincount(np.searchsorted(cut, now, side="right"), minlength=len(cut) + 1)
        if drift.psi(before, counts) > 0.2:
            return True
    return False


def evidently_fires(reference: list[Any], columns: list[Any]) -> tuple[bool, bool]:
    """Return Evidently's verdict on the dataset (half of the columns), and whether any column drifted."""
    from evidently.legacy.calculations.stattests.registry import get_stattest
    from evidently.legacy.core import ColumnType

    found = []
    for i, (before, now) in enumerate(zip(reference, columns, strict=True)):
        kind = ColumnType.Numerical if i < NUMERIC else ColumnType.Categorical
        found.append(bool(get_stattest(before, now, kind, None)(before, now, kind, None).drifted))
    return sum(found) / len(found) >= 0.5, any(found)


def rivals(name: str, rows: int, runs: int, months: int) -> dict[str, list[list[bool]]]:
    """Return for each rule, and each run, whether it fires in the first months after the change."""
    import pandas as pd

    out: dict[str, list[list[bool]]] = {"psi": [], "evidently": [], "evidently_any": []}
    rng = np.random.default_rng((SEED, 1, list(SCENARIOS).index(name), rows))
    for _ in range(runs):
        train = rows_of(replace(world(name, 1), month=0.0), rng, 3 * rows)
        edges = [np.quantile(c, np.linspace(0.1, 0.9, 9)) for c in train[:NUMERIC]]
        edges += [np.arange(0.5, 4) for _ in range(CATEGORIES)]
        counts = [
            np.bincount(np.searchsorted(e, c, side="right"), minlength=len(e) + 1)
            for e, c in zip(edges, train, strict=True)
        ]
        series = [pd.Series(c[:MAX_REFERENCE]) for c in train]
        fired: dict[str, list[bool]] = {n: [] for n in out}
        for month in range(CHANGE, CHANGE + months):
            now = rows_of(world(name, month), rng, rows)
            fired["psi"].append(psi_fires(counts, edges, now))
            dataset, column = evidently_fires(series, [pd.Series(c) for c in now])
            fired["evidently"].append(dataset)
            fired["evidently_any"].append(column)
        for rule, found in fired.items():
            out[rule].append(found)
    return out


# -- the run -----------------------------------------------------------------------------------------


def simulate(name: str, rows: int, runs: int, holdout: float = 1.0) -> dict[str, Any]:
    """Return rates of one scenario at one size; `by_month` [k]: share of runs that asked within k months of change."""
    words, kind = [], list(SCENARIOS).index(name)
    for run in range(runs):
        rng = np.random.default_rng((SEED, kind, rows, int(100 * holdout), run))
        words.append(deployment([world(name, m) for m in range(1, MONTHS + 1)], rng, rows, holdout))
    table = np.array(words)
    after = table[:, CHANGE - 1 :] == "retrain"
    asked = np.where(after.any(axis=1), after.argmax(axis=1) + 1, 99)
    per_run = (table == "retrain").mean(axis=1)
    return {
        "scenario": name, "rows": rows, "holdout": holdout, "runs": runs, "months": runs * MONTHS,
        "retrain": float(per_run.mean()), "error": float(1.96 * per_run.std(ddof=1) / runs**0.5),
        "watch": float((table == "watch").mean()),
        "within": {str(k): float((asked <= k).mean()) for k in (1, 2, 3, 4, 6)},
    }  # fmt: skip


def everything(runs: dict[str, int], rival_runs: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """Run all of it; return what the table and the plot are made of."""
    ours, theirs = [], []
    for name in SCENARIOS:
        number = runs["quiet" if name in QUIET else "change"]
        for rows in SIZES:
            began = time.process_time()
            ours += [simulate(name, rows, number, holdout) for holdout in HOLDOUTS]
            if name != "3 points lost, rough days":  # to rules that see features, this is no change on rough days
                count, months = (ROUGH_RUNS if rival_runs is RIVAL_RUNS and name in QUIET[1:] else rival_runs)[rows]
                found = rivals(name, rows, count, months)
                theirs += [_rates(name, rows, rule, fired) for rule, fired in found.items()]
            print(f"{name}, {rows:,} rows: {time.process_time() - began:.0f} s CPU", flush=True)
    worlds = {n: round(true_auc(replace(world(n, MONTHS), day=0, day_prior=0, month=0)), 4) for n in SCENARIOS}
    return {"auc": round(true_auc(World()), 4), "auc_at_the_end": worlds, "verdict": ours, "rivals": theirs}


def _rates(name: str, rows: int, rule: str, fired: list[list[bool]]) -> dict[str, Any]:
    table = np.array(fired)
    within = {str(k): float(table[:, :k].any(axis=1).mean()) for k in (1, 2, 3, 6) if k <= table.shape[1]}
    return {"scenario": name, "rows": rows, "rule": rule, "runs": len(table), "months": int(table.size),
            "fires": float(table.mean()), "within": within}  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """Return the two tables."""
    ours = {(r["scenario"], r["rows"], r["holdout"]): r for r in found["verdict"]}
    theirs = {(r["scenario"], r["rows"], r["rule"]): r for r in found["rivals"]}
    lines = [
        "False alarms per month, in per cent (± 95 %, by deployments). In brackets: holdout of 0.45 months, the default split.",
        "",
        "| nothing changed | rows a month | `retrain` | `watch` | Evidently preset | any column of it | PSI > 0.2 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in QUIET:
        for rows in SIZES:
            one, small = ours[name, rows, 1.0], ours[name, rows, 0.45]
            other = [f"{100 * theirs[name, rows, rule]['fires']:.0f}" for rule in ("evidently", "evidently_any", "psi")]
            mine = f"{_rate(one)} ({_rate(small).partition(' ±')[0]})"
            lines.append(f"| {name} | {rows:,} | {mine} | {100 * one['watch']:.1f} | {' | '.join(other)} |")
    lines += ["", "Seen within k months of the change, in per cent of deployments; rivals within three (two at a million rows).", "",
              "| changed | rows a month | k = 2 | 3 | 4 | 6 | Evidently preset | any column of it | PSI > 0.2 |",
              "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name in [n for n in SCENARIOS if n not in QUIET]:
        like = "no change, rough days" if name == "3 points lost, rough days" else name
        for rows in SIZES:
            one, small = ours[name, rows, 1.0], ours[name, rows, 0.45]
            mine = [f"{100 * one['within'][k]:.0f} ({100 * small['within'][k]:.0f})" for k in ("2", "3", "4", "6")]
            within = [theirs[like, rows, rule]["within"] for rule in ("evidently", "evidently_any", "psi")]
            other = [f"{100 * w.get('3', w['2']):.0f}" for w in within]
            lines.append(f"| {name} | {rows:,} | {' | '.join(mine)} | {' | '.join(other)} |")
    return "\n".join(lines) + "\n"


def _rate(one: dict[str, Any]) -> str:
    """Return a rate with its 95 % interval; none in a thousand deployments is less than one of a thousand months."""
    return f"{100 * one['retrain']:.2f} ± {100 * one['error']:.2f}" if one["retrain"] else f"< {100 / one['runs']:.1g}"


def plot(found: dict[str, Any], target: Path) -> None:
    """Draw false alarms and what is seen, by rows a month."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = {  # Okabe & Ito 2008
        "verdict": ("Orrery's verdict", "#0072B2", "o-"),
        "evidently": ("Evidently's preset", "#D55E00", "s--"),
        "evidently_any": ("any column of it", "#E69F00", "^:"),
        "psi": ("PSI > 0.2 on any feature", "#7F7F7F", "d-."),
    }
    panels = (
        ("no change", "false alarms per month: nothing changes"),
        ("no change, rough days", "false alarms per month: rough days"),
        ("3 points lost", "seen within 3 months: 3 points of AUC lost"),
        ("feature broken", "seen within 3 months: the strongest feature broken"),
    )
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for place, (name, title) in enumerate(panels):
        axes = figure.add_subplot(2, 2, place + 1)
        quiet = name in QUIET
        for rule, (label, colour, style) in styles.items():
            if rule == "verdict":
                rows = [r for r in found["verdict"] if r["scenario"] == name and r["holdout"] == 1.0]
                values = [r["retrain"] if quiet else r["within"]["3"] for r in rows]
            else:
                rows = [r for r in found["rivals"] if r["scenario"] == name and r["rule"] == rule]
                values = [r["fires"] if quiet else r["within"].get("3", r["within"]["2"]) for r in rows]
            width = 2.4 if rule == "verdict" else 1.6
            axes.plot(
                [r["rows"] for r in rows], [100 * v for v in values], style, color=colour, label=label, linewidth=width
            )
        axes.axhline(2 if quiet else 95, color="black", linewidth=0.8, alpha=0.5)
        axes.text(1_000, 2 if quiet else 95, " 2 %" if quiet else " 95 %", va="bottom", fontsize=8)
        axes.set(xscale="log", title=title, ylim=(-4, 104), ylabel="%")
        axes.set_xticks(SIZES, [f"{n:,}" for n in SIZES])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.set_xlabel("rows a month")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    FigureCanvasAgg(figure)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that `make bench` prints: the worst of each bar, the best rival beside it."""

    def rate(name: str, rule: str) -> float:
        return max(100 * r["fires"] for r in found["rivals"] if r["scenario"] == name and r["rule"] == rule)

    out = []
    for name, key in (("no change", "alarms"), ("no change, rough days", "alarms_rough")):
        worst = max(100 * r["retrain"] for r in found["verdict"] if r["scenario"] == name and r["holdout"] == 1.0)
        against = f"PSI > 0.2: {rate(name, 'psi'):.0f} %, Evidently's preset {rate(name, 'evidently'):.0f} %, any column of it {rate(name, 'evidently_any'):.0f} % (ratio: PSI / ours)"
        out.append(
            {
                "name": key,
                "value": worst,
                "unit": "% of months",
                "against": against,
                "ratio": rate(name, "psi") / max(worst, 0.01),
            }
        )
    seen = [
        r for r in found["verdict"] if r["scenario"] == "3 points lost" and r["holdout"] == 1.0 and r["rows"] >= 10_000
    ]
    least = min(100 * r["within"]["3"] for r in seen)
    best = max(
        100 * r["within"].get("3", r["within"]["2"]) for r in found["rivals"] if r["scenario"] == "3 points lost"
    )
    out.append(
        {
            "name": "alarms_seen",
            "value": least,
            "unit": "% in 3 months",
            "against": f"best rival {best:.0f} % (ratio: ours / it)",
            "ratio": least / max(best, 1.0),
        }
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write the table and the plot into the room as well")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--redraw", action="store_true", help="the table and the plot of the last run's figures")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    runs, rival_runs = RUNS, RIVAL_RUNS
    if args.quick:
        runs, rival_runs = {"quiet": 20, "change": 10}, dict.fromkeys(RIVAL_RUNS, (1, 2))
    found = json.loads((OUT / "alarms.json").read_text()) if args.redraw else everything(runs, rival_runs)
    OUT.mkdir(parents=True, exist_ok=True)
    table = markdown(found)
    (OUT / "alarms.json").write_text(json.dumps(found, indent=1) + "\n")
    (OUT / "alarms.md").write_text(table)
    plot(found, OUT / "alarms.png")
    if args.docs:
        plot(found, ROOM / "alarms.png")
        (ROOM / "alarms.json").write_text(json.dumps(found, indent=1) + "\n")
        page = ROOM / "README.md"
        page.write_text(
            re.sub(
                r"(?s)(<!-- alarms -->\n).*?(<!-- /alarms -->)",
                lambda m: m[1] + "\n" + table + "\n" + m[2],
                page.read_text(),
            )
        )
    print(json.dumps(figures(found)))


if __name__ == "__main__":
    main()
