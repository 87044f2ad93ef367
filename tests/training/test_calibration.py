"""Calibration recovers what distorted the scores."""

from __future__ import annotations

import numpy as np
import pytest

from orrery.training.calibration import platt, sigmoid, softmax, temperature


def test_platt_undoes_scale_and_shift() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, 40_000)
    labels = (rng.random(40_000) < sigmoid(true)).astype(float)
    a, b = platt((true + 0.7) * 3, labels)
    assert a == pytest.approx(1 / 3, rel=0.03)
    assert b == pytest.approx(-0.7, abs=0.05)


def test_platt_is_the_optimum_of_the_smoothed_likelihood() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=300), (rng.random(300) < 0.3).astype(float)
    a, b = platt(2 * x + y, y)
    positive = y.sum()
    target = np.where(y > 0, (positive + 1) / (positive + 2), 1 / (300 - positive + 2))
    error = sigmoid(a * (2 * x + y) + b) - target
    assert abs(error.sum()) < 1e-5 and abs((error * (2 * x + y)).sum()) < 1e-5


def test_platt_never_turns_the_order_around_and_survives_a_perfect_split() -> None:
    x = np.linspace(-3, 3, 200)
    a, b = platt(x, (x < 0).astype(float))
    assert a == 1.0 and abs(b) < 0.1
    a, b = platt(x, (x > 0).astype(float))
    assert 1 < a < 1e4 and np.isfinite(b)


def test_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(2)
    true = rng.normal(0, 1.5, (30_000, 4))
    labels = (softmax(true).cumsum(axis=1) > rng.random((30_000, 1))).argmax(axis=1)
    assert temperature(5 * true, labels) == pytest.approx(0.2, rel=0.03)
    assert temperature(true / 5, labels) == pytest.approx(5, rel=0.03)
