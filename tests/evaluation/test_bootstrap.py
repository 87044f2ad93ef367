import math

import numpy as np
import pytest

from orrery.evaluation import bootstrap, metrics


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
    assert compare(y, a, b, draws=1000).draws == bootstrap.MIN_DRAWS


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
