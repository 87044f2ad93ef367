import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import SPEC
from sklearn import metrics as sk

from orrery.errors import SpecError
from orrery.evaluation import metrics
from orrery.spec import EXPORT_METRICS, METRICS, TASK_METRICS, load_model


def some(n: int = 500, decimals: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    y = (rng.random(n) < 0.3).astype(float)
    p = np.clip(0.3 * y + 0.6 * rng.random(n), 0.001, 0.999)
    return y, p if decimals is None else np.round(p, decimals)


@pytest.mark.parametrize("decimals", [None, 2, 1])
def test_binary_metrics_equal_sklearn(decimals: int | None) -> None:
    y, p = some(decimals=decimals)
    found = metrics.all_metrics("binary", y, p)
    assert found["auc"] == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(y, p), abs=1e-12)
    assert found["log_loss"] == pytest.approx(sk.log_loss(y, np.clip(p, 1e-7, 1 - 1e-7)), abs=1e-6)
    assert found["brier"] == pytest.approx(sk.brier_score_loss(y, p), abs=1e-12)
    assert found["accuracy"] == sk.accuracy_score(y, p >= 0.5)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_auc_is_the_share_of_pairs_in_order_with_ties_as_half(pairs: list[tuple[bool, int]]) -> None:
    y, p = np.array([float(a) for a, _ in pairs]), np.array([float(b) for _, b in pairs])
    wins = [(a > b) + 0.5 * (a == b) for a in p[y > 0] for b in p[y == 0]]
    assert metrics.auc(y, p) == pytest.approx(np.mean(wins)) if wins else math.isnan(metrics.auc(y, p))


def test_regression_metrics_equal_sklearn() -> None:
    rng = np.random.default_rng(3)
    y, p = rng.normal(size=200), rng.normal(size=200)
    found = metrics.all_metrics("regression", y, p)
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(y, p))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(y, p))
    assert found["r2"] == pytest.approx(sk.r2_score(y, p))


def test_multiclass_metrics_equal_sklearn() -> None:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(4), size=300)
    y = rng.integers(0, 4, 300)
    found = metrics.all_metrics("multiclass", y, p)
    assert found["log_loss"] == pytest.approx(sk.log_loss(y, p, labels=range(4)), abs=1e-5)
    assert found["accuracy"] == sk.accuracy_score(y, p.argmax(axis=1))


def test_the_curves_equal_sklearns() -> None:
    y, p = some(decimals=2)
    fpr, tpr = metrics.roc(y, p)
    theirs = sk.roc_curve(y, p, drop_intermediate=False)
    np.testing.assert_allclose(fpr, theirs[0])
    np.testing.assert_allclose(tpr, theirs[1])
    precision, recall = metrics.precision_recall(y, p)
    their_precision, their_recall, _ = sk.precision_recall_curve(y, p)
    np.testing.assert_allclose(precision, their_precision[:-1][::-1])
    np.testing.assert_allclose(recall, their_recall[:-1][::-1])


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_leaves_ranking_undefined_and_the_rest_defined(label: float) -> None:
    found = metrics.all_metrics("binary", np.full(10, label), np.linspace(0.1, 0.9, 10))
    assert math.isnan(found["auc"])
    assert math.isnan(found["average_precision"]) == (label == 0)
    assert all(math.isfinite(found[m]) for m in ("log_loss", "brier", "calibration_error", "accuracy"))


def test_constant_labels_leave_r2_undefined() -> None:
    assert math.isnan(metrics.r2(np.ones(5), np.zeros(5)))


def test_calibration_error_of_a_calibrated_and_of_a_shifted_model() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(60_000) * 0.8
    y = (rng.random(60_000) < p).astype(float)
    assert metrics.calibration_error(y, p) < 0.01
    assert metrics.calibration_error(y, p + 0.2) == pytest.approx(0.2, abs=0.01)


def test_calibration_error_does_not_depend_on_the_order_of_tied_rows() -> None:
    y, p = some(decimals=1)
    order = np.random.default_rng(1).permutation(len(y))
    assert metrics.calibration_error(y, p) == pytest.approx(metrics.calibration_error(y[order], p[order]), abs=1e-15)
    counts, _, _ = metrics.calibration(y, p)
    assert counts.sum() == len(y)


def test_certain_and_wrong_costs_a_lot_but_not_infinity() -> None:
    assert metrics.log_loss(np.array([1.0]), np.array([0.0])) == pytest.approx(-math.log(metrics.EPSILON))


def test_a_spec_may_bound_exactly_what_is_measured() -> None:
    assert {task: set(found) for task, found in metrics.METRICS_OF.items()} == {
        task: set(names) for task, names in TASK_METRICS.items()
    }
    assert {*EXPORT_METRICS, *(n for names in TASK_METRICS.values() for n in names)} == set(METRICS)


@pytest.mark.parametrize("task", sorted(TASK_METRICS))
@pytest.mark.parametrize("metric", sorted(METRICS))
def test_a_bound_on_another_tasks_metric_is_refused_by_the_spec(tmp_path: Path, task: str, metric: str) -> None:
    """Else it is checked, never measured, and every candidate is kept for ever."""
    (tmp_path / "spec.yaml").write_text(SPEC.format(task=task, gate=f"\n  {metric}: {{min: 0.5}}"))
    if metric in (*TASK_METRICS[task], *EXPORT_METRICS):
        assert list(load_model(tmp_path).bounds) == [metric]
        return
    with pytest.raises(SpecError) as e:
        load_model(tmp_path)
    assert f"spec.yaml:9: gate.{metric}: a {task} task has no {metric!r}; " in e.value.message
    assert all(name in e.value.message for name in (*TASK_METRICS[task], "p99_ms", "disparity"))
