import math

import numpy as np
import pytest

from orrery.evaluation import bootstrap, metrics, quantiles


def planted(n: int = 600, lift: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, a better and a worse score, ties in both."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(float)
    signal = y + rng.normal(size=n)
    return y, np.round(signal, 1), np.round(signal + rng.normal(size=n) / lift, 1)


def compare(y: np.ndarray, a: np.ndarray, b: np.ndarray, *, draws: int = 300, seed: int = 0) -> bootstrap.Difference:
    others = {"b": bootstrap.auc_statistic(y, b)}
    return bootstrap.differences(
        bootstrap.auc_statistic(y, a), others, len(y), higher_is_better=True, draws=draws, seed=seed
    )["b"]


def test_the_weighted_auc_is_the_auc_of_the_drawn_rows() -> None:
    y, a, _ = planted()
    drawn = np.random.default_rng(5).integers(0, len(y), len(y))
    counts = np.bincount(drawn, minlength=len(y)).astype(float)[None, :]
    assert bootstrap.auc_statistic(y, a)(counts)[0] == pytest.approx(metrics.auc(y[drawn], a[drawn]), abs=1e-12)
    untied = a + np.arange(len(a)) * 1e-9
    assert bootstrap.auc_statistic(y, untied)(counts)[0] == pytest.approx(
        metrics.auc(y[drawn], untied[drawn]), abs=1e-6
    )


def test_the_weighted_losses_are_those_of_the_drawn_rows() -> None:
    rng = np.random.default_rng(5)
    y, p = rng.normal(size=100), rng.normal(size=100)
    drawn = rng.integers(0, 100, 100)
    counts = np.bincount(drawn, minlength=100).astype(float)[None, :]
    found = bootstrap.primary_statistic("regression", y, p)(counts)[0]
    assert found == pytest.approx(metrics.rmse(y[drawn], p[drawn]))
    classes, shares = rng.integers(0, 3, 100), rng.dirichlet(np.ones(3), 100)
    found = bootstrap.primary_statistic("multiclass", classes, shares)(counts)[0]
    assert found == pytest.approx(metrics.multiclass_log_loss(classes[drawn], shares[drawn]))


def test_a_better_model_is_better_and_swapped_it_is_worse() -> None:
    y, a, b = planted()
    there, back = compare(y, a, b), compare(y, b, a)
    assert there.low > 0
    assert there.share_better == 1.0
    assert (back.delta, back.low, back.high) == pytest.approx((-there.delta, -there.high, -there.low))


def test_lower_is_better_turns_the_sign() -> None:
    small, large = bootstrap.mean_statistic(np.full(50, 0.1)), bootstrap.mean_statistic(np.full(50, 0.3))
    found = bootstrap.differences(small, {"x": large}, 50, higher_is_better=False, draws=20, seed=0)["x"]
    assert found.delta == pytest.approx(0.2)
    assert found.low > 0


def test_the_same_predictions_tie_exactly() -> None:
    y, a, _ = planted()
    found = compare(y, a, a)
    assert (found.delta, found.low, found.high, found.share_better) == (0, 0, 0, 0)


def test_the_seed_decides_and_the_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    y, a, b = planted()
    before = compare(y, a, b)
    assert compare(y, a, b) == before
    assert compare(y, a, b, seed=1) != before
    monkeypatch.setattr(bootstrap, "CHUNK_CELLS", 7 * len(y))
    chunked = compare(y, a, b)
    assert (chunked.low, chunked.high) == pytest.approx((before.low, before.high), abs=1e-12)


def test_draws_without_both_classes_are_left_out_and_counted() -> None:
    y = np.array([1.0, 0, 0, 0, 0, 0])
    found = compare(y, np.arange(6.0)[::-1], np.arange(6.0))
    assert 0 < found.draws < 300
    assert math.isfinite(found.low)


def test_one_class_only_gives_no_interval() -> None:
    found = compare(np.ones(10), np.arange(10.0), np.arange(10.0))
    assert found.draws == 0
    assert math.isnan(found.low)


def test_huge_holdouts_take_fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "MAX_CELLS", 1000)
    y, a, b = planted()
    assert compare(y, a, b, draws=1000).draws == bootstrap.MIN_DRAWS["row"]
    # Days are as few as ever: with fewer draws their extremes would depend on the seed.
    assert by_days(14, 50, 1.0, seed=0, draws=1000).draws == 1000


# -- whole days --------------------------------------------------------------------------------------

DAY = bootstrap.DAY_US


def two_models(days: int, per_day: int, shared: float, seed: int, gain: float = 0.0) -> tuple[np.ndarray, ...]:
    """Moments [N] and the losses of two models whose difference has a part `shared` by all rows of one day."""
    rng = np.random.default_rng(seed)
    n = days * per_day
    day = np.repeat(np.arange(days), per_day)
    other = rng.random(n) + 1
    mine = other + shared * rng.normal(size=days)[day] + rng.normal(size=n) - gain
    return day * DAY + rng.integers(0, DAY, n), mine, other


def by_days(days: int, per_day: int, shared: float, seed: int, gain: float = 0.0, *, whole: bool = True,
            draws: int = 400) -> bootstrap.Difference:  # fmt: skip
    moments, mine, other = two_models(days, per_day, shared, seed, gain)
    by = bootstrap.units(moments) if whole else bootstrap.Units("row", len(moments))
    assert by.by == ("day" if whole else "row")
    a, b = bootstrap.mean_statistic(mine), bootstrap.mean_statistic(other)
    return bootstrap.differences(a, {"b": b}, len(mine), higher_is_better=False, draws=draws, seed=seed, by=by)["b"]


def width(found: bootstrap.Difference) -> float:
    return found.high - found.low


def test_days_are_utc_days_and_fewer_than_ten_of_them_leave_rows() -> None:
    ten = np.arange(10) * DAY
    found = bootstrap.units(np.concatenate([ten, ten + DAY - 1]))
    assert (found.by, found.count) == ("day", 10)
    assert found.of is not None and found.of.tolist() == [*range(10), *range(10)]
    assert bootstrap.units(np.concatenate([ten[:9], ten[:9] + DAY - 1])) == bootstrap.Units("row", 18)


def test_a_draw_takes_days_whole() -> None:
    by = bootstrap.units(np.repeat(np.arange(12), 5) * DAY)
    (counts,) = bootstrap._counts(np.random.default_rng(0), 60, by, 30)
    assert (counts.reshape(30, 12, 5) == counts.reshape(30, 12, 5)[:, :, :1]).all()
    assert (counts.sum(axis=1) == 60).all()


def test_where_days_share_nothing_the_interval_is_about_the_rows() -> None:
    ratios = [width(by_days(40, 25, 0.0, s)) / width(by_days(40, 25, 0.0, s, whole=False)) for s in range(10)]
    assert 0.85 < np.mean(ratios) < 1.15


def test_where_days_share_a_cause_the_interval_is_wider() -> None:
    """25 rows a day and a shared part as large as the rows' own: sqrt(1 + 25) / sqrt(2) times as wide."""
    ratios = [width(by_days(40, 25, 1.0, s)) / width(by_days(40, 25, 1.0, s, whole=False)) for s in range(10)]
    assert 2.8 < np.mean(ratios) < 4.4


def test_draws_of_days_of_unequal_size_keep_the_metric_a_mean() -> None:
    moments = np.repeat(np.arange(12), np.arange(1, 13)) * DAY
    losses = bootstrap.mean_statistic(np.full(len(moments), 2.0))
    other = bootstrap.mean_statistic(np.full(len(moments), 3.0))
    by = bootstrap.units(moments)
    found = bootstrap.differences(losses, {"b": other}, len(moments), higher_is_better=False, draws=50, seed=0, by=by)[
        "b"
    ]
    assert (found.low, found.high) == pytest.approx((1.0, 1.0))


def test_the_seed_decides_days_too() -> None:
    assert by_days(14, 20, 0.5, 3) == by_days(14, 20, 0.5, 3)


def test_two_equal_models_seldom_beat_each_other_on_days_that_differ() -> None:
    """The gate asks for low > 0, 2.5 % by chance. 15 of 300 is 5 %; drawing rows says so far more often."""
    worlds = range(300)
    wrong = sum(by_days(14, 10, 1.0, s, draws=200).low > 0 for s in worlds)
    by_rows = sum(by_days(14, 10, 1.0, s, whole=False, draws=100).low > 0 for s in worlds)
    assert wrong <= 15
    assert by_rows > 45


def test_a_better_model_is_still_seen_on_days_that_differ() -> None:
    assert sum(by_days(14, 10, 0.3, s, gain=0.6).low > 0 for s in range(30)) >= 27


@pytest.mark.parametrize(("freedom", "exact"), [(9, 2.26216), (13, 2.16037), (30, 2.04227), (1000, 1.96234)])
def test_the_quantile_is_students(freedom: int, exact: float) -> None:
    assert quantiles.student_quantile(0.975, freedom) == pytest.approx(exact, rel=2e-4)


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    """60 samples of one world: a 95 % interval that covered fewer than 50 of them would be wrong (p < 1e-3)."""
    covered = 0
    truth = np.mean([_auc_difference(20_000, s) for s in (1001, 1002)])
    for seed in range(60):
        y, a, b = planted(n=400, seed=seed)
        found = compare(y, a, b, draws=200, seed=seed)
        covered += found.low <= truth <= found.high
    assert covered >= 50


def _auc_difference(n: int, seed: int) -> float:
    y, a, b = planted(n=n, seed=seed)
    return metrics.auc(y, a) - metrics.auc(y, b)
