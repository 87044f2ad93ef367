"""A training that is interrupted, by SIGTERM and SIGKILL, at any moment: the same weights, each row once per epoch."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from interruptions import Training, group_kill, unfinished
from training_bench import Run, trips

ROWS, EVERY = 8000, 60


@pytest.fixture(scope="module")
def table() -> pa.Table:
    rows = trips(ROWS)
    return rows.append_column("row", pa.array(np.arange(ROWS, dtype=np.float64)))


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
        left = [p.name for p in broken.checkpoints.glob("*")]
        before, process = broken.steps(), broken.start(processes=ranks)
        if kind == "inside a save":
            found = broken.when(process, lambda but=left: unfinished(broken.checkpoints, but))  # type: ignore[misc]
            assert found, "it ended without a save"
            group_kill(process, signal.SIGKILL)
        else:
            more = ranks * steps / (len(kinds) + 1) * moments.uniform(0.5, 1.3)
            assert broken.when(process, lambda n=before + more: broken.steps() >= n), broken.text()  # type: ignore[misc]
            group_kill(process, int(kind))
            if kind == signal.SIGTERM:  # its worker tells it, then the kernel, because that one has died
                time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_one_dead_or_hung_rank_brings_the_other_down(tmp_path: Path, table: pa.Table, how: str) -> None:
    training = Training(tmp_path, table, STRATEGIES["ddp"].replace("every: 60", "every: 20"))
    process = training.start(processes=2, overrides={"epochs": 500})
    assert training.when(process, lambda: training.steps() > 1500), training.text()
    while len(ranks := beats(process.pid)) < 2:
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    code = process.wait(150)
    seconds = time.monotonic() - began
    assert code == 1 and seconds < (60 if how == "killed" else 120), (code, seconds, training.text())
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
            text = path.read_text()
            if not text:  # it is being written, or was when its process was killed
                continue
            rank = int(text.split()[0])
            if Path(f"/proc/{rank}").exists() and os.getpgid(rank) == pid:
                found.append(rank)
    return found


@pytest.mark.slow
def test_ranks_whose_step_was_killed_save_and_end(tmp_path: Path, table: pa.Table) -> None:
    training = Training(tmp_path, table, STRATEGIES["ddp"].replace("every: 60", "every: 1000000"))
    process = training.start(processes=2, overrides={"epochs": 500})
    assert training.when(process, lambda: training.steps() > 300), training.text()
    while len(ranks := beats(process.pid)) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < end, training.text()
        time.sleep(0.05)
    assert training.progress().committed >= 150
    assert "told to stop: saved" in training.text()


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
