"""A training that is interrupted, by SIGTERM and SIGKILL, at any moment: the same weights, each row once per epoch."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from training_bench import Bench, Run, trips

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
ROWS, EVERY = 8000, 60


@pytest.fixture(scope="module")
def table() -> pa.Table:
    rows = trips(ROWS)
    return rows.append_column("row", pa.array(np.arange(ROWS, dtype=np.float64)))


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

    def finish(self, **params: Any) -> Run:
        process = self.start(**params)
        assert process.wait(120) == 0, self.text()
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


STRATEGIES = {
    "single": f"{{patience: 99, checkpoint: {{every: {EVERY}}}}}",
    "ddp": f"{{processes: 2, strategy: ddp, patience: 99, checkpoint: {{every: {EVERY}}}}}",
    "fsdp": f"{{processes: 2, strategy: fsdp, patience: 99, checkpoint: {{every: {EVERY}}}}}",
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_interrupted_anywhere_the_weights_are_the_same(tmp_path: Path, table: pa.Table, strategy: str) -> None:
    ranks = 1 if strategy == "single" else 2
    wanted = Training(tmp_path / "plain", table, STRATEGIES[strategy])
    plain = wanted.finish(processes=ranks)
    steps = plain.result.facts["steps"]
    broken = Training(tmp_path / "broken", table, STRATEGIES[strategy])
    moments = random.Random(f"interrupted {strategy}")
    kinds = [signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, "inside a save", signal.SIGTERM]
    came, hits = 0, 0
    for i, kind in enumerate(kinds):
        before, process = broken.steps(), broken.start(processes=ranks)
        if kind == "inside a save":
            assert broken.when(process, lambda: unfinished(broken.checkpoints)), "it ended without a save"
            group_kill(process, signal.SIGKILL)
        else:
            more = ranks * steps / (len(kinds) + 1) * moments.uniform(0.5, 1.3)
            assert broken.when(process, lambda n=before + more: broken.steps() >= n), broken.text()  # type: ignore[misc]
            group_kill(process, int(kind))
        code = process.wait(30)
        hits += 1
        if kind == signal.SIGTERM:
            assert code == 143, broken.text()
            result = broken.result()
            assert result.status == "interrupted" and result.error is not None
            details = result.error.details
            assert details["committed"] == details["step"] > details["resumed"] >= came, result
            came = details["committed"]
            assert f"saved up to step {came:,}" in result.error.message
        assert i == 0 or "goes on from step" in broken.text()
    run = broken.finish(processes=ranks)
    assert hits == len(kinds) and run.result.facts["steps"] == steps
    assert {n: p.read_bytes() for n, p in run.files.items()} == {n: p.read_bytes() for n, p in plain.files.items()}
    assert run.result.digest == plain.result.digest
    assert run.result.metrics == plain.result.metrics
    assert not broken.checkpoints.exists()  # they were for going on, and there is nothing to go on with
    assert broken.rows_by_step(ranks) == wanted.rows_by_step(ranks)
    each_row_once(broken, ranks, plain)


def each_row_once(training: Training, ranks: int, run: Run) -> None:
    by_step, rows = training.rows_by_step(ranks), run.result.facts["rows"]["fit"]
    per_epoch = rows // 128
    assert sorted(by_step) == list(range(1, len(by_step) + 1))
    for epoch in range(len(by_step) // per_epoch):
        seen = [r for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1) for r in by_step[step]]
        assert len(seen) == len(set(seen)) == per_epoch * 128 > rows - 128


def unfinished(folder: Path) -> bool:
    """Tell whether a checkpoint is being written: files without a document."""
    try:
        names = [p.name for p in folder.iterdir()]
    except FileNotFoundError:
        return False
    return any(f"{n}.json" not in names for n in names if not n.endswith(".json") and not n.startswith("."))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_one_dead_or_hung_rank_brings_the_other_down(tmp_path: Path, table: pa.Table, how: str) -> None:
    training = Training(tmp_path, table, STRATEGIES["ddp"].replace("every: 60", "every: 20"))
    process = training.start(processes=2, overrides={"epochs": 500})
    assert training.when(process, lambda: training.steps() > 1500), training.text()
    ranks = beats(process.pid)
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    code = process.wait(60)
    seconds = time.monotonic() - began
    assert code == 1 and seconds < (15 if how == "killed" else 40), (code, seconds, training.text())
    result = training.result()
    assert result.error is not None and result.error.kind == "RankLost", result
    assert ("training process 1 ended with signal SIGKILL" if how == "killed" else "has hung") in result.error.message
    assert "goes on from the newest checkpoint" in result.error.hint
    assert training.progress().committed > 0
    process = training.start(processes=2, overrides={"epochs": 500})
    assert training.when(process, lambda: "goes on from step" in training.text())
    group_kill(process, signal.SIGTERM)
    assert process.wait(30) == 143


def beats(pid: int) -> list[int]:
    """The processes of a training's ranks, by the signs of life in the step's scratch folder."""
    import tempfile

    found = []
    for folder in Path(tempfile.gettempdir()).glob("orrery-*"):
        for path in sorted(folder.glob("beat-*")):
            while not (text := path.read_text()):  # it is being written
                time.sleep(0.01)
            rank = int(text.split()[0])
            if Path(f"/proc/{rank}").exists() and os.getpgid(rank) == pid:
                found.append(rank)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_zero_goes_on_to_the_same_losses(tmp_path: Path, table: pa.Table, stage: int) -> None:
    train = f"{{processes: 2, strategy: zero{stage}, patience: 99, checkpoint: {{every: {EVERY}}}}}"
    alone = Training(tmp_path / "alone", table, "{patience: 99}").finish(overrides={"dropout": 0.0, "epochs": 5})
    broken = Training(tmp_path / "broken", table, train)
    for number in (signal.SIGTERM, signal.SIGKILL):
        before, process = broken.steps(), broken.start(processes=2, overrides={"dropout": 0.0, "epochs": 5})
        assert broken.when(process, lambda n=before + 180: broken.steps() >= n), broken.text()  # type: ignore[misc]
        group_kill(process, number)
        assert process.wait(30) in (143, -9), broken.text()
    run = broken.finish(processes=2, overrides={"dropout": 0.0, "epochs": 5})
    assert "goes on from step" in broken.text() and run.result.facts["steps"] > 200
    for loss in ("fit_loss", "tune_loss"):
        assert run.result.metrics[loss] == pytest.approx(alone.result.metrics[loss], abs=1e-5)


@pytest.mark.slow
def test_a_world_that_shrinks_and_grows_comes_to_the_same_losses(tmp_path: Path, table: pa.Table) -> None:
    train = f"{{processes: 2, strategy: ddp, patience: 99, checkpoint: {{every: {EVERY}}}}}"
    wanted = Training(tmp_path / "plain", table, train)
    plain = wanted.finish(processes=2, overrides={"dropout": 0.0, "epochs": 5})
    assert plain.result.facts["steps"] > 200
    changing = Training(tmp_path / "changing", table, train)
    for i, processes in enumerate((2, 1)):
        before, process = changing.steps(), changing.start(processes=processes, overrides={"dropout": 0.0, "epochs": 5})
        more = processes * 80
        assert changing.when(process, lambda n=before + more: changing.steps() >= n), changing.text()  # type: ignore[misc]
        group_kill(process, signal.SIGTERM)
        assert process.wait(30) == 143, changing.text()
        assert i == 0 or "goes on from step" in changing.text()
    run = changing.finish(processes=2, overrides={"dropout": 0.0, "epochs": 5})
    assert "goes on from step" in changing.text()
    assert run.result.metrics["tune_loss"] == pytest.approx(plain.result.metrics["tune_loss"], abs=1e-5)
    assert run.result.metrics["fit_loss"] == pytest.approx(plain.result.metrics["fit_loss"], abs=1e-5)


def test_microbatches_are_the_same_steps(tmp_path: Path, table: pa.Table) -> None:
    """Two processes, passes of 16 rows, and one process at once: one global batch."""
    losses = []
    for name, processes, train in (("at_once", 1, "{}"), ("in_passes", 2, "{processes: 2, microbatch: 16, clip: 1e6}")):
        training = Training(tmp_path / name, table.slice(0, 2000), train)
        run = training.finish(processes=processes, overrides={"dropout": 0.0, "epochs": 2})
        losses.append(run.result.metrics["tune_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_bf16_and_clipping_train(tmp_path: Path, table: pa.Table) -> None:
    training = Training(tmp_path, table, "{precision: bf16, clip: 0.5}")
    run = training.finish(overrides={"epochs": 3})
    assert 0 < run.result.metrics["tune_loss"] < 0.55
    assert json.loads(run.files["params.json"].read_text())["epochs"] == 3
