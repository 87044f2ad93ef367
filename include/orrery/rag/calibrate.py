"""Fits when to abstain, and measures it on questions that the fit has not seen. scikit-learn.

Cross-fitted: the questions are dealt into folds, as many answerable ones in each; a fold's questions are judged by
weights and a threshold that were fitted on the others alone, the threshold on predictions that were themselves made
out of fold. The threshold abstains as often as it can while at most `WRONG` of the answerable questions of the
training folds are lost. All is repeated with other deals; what is reported are the means over them, with the interval
(Wilson) of as many questions as there are.

Few signals, and strongly regularised weights: a hundred and fifty questions carry no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.rag.abstention import SIGNALS, Array, Calibration, Lexicon
from orrery.rag.embedding.sparse import index, terms
from orrery.rag.questions import LEAST_ANSWERABLE, LEAST_UNANSWERABLE

WRONG = 0.07
FOLDS, REPEATS, STRENGTH = 10, 5, 0.1
WIDTH = 64
Z95 = 1.959964


@dataclass(frozen=True)
class Measured:
    """What was found out of fold. Rates are means over the repeats; `low` and `high` are Wilson's 95 % interval."""

    abstained: float
    abstained_low: float
    abstained_high: float
    wrongly: float
    wrongly_low: float
    wrongly_high: float
    auc: float
    probabilities: Array  # of each question, mean over the repeats
    shares: Array  # of the repeats in which each question was abstained

    def told(self) -> dict[str, float]:
        """Return the rates for a report."""
        names = ("abstained", "abstained_low", "abstained_high", "wrongly", "wrongly_low", "wrongly_high", "auc")
        return {name: round(float(getattr(self, name)), 6) for name in names}


def matrix(rows: Sequence[Mapping[str, float]], names: Sequence[str] = SIGNALS) -> Array:
    """Return signals as numbers, a row a question."""
    return np.array([[row[name] for name in names] for row in rows], np.float64)


def enough(answerable: Sequence[bool]) -> str | None:
    """Return why these are too few questions to calibrate with, or None when they are not."""
    yes, no = sum(answerable), len(answerable) - sum(answerable)
    if yes < LEAST_ANSWERABLE or no < LEAST_UNANSWERABLE:
        return (
            f"{yes} answerable and {no} unanswerable questions: "
            f"{LEAST_ANSWERABLE} and {LEAST_UNANSWERABLE} are needed to learn when to abstain"
        )
    return None


def cross_fit(
    x: Array, answerable: Sequence[bool], seed: int = 0, *, repeats: int = REPEATS, groups: Sequence[Any] | None = None
) -> Measured:
    """Return how well questions are told apart that neither weights nor threshold have seen.

    `groups`: what must not be torn apart, such as one question with and without its documents.
    """
    from sklearn.metrics import roc_auc_score

    y = np.asarray(answerable, bool)
    unit = np.arange(len(y)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    probabilities, abstained = np.zeros((repeats, len(y))), np.zeros((repeats, len(y)), bool)
    for repeat in range(repeats):
        for train, test in _folds(y, unit, seed + repeat, FOLDS):
            threshold = _threshold(x[train], y[train], unit[train], seed + repeat)
            probabilities[repeat, test] = _predict(_fit(x[train], y[train]), x[test])
            abstained[repeat, test] = probabilities[repeat, test] < threshold
    low, high = wilson(float(abstained[:, ~y].mean()), int((~y).sum()))
    wrong_low, wrong_high = wilson(float(abstained[:, y].mean()), int(y.sum()))
    return Measured(
        float(abstained[:, ~y].mean()),
        low,
        high,
        float(abstained[:, y].mean()),
        wrong_low,
        wrong_high,
        float(np.mean([roc_auc_score(y, p) for p in probabilities])),
        probabilities.mean(axis=0),
        abstained.mean(axis=0),
    )


def fit(
    x: Array,
    answerable: Sequence[bool],
    lexicon: Lexicon | None = None,
    seed: int = 0,
    measured: Mapping[str, Any] | None = None,
    names: Sequence[str] = SIGNALS,
) -> Calibration:
    """Return the calibration fitted on all questions; its threshold comes from predictions made out of fold."""
    y = np.asarray(answerable, bool)
    center, scale, weights, bias = _fit(x, y)
    unit = np.arange(len(y))
    threshold = float(np.mean([_threshold(x, y, unit, seed + r, FOLDS) for r in range(REPEATS)]))
    middle, spread, each = (tuple(round(float(v), 9) for v in row) for row in (center, scale, weights))
    bias, threshold = round(bias, 9), round(threshold, 9)
    return Calibration(tuple(names), middle, spread, each, bias, threshold, dict(measured or {}), lexicon)


_Fitted = tuple[Array, Array, Array, float]


def _fit(x: Array, y: npt.NDArray[np.bool_]) -> _Fitted:
    from sklearn.linear_model import LogisticRegression

    center, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    # Newton's steps: exact for so few weights, and no threads that a busy machine makes wait for each other.
    model = LogisticRegression(C=STRENGTH, solver="newton-cholesky").fit((x - center) / scale, y)
    return center, scale, model.coef_[0], float(model.intercept_[0])


def _predict(fitted: _Fitted, x: Array) -> Array:
    center, scale, weights, bias = fitted
    logits = (x - center) / scale @ weights + bias
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -500, 500))))


def _threshold(x: Array, y: npt.NDArray[np.bool_], unit: npt.NDArray[np.int64], seed: int, folds: int = 5) -> float:
    """Return the largest threshold that loses at most `WRONG` of the answerable questions, judged out of fold."""
    p = np.zeros(len(y))
    for train, test in _folds(y, unit, seed, folds):
        p[test] = _predict(_fit(x[train], y[train]), x[test])
    kept = np.sort(p[y])
    return float(kept[math.floor(WRONG * len(kept))])


def _folds(
    y: npt.NDArray[np.bool_], unit: npt.NDArray[np.int64], seed: int, folds: int
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Return (train, test) rows: each class is dealt evenly, and a unit is not torn apart."""
    rng = np.random.default_rng(seed)
    fold = np.zeros(int(unit.max()) + 1, np.int64)
    kind = np.zeros(len(fold), np.int64)
    np.maximum.at(kind, unit, np.where(y, 1, 2))
    for value in (1, 2):
        members = rng.permutation(np.flatnonzero(kind == value))
        fold[members] = np.arange(len(members)) % folds
    of = fold[unit]
    return [(np.flatnonzero(of != f), np.flatnonzero(of == f)) for f in range(folds) if (of == f).any()]


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share that was seen among `count` (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    z2 = Z95 * Z95
    middle = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


# -- the lexicon ---------------------------------------------------------------------------------------


def lexicon(texts: Iterable[str], language: str, pieces: npt.NDArray[np.int8] | None, tokenizer: Any) -> Lexicon:
    """Return how many of the texts hold each term, and what the embedder knows of word pieces."""
    counts: dict[int, int] = {}
    chunks = 0
    for text in texts:
        chunks += 1
        for term in set(terms(text, language)):
            key = index(term)
            counts[key] = counts.get(key, 0) + 1
    hashes = np.array(sorted(counts), np.uint32)
    return Lexicon(
        max(1, chunks), hashes, np.array([counts[int(h)] for h in hashes], np.uint32), language, pieces, tokenizer
    )


def piece_vectors(model: Path, vocabulary: int, width: int = WIDTH) -> npt.NDArray[np.int8] | None:
    """Return the vectors of an exported embedder's word pieces (vocabulary, width), 8 bits a number.

    They are its table of input embeddings, centred and turned to the directions that vary most. None when the graph
    has no such table.
    """
    table = _table(model, vocabulary)
    if table is None:
        return None
    table = table - table.mean(axis=0)
    _, directions = np.linalg.eigh(table.T.astype(np.float64) @ table)
    # Signs of eigenvectors are arbitrary, and would differ from one machine to another.
    main = directions[:, ::-1][:, :width]
    main = main * np.where(main[np.abs(main).argmax(axis=0), np.arange(main.shape[1])] < 0, -1.0, 1.0)
    reduced = table @ main
    return np.asarray(np.clip(np.rint(reduced * (127 / np.abs(reduced).max())), -127, 127), np.int8)


def _table(model: Path, vocabulary: int) -> npt.NDArray[np.float32] | None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(model)).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    tables = [t for t in held.values() if len(t.dims) == 2 and t.dims[0] >= vocabulary and t.dims[1] < t.dims[0]]
    if not tables:
        return None
    found = numpy_helper.to_array(tables[0]).astype(np.float32)
    zero, scale = (held.get(tables[0].name.replace("_quantized", end)) for end in ("_zero_point", "_scale"))
    if zero is not None and scale is not None and tables[0].name.endswith("_quantized"):
        found = (found - numpy_helper.to_array(zero).astype(np.float32)) * numpy_helper.to_array(scale)
    return np.asarray(found[:vocabulary], np.float32)
