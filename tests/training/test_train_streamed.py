"""The whole verb on a window that counts as too large for memory (the limit is lowered): a candidate like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_bench import Bench, Run, bench, trips

from orrery.training import dataset, prepare, shards, signature, stream
from orrery.training.schema import Schema

LIBRARY = """
import numpy as np
from orrery.training import baseline

class Line:
    def __init__(self, data):
        self.data = data
    def to_onnx(self):
        return baseline.fit(self.data)

def fit(train, valid, params):
    assert isinstance(train.numeric, np.memmap) and train.rows > 10 * valid.rows / 3
    return Line(train)
"""


def scored(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    later = dataset.encoded(trips(3000, seed=9, month=3), Schema.model_validate(run.json("schema.json")))
    return signature.predict(run.files[name].read_bytes(), later, name), later.label


def auc(score: np.ndarray, label: np.ndarray) -> float:
    rank = score.argsort().argsort() + 1
    n = (label > 0).sum()
    return float((rank[label > 0].sum() - n * (n + 1) / 2) / (n * (label <= 0).sum()))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(prepare, "STREAM_ABOVE", 100_000)
    monkeypatch.setattr(shards, "MIN_GROUP", 200)
    monkeypatch.setattr(shards, "GROUP_BYTES", 4096)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 40_000)
    return bench(tmp_path, rows=8000)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_streamed_training_is_a_candidate(made: Bench, processes: int) -> None:
    run = made.train("large", processes=processes)
    assert set(run.files) == {
        "model.onnx", "baseline.onnx", "weights.safetensors", "schema.json", "params.json", "split.json"
    }  # fmt: skip
    assert auc(*scored(run, "model.onnx")) > 0.85
    assert auc(*scored(run, "baseline.onnx")) > 0.8
    assert 0 < run.result.facts["baseline_rows"] < run.result.facts["rows"]["fit"]
    again = made.train("again", processes=processes)
    assert again.result.digest == run.result.digest


def test_a_library_is_given_all_rows_mapped(made: Bench) -> None:
    made.write_project(LIBRARY)
    run = made.train("library")
    assert auc(*scored(run, "model.onnx")) > 0.8
    assert run.result.metrics["fit_loss"] < 0.6
