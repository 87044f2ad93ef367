"""Scores into probabilities, on the tune part: Platt scaling (binary) and temperature (multiclass). Pure numpy."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
MAX_STEPS = 100
TOLERANCE = 1e-10


def platt(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.floating]) -> tuple[float, float]:
    """Return (a, b) such that sigmoid(a * logit + b) is calibrated: logits [N], labels 0/1 [N].

    Maximum likelihood with Platt's smoothed targets, by Newton's method with halved steps (Platt 1999; Lin, Lin
    and Weng 2007). A slope that is not above 0 would turn the model's order around: then the slope stays 1.
    """
    x, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    positive = float(y.sum())
    negative = len(y) - positive
    target = np.where(y > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    design = np.stack([x, np.ones_like(x)], axis=1)
    a, b = _newton(design, target, np.array([1.0, 0.0]), np.zeros_like(x))
    if a <= 0:
        (b,) = _newton(design[:, 1:], target, np.array([0.0]), x)
        return 1.0, float(b)
    return float(a), float(b)


def _newton(design: Floats, target: Floats, weights: Floats, offset: Floats) -> Floats:
    """Minimise the cross-entropy of sigmoid(design @ weights + offset) against `target` in [0, 1]."""
    loss = _cross_entropy(design @ weights + offset, target)
    for _ in range(MAX_STEPS):
        p = sigmoid(design @ weights + offset)
        gradient = design.T @ (p - target)
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-12 * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-10:
            moved = weights - size * step
            new = _cross_entropy(design @ moved + offset, target)
            if new <= loss:
                break
            size /= 2
        else:
            return weights
        done = loss - new < TOLERANCE * max(1.0, abs(loss))
        weights, loss = moved, new
        if done:
            break
    return weights


def temperature(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]) -> float:
    """Return the factor b (1/T) such that softmax(b * logits) is calibrated: logits [N, C], labels [N].

    The likelihood is concave in b (Guo et al. 2017): Newton's method, b kept within [0.01, 100].
    """
    x = np.asarray(logits, np.float64)
    b = 1.0
    for _ in range(MAX_STEPS):
        p = softmax(b * x)
        mean = (p * x).sum(axis=1)
        slope = float((mean - x[np.arange(len(x)), labels]).sum())
        curve = float(((p * x * x).sum(axis=1) - mean**2).sum())
        if curve <= 0:
            break
        # A step of more than half of b overshoots where the curve is flat.
        new = float(np.clip(b - np.clip(slope / curve, -b / 2, b / 2), 0.01, 100.0))
        if abs(new - b) < 1e-9:
            return new
        b = new
    return b


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + e), e / (1 + e)))


def softmax(x: Floats) -> Floats:
    """Return the softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _cross_entropy(z: Floats, target: Floats) -> float:
    return float((np.logaddexp(0.0, z) - target * z).sum())
