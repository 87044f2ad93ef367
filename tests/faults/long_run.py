"""Trains once unharmed and once killed at random moments, and prints what both left. Run in the environment `ml`.

python tests/faults/long_run.py FOLDER KILLS
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from interruptions import Training, group_kill
from training_bench import trips

from orrery import effort
from orrery.attempts import Attempt, cause
from orrery.contract import Result
from orrery.errors import OrreryError
from orrery.training.checkpoints import Checkpoints

# Large enough that a step takes some 10 ms: what a busy machine adds is small beside it.
MODEL = """
import torch
from pydantic import BaseModel
from torch import nn

class Params(BaseModel):
    epochs: int = 6
    batch_size: int = 2048
    learning_rate: float = 0.0005

class Net(nn.Module):
    def __init__(self, schema):
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(n, 4) for n in schema.categorical.values())
        wide = schema.numeric_width + 4 * len(schema.categorical)
        self.layers = nn.Sequential(nn.Linear(wide, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, numeric, categorical):
        parts = [embed(categorical[:, i]) for i, embed in enumerate(self.embed)]
        return self.layers(torch.cat([numeric, *parts], dim=1)).squeeze(1)

def build(schema, params):
    return Net(schema)
"""
SPEC = "{patience: 1000, checkpoint: {every: 1s}}"
# Seconds between two kills, on average, after the first step. The first steps of a process are a tenth slower, so where
# goodput is held against the uninterrupted median, attempts are as long as to be mostly warm.
ALIVE_S, LONG_S, LONG = 1.2, 4.0, 50


def attempt(training: Training, began: float, seconds: float) -> Attempt:
    """What the orchestrator would record of the attempt that has just ended."""
    try:
        result: Result | None = training.result()
    except FileNotFoundError:
        result = None
    try:
        progress = training.progress()
    except FileNotFoundError:
        progress = None
    return Attempt(
        cause="lost" if result is None else cause(result),
        started=datetime.fromtimestamp(began, UTC).isoformat(),
        wall_s=seconds,
        committed=progress.committed if progress else 0,
        resumed=progress.resumed if progress else 0,
        progress=progress,
    )


def main(folder: Path, kills: int) -> None:
    long = kills >= LONG
    alive = LONG_S if long else ALIVE_S
    table, epochs = trips(40_000), max(12, (20 if long else 10) * kills)
    plain = Training(folder / "plain", table, SPEC, MODEL)
    wanted = plain.finish(1200, overrides={"epochs": epochs})
    reference = plain.progress()
    moments, broken = random.Random(kills), Training(folder / "broken", table, SPEC, MODEL)
    found: list[Attempt] = []
    damaged = 0
    hits = 0
    while True:
        began, process = time.time(), broken.start(overrides={"epochs": epochs})
        if hits < kills and broken.when(process, lambda: (broken.folder / "progress.json").exists()):
            time.sleep(moments.uniform(0, 2 * alive))
            if process.poll() is None:
                group_kill(process, moments.choice([signal.SIGKILL, signal.SIGTERM]))
                hits += 1
        code = process.wait(600)
        found.append(attempt(broken, began, time.time() - began))
        damaged += "is damaged" in broken.text()
        if code == 0:
            break
        try:
            Checkpoints(broken.bench.store, "trips/train/same/checkpoints").newest_good(folder)
        except OrreryError:
            damaged += 1
    run = broken.bench._read(broken.result())
    kept = effort.kept(found)
    parts = [effort.parts(a, n) for a, n in zip(found, kept, strict=True)]
    wall = sum(p.wall for p in parts)
    # Counted apart from `effort`: an attempt's steps are kept up to where the next one went on.
    useful, until = 0.0, run.result.facts["steps"]
    for each in reversed(found):
        if each.progress:
            useful += (until - each.progress.resumed) * each.progress.step_s
            until = each.progress.resumed
    told = {
        "counted": useful / sum(a.wall_s for a in found),
        "kills": hits,
        "attempts": len(found),
        "damaged": damaged,
        "steps": run.result.facts["steps"],
        "kept": sum(kept),
        "same": run.result.digest == wanted.result.digest,
        "reported": sum(p.useful for p in parts) / wall,
        "expected": run.result.facts["steps"] * reference.step_s / wall,
        "step_ms": 1000 * reference.step_s,
        "wall_s": wall,
        "lost_s": sum(p.lost for p in parts),
        "starting_s": sum(p.startup for p in parts),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
