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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use")
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


def test_compiled_it_learns_the_same(tmp_path: Path, table: pa.Table) -> None:
    plain = Training(tmp_path / "plain", table, spec("single")).finish()
    compiled = Training(tmp_path / "compiled", table, spec("single", ", compile: true")).finish(timeout=300)
    assert compiled.result.metrics["tune_loss"] == pytest.approx(plain.result.metrics["tune_loss"], abs=1e-3)


def test_more_processes_than_gpus_is_said(tmp_path: Path, table: pa.Table) -> None:
    processes = torch.cuda.device_count() + 1
    training = Training(tmp_path, table, f"{{processes: {processes}, strategy: ddp}}")
    process = training.start(processes=processes, overrides={"batch_size": 128 * processes})
    assert process.wait(120) == 64, training.text()
    error = training.result().error
    assert error is not None and "train.processes" in error.hint
    assert f"{processes} processes" in error.message and f"{processes - 1} GPU" in error.message
