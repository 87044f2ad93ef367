"""A training as the engine runs it, in a process that is killed as often as it takes; and a model that tells its rows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
from training_bench import Bench, Run

from orrery.contract import Result, StepConfig
from orrery.goodput import Progress

# Tells which rows it was given at which of its steps. The number of the step is a buffer: part of the weights, so it
# is restored with them, and a step that is done again has the number of the one that was lost.
MODEL = """
import os
import torch
from pydantic import BaseModel
from torch import nn

class Params(BaseModel):
    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 0.01
    dropout: float = 0.2

class Net(nn.Module):
    def __init__(self, schema, params):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.embed = nn.ModuleList(nn.Embedding(n, 4) for n in schema.categorical.values())
        wide = schema.numeric_width + 4 * len(schema.categorical)
        self.layers = nn.Sequential(nn.Linear(wide, 32), nn.ReLU(), nn.Dropout(params.dropout), nn.Linear(32, 1))
        self.row = list(schema.numeric_columns).index("row")

    def forward(self, numeric, categorical):
        if self.training:
            self.tell(numeric[:, self.row])
        parts = [embed(categorical[:, i]) for i, embed in enumerate(self.embed)]
        return self.layers(torch.cat([numeric, *parts], dim=1)).squeeze(1)

    @torch.compiler.disable
    def tell(self, rows):
        if len(rows) != 32:  # the trial step before the training
            self.count += 1
            line = f"{int(self.count)} " + ",".join(f"{r:.7g}" for r in rows.tolist()) + chr(10)
            with open(os.environ["SEEN"], "a") as f:
                f.write(line)

def build(schema, params):
    return Net(schema, params)
"""


class Training:
    """One training as the engine runs it, in a process that can be killed, as often as it takes."""

    def __init__(self, root: Path, table: pa.Table, train: str, model: str = MODEL) -> None:
        self.bench = Bench(root)
        self.bench.write_project(model)
        spec = root / "project" / "spec.yaml"
        spec.write_text(spec.read_text() + f"train: {train}\n")
        self.bench.pack()
        self.bench.commit("2013-01", table)
        self.seen = root / "seen.txt"
        self.attempts = 0

    def start(self, **params: Any) -> subprocess.Popen[bytes]:
        self.attempts += 1
        config = self.bench.config("same", **params)
        config = config.model_copy(
            update={"attempt": self.attempts, "folder": f"trips/runs/test/train/{self.attempts}"}
        )
        self.config: StepConfig = config
        self.bench.store.put(f"{config.folder}/config.json", config.model_dump_json().encode())
        where = f"{self.bench.store.uri}/{config.folder}"
        code = "import sys, time; from orrery.step import main; sys.exit(main(sys.argv[1:], time.time()))"
        argv = [sys.executable, "-c", code, "--config", f"{where}/config.json", "--result", f"{where}/result.json"]
        env = {**os.environ, "SEEN": str(self.seen)}
        self.log = self.bench.root / f"log-{self.attempts}.txt"
        with self.log.open("wb") as log:
            return subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)

    def text(self) -> str:
        return self.log.read_text()

    def result(self) -> Result:
        return Result.model_validate_json(self.bench.store.read(f"{self.config.folder}/result.json"))

    def progress(self) -> Progress:
        return Progress.model_validate_json(self.bench.store.read(f"{self.config.folder}/progress.json"))

    @property
    def folder(self) -> Path:
        """Of the attempt."""
        return Path(self.bench.store.full(self.config.folder))

    @property
    def checkpoints(self) -> Path:
        return Path(self.bench.store.full("trips/train/same/checkpoints"))

    def steps(self) -> int:
        """How many lines have been told: steps of all ranks and attempts together."""
        return len(self.seen.read_text().splitlines()) if self.seen.exists() else 0

    def when(self, process: subprocess.Popen[bytes], seen: Callable[[], bool]) -> bool:
        """Wait for a moment of a running training; False when it has ended before."""
        while not seen():
            if process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def finish(self, timeout: float = 300, **params: Any) -> Run:
        process = self.start(**params)
        assert process.wait(timeout) == 0, self.text()
        return self.bench._read(self.result())

    def rows_by_step(self, ranks: int) -> dict[int, list[float]]:
        """What each step was given, over the ranks; done twice, it must be the same both times."""
        told: dict[int, set[str]] = {}
        for line in self.seen.read_text().splitlines():
            step, rows = line.split()
            told.setdefault(int(step), set()).add(rows)
        assert all(len(parts) == ranks for parts in told.values()), {k: len(v) for k, v in told.items()}
        return {step: [float(r) for part in sorted(parts) for r in part.split(",")] for step, parts in told.items()}


def group_kill(process: subprocess.Popen[bytes], number: int) -> None:
    os.killpg(process.pid, number)


def unfinished(folder: Path, but: Collection[str] = ()) -> bool:
    """Tell whether a checkpoint is being written: files without a document, `but` those that a killed save left."""
    try:
        names = [p.name for p in folder.iterdir()]
    except FileNotFoundError:
        return False
    new = [n for n in names if n not in but and not n.endswith(".json") and not n.startswith(".")]
    return any(f"{n}.json" not in names for n in new)
