"""AUC by month of every arm of the replay, as table and picture (run in the `ml` environment).

python include/demo/months.py PLAN.json OUT

PLAN.json: {"store": folder of the features, "months": [...], "seeds": {"0": {"store": folder of the models,
"frozen"|"blind"|"gated": {month: manifest of the model}}}, "scores": {month: manifest}, "marks": [[month, text]]}
Writes OUT/replay.json, OUT/replay.md and OUT/replay.png.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orrery.data import tables
from orrery.evaluation import exported
from orrery.evaluation.metrics import auc
from orrery.store import Manifest, Store

PROJECT = "flight_delay"
ARMS = {"frozen": "frozen: the first model, never replaced", "blind": "blind: each month's new model, unasked",
        "gated": "gated: replaced when the gate says so"}  # fmt: skip
COLOURS = {"frozen": "#7a869a", "blind": "#d9822b", "gated": "#1a6fd4"}


class House:
    """Features and models of one store folder."""

    def __init__(self, folder: str, scratch: Path) -> None:
        self.store, self.scratch = Store(f"file://{folder}"), scratch

    def open(self, manifest: Manifest, name: str) -> Path:
        """Return a local path of one file of an output."""
        return self.store.local(manifest.uri(name), self.scratch)

    def manifest(self, path: str) -> Manifest:
        """Return a manifest that must be there."""
        found = self.store.manifest(path)
        assert found is not None, path
        return found


def measure(plan: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Return the AUC of each arm, seed and month, and how far Airflow's own scores are from those of its models."""
    source = House(plan["store"], scratch)

    @cache
    def rows(month: str) -> tuple[pa.Table, Any]:
        found = source.store.latest_manifest(PROJECT, "features", month)
        assert found is not None, month
        table = tables.read_parquet(source.open(found, "features.parquet"))
        known = table.filter(pc.is_valid(table["label"]))
        return known, np.asarray(known["label"].to_numpy(), dtype=np.float64)

    @cache
    def one(folder: str, model: str, month: str) -> float:
        house = House(folder, scratch)
        table, label = rows(month)
        return auc(label, exported.load(house.open, house.manifest(model), model).predict(table))

    found: dict[str, dict[str, dict[str, float]]] = {arm: {} for arm in ARMS}
    for seed, arms in plan["seeds"].items():
        for arm in ARMS:
            found[arm][seed] = {month: one(arms["store"], model, month) for month, model in arms[arm].items()}
    served = {month: _served(source, path, *rows(month)) for month, path in plan["scores"].items()}
    return {"auc": found, "served": served}


def _served(house: House, path: str, table: pa.Table, label: Any) -> float:
    """Return the AUC of the scores that Airflow's Spark step wrote for a month."""
    manifest = house.manifest(path)
    parts = [tables.read_parquet(house.open(manifest, name)) for name in manifest.files if name.endswith(".parquet")]
    scores = pa.concat_tables(part.select(["key", "prediction"]) for part in parts)
    place = pc.index_in(table["key"], scores["key"])
    return auc(label, np.asarray(scores["prediction"].take(place).to_numpy(), dtype=np.float64))


def means(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Return each arm's mean over months and seeds."""
    return {arm: float(np.mean([list(by.values()) for by in seeds.values()])) for arm, seeds in found.items()}


def table(months: Iterable[str], found: dict[str, Any], marks: dict[str, str]) -> str:
    """Return the Markdown table: the mean over seeds by month, and what was decided at the month's end."""
    lines = ["| month | frozen | blind | gated | decided when its labels were in |", "|---|---|---|---|---|"]
    for month in months:
        cells = [f"{np.mean([found[arm][seed][month] for seed in found[arm]]):.4f}" for arm in ARMS]
        lines.append(f"| {month} | {' | '.join(cells)} | {marks.get(month, '')} |")
    overall = means(found)
    lines.append(f"| **mean** | {' | '.join(f'**{overall[arm]:.4f}**' for arm in ARMS)} | |")
    return "\n".join(lines) + "\n"


def draw(months: list[str], found: dict[str, Any], marks: dict[str, str], target: Path) -> None:
    """Draw the arms: a line for the mean over seeds, a band from the lowest to the highest seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 4.6), dpi=150, layout="constrained")
    at = np.arange(len(months))
    overall = means(found)
    for arm, words in ARMS.items():
        values = np.array([[by[m] for m in months] for by in found[arm].values()])
        axis.fill_between(at, values.min(axis=0), values.max(axis=0), color=COLOURS[arm], alpha=0.15, lw=0)
        label = f"{words} (mean {overall[arm]:.4f})"
        style: dict[str, Any] = {"ls": "--", "zorder": 3} if arm == "frozen" else {}  # seen where gated is the same
        axis.plot(at, values.mean(axis=0), color=COLOURS[arm], lw=2.2, marker="o", ms=4, label=label, **style)
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.12 * (high - low), high + 0.02 * (high - low))
    for place, month in enumerate(months):
        promoted = marks.get(month, "").startswith("promoted")
        text, colour = ("▲ promoted", COLOURS["gated"]) if promoted else ("kept", "#7a869a")
        axis.annotate(text, (place, axis.get_ylim()[0]), xytext=(0, 5), textcoords="offset points", ha="center",
                      fontsize=7.5, color=colour)  # fmt: skip
    axis.set_xticks(at, months, fontsize=8)
    axis.set_ylabel("AUC on the month's flights")
    seeds = len(found["gated"])
    axis.set_title("Flights of 2013 through the loop, month by month", loc="left", fontsize=11)
    axis.set_xlabel(
        f"mean and range of {seeds} seeds; below, what Airflow's gate decided at the month's end", fontsize=8
    )
    axis.grid(axis="y", color="#e3e6ea", lw=0.8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(target, metadata={"Software": None})


def main(plan_file: str, out: str) -> None:
    """Measure, and write what people look at."""
    plan = json.loads(Path(plan_file).read_text())
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(plan, Path(scratch))
    result["mean"] = means(result["auc"])
    marks = dict(plan["marks"])
    (folder / "replay.md").write_text(table(plan["months"], result["auc"], marks))
    draw(plan["months"], result["auc"], marks, folder / "replay.png")
    (folder / "replay.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
