"""What the processes of a training are given: both parts as the split and the schema say, and the fit part's statistics."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from training_bench import TORCH_MODEL, Bench, bench, trips

from orrery.errors import DataError
from orrery.step import Work
from orrery.training import Dataset, dataset, prepare
from orrery.training import schema as schema_room
from orrery.training.place import Place
from orrery.training.prepare import Prepared, prepared
from orrery.training.split import split


def work(made: Bench, name: str = "prepare", sample: float = 1.0) -> Work:
    scratch = made.root / f"scratch-{name}"
    scratch.mkdir()
    return Work(made.config(name, sample=sample), made.store, scratch)


def same(found: Dataset, wanted: Dataset) -> None:
    for name in ("numeric", "categorical", "label"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        assert getattr(found, name).dtype == getattr(wanted, name).dtype


@pytest.mark.parametrize("task", ["binary", "regression", "multiclass"])
def test_both_parts_are_those_of_the_split(tmp_path: Path, task: str) -> None:
    made = bench(tmp_path, task=task, rows=600)
    step = work(made)
    found: Prepared = pickle.loads(pickle.dumps(prepared(step)))
    parts = split(dataset.read(step), step.spec.split, step.spec.task)
    assert (found.bounds, found.rows) == (parts.bounds, parts.counts)
    for name, table in (("fit", parts.fit), ("tune", parts.tune)):
        wanted = dataset.encoded(table, found.schema)
        same(found.dataset(name), wanted)
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


@pytest.mark.parametrize("task", ["binary", "regression", "multiclass"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_window_prepared_by_pieces_is_the_same(
    tmp_path: Path, task: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(tmp_path, task=task, rows=3000)
    # Another type in one month, and one without any value: the pieces are all of the common type.
    odd = trips(900, month=3, kind=task)
    odd = odd.set_column(odd.column_names.index("distance"), "distance", pc.round(odd["distance"]).cast(pa.int64()))
    odd = odd.set_column(odd.column_names.index("weather__wind"), "weather__wind", pa.nulls(900))
    made.commit("2013-03", odd)
    whole = prepared(work(made, "whole", share))
    monkeypatch.setattr(prepare, "STREAM_ABOVE", 1)
    monkeypatch.setattr(dataset, "PIECE_BYTES", 1)
    found: Prepared = pickle.loads(pickle.dumps(prepared(work(made, "pieces", share), 2)))
    assert found.streamed and not whole.streamed
    assert (found.schema, found.bounds, found.rows) == (whole.schema, whole.bounds, whole.rows)
    assert (found.fit_rows, found.tune_rows) == (whole.fit_rows, whole.tune_rows)
    assert found.rows["purged"] > 0
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-9)
    np.testing.assert_allclose(found.std, whole.std, rtol=1e-9)
    assert (found.label_mean, found.label_std) == pytest.approx((whole.label_mean, whole.label_std), rel=1e-9)
    for name in ("fit", "tune"):
        same(found.dataset(name), whole.dataset(name))
        same(found.head(name, 33), whole.head(name, 33))
        labels = torch.cat([b.label for b in found.part(name, 0, 64, Place(), 2).whole()])
        np.testing.assert_array_equal(labels.numpy(), whole.dataset(name).label)
    few = found.sample("fit")
    assert 0 < few.rows < whole.fit_rows


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("label", [None], "none of the window's 300 rows has a label"),
        ("label", [1], "every label of the window is 1"),
        ("label", [2.0, 1.0], "a binary label is 0 or 1"),
        ("label_time", [None], "the fit part has no rows"),
        ("distance", [1.0, float("inf")], "infinite values in distance"),
        ("distance", [[1.0]], "feature distance is list"),
        ("carrier", [f"c{i // 10}" for i in range(300)], "carrier has 22 categories; at most 15"),
        ("carrier", [f"c{i}" for i in range(300)], "carrier has more than 100 different values"),
    ],
)
@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_what_cannot_be_trained_on_is_refused_either_way(
    tmp_path: Path, column: str, values: list[object], says: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "STREAM_ABOVE", limit)
    monkeypatch.setattr(schema_room, "MAX_CATEGORIES", 15)
    monkeypatch.setattr(schema_room, "MAX_VALUES", 100)
    made = Bench(tmp_path)
    made.write_project(TORCH_MODEL)
    table = trips(300)
    given = (values * 300)[:300]
    kind = table[column].type if values == [None] else None
    made.commit("2013-01", table.set_column(table.column_names.index(column), column, pa.array(given, kind)))
    with pytest.raises(DataError, match=says):
        prepared(work(made))


def test_a_feature_without_a_value_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Bench(tmp_path)
    made.write_project(TORCH_MODEL)
    table = trips(300)
    made.commit("2013-01", table.append_column("empty", pa.nulls(table.num_rows)))
    assert "empty" not in prepared(work(made)).schema.columns
    assert "feature empty has no value" in "".join(capsys.readouterr())
