"""What the processes of a training are given: both parts as the split and the schema say, and the fit part's statistics."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from training_bench import TORCH_MODEL, Bench, bench, trips

from orrery.step import Work
from orrery.training import dataset
from orrery.training.place import Place
from orrery.training.prepare import Prepared, prepared
from orrery.training.split import split


def work(made: Bench, name: str = "prepare", sample: float = 1.0) -> Work:
    scratch = made.root / f"scratch-{name}"
    scratch.mkdir()
    return Work(made.config(name, sample=sample), made.store, scratch)


@pytest.mark.parametrize("task", ["binary", "regression", "multiclass"])
def test_both_parts_are_those_of_the_split(tmp_path: Path, task: str) -> None:
    made = bench(tmp_path, task=task, rows=600)
    step = work(made)
    found: Prepared = pickle.loads(pickle.dumps(prepared(step)))
    parts = split(dataset.read(step), step.spec.split, step.spec.task)
    assert (found.bounds, found.rows) == (parts.bounds, parts.counts)
    for name, table in (("fit", parts.fit), ("tune", parts.tune)):
        wanted, got = dataset.encoded(table, found.schema), found.dataset(name)
        np.testing.assert_array_equal(got.numeric, wanted.numeric)
        np.testing.assert_array_equal(got.categorical, wanted.categorical)
        np.testing.assert_array_equal(got.label, wanted.label)
        head = found.head(name, 7)
        np.testing.assert_array_equal(head.numeric, wanted.numeric[:7])
        assert head.rows == 7 and found.head(name, 10**9).rows == wanted.rows
        assert found.part(name, 0, 64, Place()).rows == wanted.rows
    fit = dataset.encoded(parts.fit, found.schema)
    exact = fit.numeric.astype(np.float64)
    assert (found.fit_rows, found.tune_rows) == (fit.rows, parts.tune.num_rows)
    np.testing.assert_allclose(found.mean, np.nanmean(exact, axis=0), rtol=1e-9)
    np.testing.assert_allclose(found.std, np.nanstd(exact, axis=0), rtol=1e-9)
    wanted_label = (fit.label.mean(), fit.label.std()) if task == "regression" else (0.0, 1.0)
    assert (found.label_mean, found.label_std) == pytest.approx(wanted_label, rel=1e-5)


def test_a_feature_without_a_value_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Bench(tmp_path)
    made.write_project(TORCH_MODEL)
    table = trips(300)
    made.commit("2013-01", table.append_column("empty", pa.nulls(table.num_rows)))
    assert "empty" not in prepared(work(made)).schema.columns
    assert "feature empty has no value" in "".join(capsys.readouterr())
