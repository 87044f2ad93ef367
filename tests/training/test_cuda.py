"""On a machine with a GPU: the strategies on CUDA and NCCL, interrupted, to the same weights. `make test-gpu`.

One GPU is enough, so each strategy has one process here; several processes are tested on CPUs (test_interrupted).
"""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from interruptions import Training, group_kill
from training_bench import trips

from orrery.training import Dataset, feed
from orrery.training.batches import InMemory
from orrery.training.place import Place
from orrery.training.schema import Schema

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="`make test-gpu`, on a machine with a GPU")
ROWS, STEPS = 4000, 31 * 6
STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return trips(ROWS).append_column("row", pa.array(np.arange(ROWS, dtype=np.float64)))


def spec(strategy: str, more: str = "") -> str:
    return f"{{strategy: {strategy}, patience: 99, checkpoint: {{every: 20}}{more}}}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_interrupted_on_a_gpu_the_weights_are_the_same(
    tmp_path: Path, table: pa.Table, strategy: str, precision: str
) -> None:
    train = spec(strategy, f", precision: {precision}")
    plain = Training(tmp_path / "plain", table, train).finish()
    assert plain.result.facts["device"] == torch.cuda.get_device_name(0)
    broken = Training(tmp_path / "broken", table, train)
    for kind, at in ((signal.SIGTERM, 50), (signal.SIGKILL, 120)):
        process = broken.start()
        assert broken.when(process, lambda at=at: broken.steps() > at), broken.text()  # type: ignore[misc]
        group_kill(process, kind)
        assert process.wait(60) == (143 if kind == signal.SIGTERM else -9), broken.text()
    run = broken.finish()
    assert "goes on from step" in broken.text()
    assert run.result.digest == plain.result.digest
    assert run.result.metrics == plain.result.metrics


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["kept there", "fed by a thread"])
def test_the_batches_on_a_gpu_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(feed, "SHARE", share)
    n = np.arange(1000)
    numeric, categorical = np.stack([n, n * 0.5], axis=1).astype(np.float32), np.stack([n % 4, n % 2], axis=1)
    schema = Schema(task="binary", numeric_columns=("row", "half"), vocabularies={"a": ("x", "y", "z"), "b": ("x",)})
    data = Dataset(numeric, categorical, n.astype(np.float32), schema)
    here = InMemory(data, 7, 128, Place(1, 2))
    there = feed.on_device(here, torch.device("cuda", 0))
    for of in (lambda part: part.batches(3, 2), lambda part: part.chunks(), lambda part: part.whole()):
        ours, theirs = list(of(here)), list(of(there))
        assert len(ours) == len(theirs) > 0
        assert all(t.is_cuda for batch in theirs for t in batch)
        pairs = [pair for x, y in zip(ours, theirs, strict=True) for pair in zip(x, y, strict=True)]
        assert all(torch.equal(a, b.cpu()) for a, b in pairs)
    next(batches := there.batches(0))
    batches.close()  # a training that is told to stop leaves an epoch in the middle


def test_compiled_it_learns_the_same(tmp_path: Path, table: pa.Table) -> None:
    plain = Training(tmp_path / "plain", table, spec("single")).finish()
    compiled = Training(tmp_path / "compiled", table, spec("single", ", compile: true")).finish(timeout=300)
    assert compiled.result.metrics["tune_loss"] == pytest.approx(plain.result.metrics["tune_loss"], abs=1e-3)


def too_many(root: Path, table: pa.Table) -> tuple[Training, int]:
    processes = torch.cuda.device_count() + 1
    return Training(root, table, f"{{processes: {processes}, strategy: ddp}}"), processes


def test_too_few_gpus_that_are_paid_for_are_said(
    tmp_path: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, processes = too_many(tmp_path, table)
    monkeypatch.setenv("ORRERY_GPUS", "1")
    process = training.start(processes=processes, overrides={"batch_size": 128 * processes})
    assert process.wait(120) == 64, training.text()
    error = training.result().error
    assert error is not None and "train.processes" in error.hint
    assert f"{processes} processes" in error.message and f"{processes - 1} GPU" in error.message


def test_with_fewer_gpus_than_processes_a_laptop_trains_on_its_cpu(tmp_path: Path, table: pa.Table) -> None:
    training, processes = too_many(tmp_path, table)
    run = training.finish(processes=processes, overrides={"batch_size": 128 * processes})
    assert run.result.facts["device"] == "CPU"
    assert "trains on the CPU" in training.text()
