"""Drift on planted changes; every formula against another's arithmetic."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from scipy.spatial import distance

from orrery.data import histograms
from orrery.data.histograms import Category, Counts, Numeric
from orrery.errors import DataError
from orrery.evaluation import reference as references
from orrery.evaluation.reference import Reference
from orrery.monitoring import drift
from orrery.monitoring.drift import DriftReport, compare
from orrery.training.schema import Schema

SCHEMA = Schema(
    task="binary", numeric_columns=("a", "b", "same", "rain"), vocabularies={"c": ("u", "v", "w")}, missing=("b",)
)


def rows(n: int, seed: int, **changes: Any) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "key": [f"{seed}-{i}" for i in range(n)],
        "a": rng.normal(size=n),
        "b": pa.array(rng.normal(size=n), mask=rng.random(n) < 0.05),
        "same": np.ones(n),
        "rain": np.where(rng.random(n) < 0.7, 0.0, rng.exponential(size=n)),
        "c": rng.choice(["u", "v", "w"], n, p=[0.6, 0.3, 0.1]),
    }
    return pa.table(columns | changes)


class Desk:
    """A reference of 30,000 rows, and partitions to compare with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0
        self.reference = references.make([self.file(rows(30_000, 0))], SCHEMA, self.predictions(8000, 0), "w")

    @staticmethod
    def predictions(n: int, seed: int) -> Any:
        return np.random.default_rng(seed).beta(2, 5, n).astype(np.float32)

    def file(self, table: pa.Table) -> Path:
        self.made += 1
        path = self.folder / f"{self.made}.parquet"
        pq.write_table(table, path, row_group_size=7000)
        return path

    def compare(self, table: pa.Table, predictions: Any = None) -> DriftReport:
        given = self.predictions(table.num_rows, 99) if predictions is None else predictions
        return compare(self.reference, [self.file(table)], given)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("drift"))


def of(report: DriftReport, name: str) -> drift.Drift:
    return next(d for d in report.features if d.name == name)


@pytest.mark.parametrize("n", [300, 3000, 20_000])
def test_nothing_drifts_when_nothing_has_changed(desk: Desk, n: int) -> None:
    for seed in range(1, 6):
        report = desk.compare(rows(n, seed), desk.predictions(n, seed))
        assert report.drifted == report.stale == []
        assert not report.prediction.drifted
        assert max(d.excess for d in report.features) < 0.1


CHANGES: dict[str, dict[str, Any]] = {
    "a": {"a": np.random.default_rng(5).normal(1, 1, 4000)},
    "b": {"b": pa.nulls(4000, pa.float64())},
    "same": {"same": np.full(4000, 1.0 + 1e-9)},
    "rain": {"rain": np.random.default_rng(5).exponential(size=4000)},
    "c": {"c": np.random.default_rng(5).choice(["u", "new"], 4000, p=[0.7, 0.3])},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_found_and_nothing_else(desk: Desk, name: str) -> None:
    report = desk.compare(rows(4000, 1, **CHANGES[name]))
    assert report.drifted == [name]
    assert report.worst is not None
    assert report.worst.name == name
    assert report.stale == (["b"] if name == "b" else [])
    assert not report.prediction.drifted


def test_what_is_significant_only_because_of_many_rows_is_no_drift(desk: Desk) -> None:
    found = of(desk.compare(rows(100_000, 1, a=np.random.default_rng(5).normal(0.1, 1, 100_000))), "a")
    assert found.p < 1e-9
    assert 0.005 < found.psi < 0.02
    assert not found.drifted


def test_more_missing_values_are_stale_long_before_they_are_drift(desk: Desk) -> None:
    rng = np.random.default_rng(7)
    lost = pa.array(rng.normal(size=4000), mask=rng.random(4000) < 0.12)
    report = desk.compare(rows(4000, 1, b=lost, a=pa.array([math.nan] * 400 + [0.0] * 3600)))
    assert set(report.stale) == {"a", "b"}
    assert report.stale[0] == "a"  # 10 points more, b has 7
    assert of(report, "a").missing == 0.1  # NaN is no value
    assert of(report, "b").missing == pytest.approx(0.12, abs=0.02)
    assert of(report, "b").missing_reference == pytest.approx(0.05, abs=0.01)
    assert "b" not in report.drifted


def test_fewer_missing_values_are_not_stale(desk: Desk) -> None:
    assert desk.compare(rows(4000, 1, b=np.random.default_rng(7).normal(size=4000))).stale == []


def test_an_unseen_value_is_counted_as_such(desk: Desk) -> None:
    found = of(desk.compare(rows(1000, 1, c=["u"] * 900 + ["x"] * 60 + ["y"] * 40)), "c")
    assert (found.unseen, found.unseen_reference) == (0.1, 0.0)


def test_predictions_that_moved(desk: Desk) -> None:
    report = desk.compare(rows(4000, 1), np.random.default_rng(3).beta(3, 4, 4000))
    assert report.drifted == []
    assert report.prediction.drifted
    assert report.prediction.name == "prediction"
    lost = desk.compare(rows(4000, 1), pa.array([None, 0.3] * 2000, pa.float32()))
    assert lost.prediction.missing == 0.5
    assert lost.prediction.stale


def test_an_empty_partition_has_no_figures_and_no_drift(desk: Desk) -> None:
    report = desk.compare(rows(0, 1))
    assert (report.rows, report.predicted) == (0, 0)
    assert report.drifted == report.stale == []
    assert math.isnan(report.prediction.psi)
    told = report.to_dict()
    assert told["features"][0]["psi"] is None
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_it_is_the_partition_that_is_counted_on_the_references_bins(desk: Desk) -> None:
    """PSI on the partition's own deciles is another number: this fails when the two sides change places."""
    now = rows(4000, 1, a=np.random.default_rng(5).normal(0.3, 2, 4000))
    before = rows(30_000, 0)
    deciles = np.quantile(before["a"].to_numpy(), np.arange(1, 10) / 10, method="inverted_cdf")
    shares = [np.bincount(np.searchsorted(deciles, t["a"].to_numpy(), "right")) / t.num_rows for t in (before, now)]
    expected = float(np.sum((shares[1] - shares[0]) * np.log(shares[1] / shares[0])))
    found = of(desk.compare(now), "a")
    assert found.psi == pytest.approx(expected, abs=1e-9)
    swapped = references.make([desk.file(now)], SCHEMA, desk.predictions(10, 0), "w")
    other = of(compare(swapped, [desk.file(before)], desk.predictions(10, 0)), "a")
    assert abs(other.psi - expected) > 0.05
    assert (found.missing, found.missing_reference) == (0, 0)
    with pytest.raises(DataError, match="reference's bins"):
        drift.of_counts(desk.reference.features, swapped.features)


def test_a_model_of_classes_is_compared_by_who_wins_and_how_surely(tmp_path: Path) -> None:
    schema = SCHEMA.model_copy(update={"task": "multiclass", "classes": ("x", "y", "z")})
    desk = Desk(tmp_path)
    rng = np.random.default_rng(0)
    reference = references.make([desk.file(rows(500, 0))], schema, rng.dirichlet([1, 1, 1], 4000), "w")
    file = [desk.file(rows(500, 1))]
    assert Reference.from_dict(json.loads(json.dumps(reference.to_dict()))) == reference
    lists = pa.chunked_array([pa.array([*rng.dirichlet([1, 1, 1], 2000).tolist(), None], pa.list_(pa.float32()))])
    same = compare(reference, file, lists)
    assert {d.name for d in same.predictions} == {"prediction", "confidence"}
    assert not any(d.drifted for d in same.predictions)
    assert same.prediction.missing == pytest.approx(1 / 2001)
    other = compare(reference, file, rng.dirichlet([9, 9, 9], 2000))
    assert (other.prediction.name, other.prediction.drifted) == ("confidence", True)
    tilted = compare(reference, file, rng.dirichlet([3, 1, 0.5], 2000))
    assert {d.name for d in tilted.predictions if d.drifted} >= {"prediction"}
    with pytest.raises(DataError, match="3 classes"):
        compare(reference, file, rng.random(2000))
    with pytest.raises(DataError, match="lists of 3"):
        compare(reference, file, pa.array([[0.5, 0.5]], pa.list_(pa.float32())))


def test_a_feature_that_is_gone_is_an_error(desk: Desk) -> None:
    with pytest.raises(DataError, match="no column b"):
        desk.compare(rows(10, 1).drop_columns("b"))


def test_a_file_that_is_no_reference_is_refused(tmp_path: Path, desk: Desk) -> None:
    file = tmp_path / "reference.json"
    for text in ("{", "{}", "[]", '{"window": "w", "features": 1, "predictions": 2, "classes": []}'):
        file.write_text(text)
        with pytest.raises(DataError, match="not"):
            drift.read(file)
    file.write_text(json.dumps(desk.reference.to_dict()))
    assert drift.read(file) == desk.reference


# -- formulas ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_psi_and_jensen_shannon_are_evidentlys_and_scipys_on_the_same_bins(seed: int) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pandas as pd
        from evidently.legacy.calculations.stattests.psi import _psi
        from evidently.legacy.core import ColumnType

    rng = np.random.default_rng(seed)
    before, now = rng.normal(size=20_000), rng.normal(0.2 * seed, 1 + seed / 3, 9000)
    theirs, _ = _psi(pd.Series(before), pd.Series(now), ColumnType.Numerical, 0.1)
    edges = np.histogram_bin_edges(np.concatenate([before, now]), bins="sturges")
    bins = {"x": Numeric(tuple(edges[1:-1].tolist()))}  # nothing lies beyond the outer ones
    p, q = (histograms.count(pa.table({"x": side}), bins).of("x") for side in (before, now))
    assert drift.psi(p, q, empty=None) == pytest.approx(theirs, abs=1e-9)
    assert drift.jensen_shannon(p, q) == pytest.approx(distance.jensenshannon(p, q, base=2), abs=1e-12)
    texts = [pd.Series(rng.choice(["u", "v", "w"], 5000, p=share)) for share in ([0.5, 0.3, 0.2], [0.2, 0.8, 0.0])]
    theirs, _ = _psi(texts[0], texts[1], ColumnType.Categorical, 0.1)
    known = {"c": Category(("u", "v", "w"))}
    p, q = (histograms.count(pa.table({"c": side.to_list()}), known).of("c") for side in texts)
    assert drift.psi(p, q, empty=None) == pytest.approx(theirs, abs=1e-9)
    assert drift.psi(p, q) == pytest.approx(theirs, abs=1e-9)  # no share below 0.0001: the rules are the same


def test_chi_square_is_scipys() -> None:
    p, q = np.array([50, 30, 0, 20]), np.array([20, 40, 0, 10])
    assert drift.chi_square(p, q) == pytest.approx(stats.chi2_contingency(np.stack([p, q])[:, [0, 1, 3]]).pvalue)
    assert drift.chi_square(np.array([5, 0]), np.array([9, 0])) == 1.0
    assert drift.chi_square(np.array([0, 0]), np.array([9, 1])) == 1.0


def test_the_correction_is_scipys() -> None:
    p = [0.001, 0.2, 0.03, 0.03, 0.8, 0.0]
    assert drift.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))
    assert drift.benjamini_hochberg([]) == []


def test_psi_without_any_change_is_about_its_noise() -> None:
    rng, share = np.random.default_rng(0), np.full(11, 1 / 11)
    draws = [(rng.multinomial(30_000, share), rng.multinomial(1000, share)) for _ in range(300)]
    mean = np.mean([drift.psi(p, q) for p, q in draws])
    assert mean == pytest.approx(drift.psi_noise(*draws[0]), rel=0.1)


def test_extremes_of_the_distances() -> None:
    apart = (np.array([10, 0]), np.array([0, 10]))
    assert drift.jensen_shannon(*apart) == 1.0
    assert drift.psi(*apart) == pytest.approx(2 * (1 - 1e-4) * math.log(1e4))
    same = np.array([3, 7, 0])
    assert drift.psi(same, same) == drift.jensen_shannon(same, same) == 0.0


def test_sparse_bins_are_put_together_unless_they_grow() -> None:
    before = np.array([900, 40, 30, 30, 0, 0])
    p, q = drift.pooled(before, np.array([90, 4, 3, 3, 0, 0]))
    assert (p.tolist(), q.tolist()) == ([900, 0, 0, 100], [90, 0, 0, 10])
    p, q = drift.pooled(before, np.array([80, 4, 3, 3, 10, 0]))
    assert (p.tolist(), q.tolist()) == ([900, 0, 0, 100], [80, 10, 0, 10])


def test_many_values_in_a_small_partition_are_no_drift() -> None:
    rng, values = np.random.default_rng(0), tuple(f"v{i:04d}" for i in range(2000))
    bins = {"c": Category(values)}

    def drawn(n: int) -> Counts:
        return histograms.count(pa.table({"c": rng.choice(values, n)}), bins)

    found = drift.of_counts(drawn(50_000), drawn(1000))[0]
    assert not found.drifted
    assert abs(found.excess) < 0.05
