"""Closed forms against the textbook, the bootstrap, and what clustered rows do to both."""

import json
from pathlib import Path

import numpy as np
import pytest
from planted import House, linear, rows

from orrery.evaluation import bootstrap, certainty, metrics
from orrery.evaluation.bootstrap import Units

DAY = bootstrap.DAY_US


def sample(n: int, seed: int = 0, days: int = 30, shared: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and moments; `shared` moves the positives' scores of a whole day together."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.3).astype(float)
    day = np.sort(rng.integers(0, days, n))
    p = y * (0.9 + shared * rng.normal(size=days)[day]) + rng.normal(size=n)
    return y, 1 / (1 + np.exp(-p)), day * DAY


def by_row(n: int) -> Units:
    return Units("row", n)


def test_placement_values_by_hand() -> None:
    """Five positives, five negatives: DeLong's variance is S10/m + S01/n of the shares of pairs won."""
    positives, negatives = np.array([0.9, 0.8, 0.55, 0.4, 0.3]), np.array([0.7, 0.5, 0.4, 0.2, 0.1])
    y, p = np.repeat([1.0, 0.0], 5), np.concatenate([positives, negatives])
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    expected = np.var(wins.mean(axis=1), ddof=1) / 5 + np.var(wins.mean(axis=0), ddof=1) / 5
    found = certainty.of_auc(y, p, by_row(10))
    assert found is not None
    assert found.value == pytest.approx(wins.mean()) == pytest.approx(metrics.auc(y, p))
    assert found.se**2 == pytest.approx(expected)
    assert (found.freedom, found.units, found.rows) == (4, "10 rows", 10)


def test_obuchowski_by_hand() -> None:
    """Her sums over clusters, spelled out with loops."""
    y, p, moments = sample(400, days=12)
    found = certainty.of_auc(y, p, bootstrap.units(moments))
    assert found is not None
    place = moments // DAY
    x, z, a = p[y > 0], p[y == 0], found.value
    win = np.array([np.mean((v > z) + 0.5 * (v == z)) for v in x])
    lost = np.array([np.mean((x > v) + 0.5 * (x == v)) for v in z])
    in_x, in_z = place[y > 0], place[y == 0]
    tens = np.array([np.sum(win[in_x == k] - a) for k in range(12)])
    ones = np.array([np.sum(lost[in_z == k] - a) for k in range(12)])
    m, n, i = len(x), len(z), 12
    s10, s01 = i / ((i - 1) * m) * np.sum(tens**2), i / ((i - 1) * n) * np.sum(ones**2)
    s11 = i / (i - 1) * np.sum(tens * ones)
    assert found.se**2 == pytest.approx(s10 / m + s01 / n + 2 * s11 / (m * n))
    assert found.freedom == 11 and found.units == "12 days"


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_auc_agrees_with_the_bootstrap(shared: float) -> None:
    y, p, moments = sample(3000, seed=2, shared=shared)
    units = bootstrap.units(moments)
    statistic = bootstrap.auc_statistic(y, p)
    draws = np.concatenate([statistic(c) for c in bootstrap._counts(np.random.default_rng(0), len(y), units, 2000)])
    found = certainty.of_auc(y, p, units)
    rowwise = certainty.of_auc(y, p, by_row(len(y)))
    assert found is not None and rowwise is not None
    assert found.se == pytest.approx(draws.std(), rel=0.08)
    if shared:
        assert found.se > 1.7 * rowwise.se  # what rows drawn as if independent would hide


@pytest.mark.parametrize("root", [False, True])
def test_means_agree_with_the_bootstrap(root: bool) -> None:
    rng = np.random.default_rng(5)
    day = np.sort(rng.integers(0, 40, 2000))
    losses = (rng.normal(size=2000) * (1 + 0.8 * rng.random(40)[day])) ** 2
    units = bootstrap.units(day * DAY)
    statistic = bootstrap.mean_statistic(losses, root)
    draws = np.concatenate([statistic(c) for c in bootstrap._counts(np.random.default_rng(0), 2000, units, 2000)])
    found = certainty.of_mean(losses, units, root)
    assert found is not None
    assert found.value == pytest.approx(np.sqrt(losses.mean()) if root else losses.mean())
    assert found.se == pytest.approx(draws.std(), rel=0.08)


def test_a_mean_over_rows_has_the_textbook_error() -> None:
    losses = np.random.default_rng(1).random(50)
    found = certainty.of_mean(losses, by_row(50))
    assert found is not None
    assert found.se == pytest.approx(losses.std(ddof=1) / 50**0.5)
    low, high = found.interval
    assert high - losses.mean() == pytest.approx(2.0096 * found.se, rel=1e-3)  # Student, 49 degrees of freedom
    assert low + high == pytest.approx(2 * losses.mean())


def test_the_interval_covers_the_truth() -> None:
    """95 % of intervals hold the true AUC, days sharing a cause; those of rows as if independent hold far fewer."""
    truth = metrics.auc(*sample(400_000, seed=99, days=20_000, shared=0.6)[:2])
    days, single = 0, 0
    for seed in range(200):
        y, p, moments = sample(1500, seed=seed, shared=0.6)
        for units, of_days in ((bootstrap.units(moments), True), (by_row(len(y)), False)):
            found = certainty.of_auc(y, p, units)
            assert found is not None
            low, high = found.interval
            days, single = days + (of_days and low < truth < high), single + (not of_days and low < truth < high)
    assert 0.90 <= days / 200 <= 0.99
    assert single / 200 < 0.88


@pytest.mark.parametrize("y", [np.zeros(20), np.ones(20), np.array([1.0] + [0.0] * 19)])
def test_what_is_not_defined_is_none(y: np.ndarray) -> None:
    """One class only, or a single row of one: there is no error to tell."""
    assert certainty.of_auc(y, np.linspace(0, 1, 20), by_row(20)) is None


def test_few_or_no_rows_are_none_and_equal_losses_have_no_error() -> None:
    assert certainty.of_mean(np.array([]), by_row(0)) is None
    assert certainty.of_mean(np.array([1.0, 2.0, 3.0, 4.0]), by_row(4)) is None
    found = certainty.of_mean(np.zeros(9), by_row(9), root=True)
    assert found is not None and (found.value, found.se) == (0.0, 0.0)


def test_each_task_has_its_primary_metric() -> None:
    rng = np.random.default_rng(3)
    y, p = rng.integers(0, 3, 60), rng.dirichlet([1, 1, 1], 60)
    multiclass = certainty.of_primary("multiclass", y, p, by_row(60))
    regression = certainty.of_primary("regression", y.astype(float), p[:, 0], by_row(60))
    assert multiclass is not None and multiclass.value == pytest.approx(metrics.multiclass_log_loss(y, p))
    assert regression is not None and regression.value == pytest.approx(metrics.rmse(y.astype(float), p[:, 0]))


def test_a_million_rows_are_no_burden() -> None:
    """All pairs of so many rows would take 160 billion comparisons."""
    y, p, moments = sample(1_000_000)
    found = certainty.of_auc(y, p, bootstrap.units(moments))
    assert found is not None and found.value == pytest.approx(metrics.auc(y, p))


def test_rows_counted_together_are_the_same_rows() -> None:
    y, p, moments = sample(2000, days=12)
    p = np.round(p, 1)
    cells = np.unique(np.stack([moments, y, p]), axis=1, return_counts=True)
    (at, labels, scores), counts = cells
    for units, merged in (
        (bootstrap.units(moments), bootstrap.units(at.astype(np.int64))),
        (by_row(2000), by_row(2000)),
    ):
        single, together = certainty.of_auc(y, p, units), certainty.of_auc(labels, scores, merged, counts.astype(float))
        assert single is not None and together is not None
        assert together.value == pytest.approx(single.value) and together.se == pytest.approx(single.se)
        assert (together.freedom, together.rows) == (single.freedom, single.rows)


def test_slices_keep_whole_days_and_those_of_too_few_are_left_out() -> None:
    """A weekday of a month is four days: counted as rows its error would look small."""
    y, p, moments = sample(6000, days=28, shared=1.0)
    units, day = bootstrap.units(moments), moments // DAY
    weekdays, halves = [str(d) for d in range(7)], ["first", "second"]
    assert certainty.of_slices("binary", weekdays, day % 7, y, p, units) == {}
    found = certainty.of_slices("binary", halves, (day >= 14).astype(int), y, p, units)
    first = day < 14
    assert set(found) == set(halves) and found["first"].units == "14 days"
    assert found["first"] == certainty.of_auc(y[first], p[first], bootstrap.units(moments[first]))
    by_rows = certainty.of_slices("binary", weekdays, day % 7, y, p, by_row(6000))
    assert set(by_rows) == set(weekdays)


def test_evaluate_writes_the_promise_of_candidate_and_champion(tmp_path: Path) -> None:
    house = House(tmp_path)
    features = house.features(rows())
    good = house.candidate(linear({"a": 1.0, "b": 1.0}, categories=["c"]), [features])
    poor = house.candidate(linear({"a": 1.0}, categories=["c"]), [features], "c0", key="2012-12..2012-12")
    _, _, alone = house.evaluate(good, [features])
    assert set(alone["promise"]) == {"candidate"}
    _, _, report = house.evaluate(good, [features], poor, address="e2")
    for name in ("candidate", "champion"):
        promise = report["promise"][name]
        assert promise["metric"] == "auc" and promise["units"] == "43 days" and promise["rows"] == 2000
        assert promise["value"] == pytest.approx(report["metrics"][name]["auc"])
        assert promise["low"] < promise["value"] < promise["high"]
        assert promise["high"] - promise["value"] == pytest.approx(2.018 * promise["se"], rel=1e-3)
        assert set(promise["slices"]["c"]) == {"u", "v", "w"}
    assert report["promise"]["candidate"]["value"] > report["promise"]["champion"]["value"]
    by_slice = {e["value"]: e["auc"] for e in report["slices"]["c"]}
    assert report["promise"]["candidate"]["slices"]["c"]["v"]["value"] == pytest.approx(by_slice["v"])
    json.dumps(report, allow_nan=False)


def test_no_promise_where_the_holdout_has_one_class(tmp_path: Path) -> None:
    house = House(tmp_path)
    columns = rows()
    columns["label"] = np.zeros_like(columns["label"])
    features = house.features(columns)
    _, _, report = house.evaluate(house.candidate(linear({"a": 1.0}), [features]), [features])
    assert report["promise"] == {"candidate": None}
