"""How far a partition's features and predictions have moved from a model's reference. Pure functions of counts.

Every figure of a column is computed on its bins, null and unseen among them:

- PSI, sum((q - p) ln(q / p)): Siddiqi, Credit Risk Scorecards (2006), ch. 6. Without any change it is not 0 but about
  (bins - 1)(1/n + 1/m): Yurdakul and Naranjo, Statistical properties of the population stability index, J. Risk Model
  Validation 14 (2020). `psi_noise` is that number; a small partition must not look as if it had moved.
- Jensen-Shannon: the distance (square root of the divergence) in base 2, 0 (same) to 1 (nothing in common): Lin, IEEE
  Trans. Information Theory 37 (1991); Endres and Schindelin, ibid. 49 (2003) for the root.
- A test per column: Pearson's chi-square of two samples. Over many columns its p-values are corrected by Benjamini and
  Hochberg, J. Royal Statistical Society B 57 (1995). Rows of one day resemble each other, which the test does not know,
  and many rows make any difference significant: so a column counts as drifted only when its PSI less the noise is
  also at least `MIN_PSI`.
- Stale: the share of missing values has risen by `MIN_RISE` or more, tested and corrected in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orrery.data import histograms
from orrery.data.histograms import Category, Counts
from orrery.errors import DataError
from orrery.evaluation import reference as references
from orrery.evaluation.reference import Reference, read

__all__ = ["Drift", "DriftReport", "Reference", "compare", "read"]

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

# Share of columns called drifted that may be so by chance alone (Benjamini and Hochberg's q).
ALPHA = 0.01
# Siddiqi: below 0.1 nothing has changed, 0.1 to 0.25 something, above it much.
MIN_PSI = 0.1
# Five rows of a hundred have lost a value that they had.
MIN_RISE = 0.05
# What an empty bin's share counts as: a logarithm cannot take 0. The usual choice, Evidently's among them.
EMPTY = 1e-4
# Cochran (Biometrics 10, 1954): the chi-square approximation wants about five rows expected in a bin.
SPARSE = 5


@dataclass(frozen=True)
class Drift:
    """One column against its reference. Where a side has no row, figures are NaN and nothing has drifted."""

    name: str
    kind: Literal["numeric", "category"]
    psi: float
    psi_noise: float
    js: float
    p: float
    """Of the chi-square test, corrected for the number of columns."""
    missing: float
    """Share of rows without a value; `missing_reference` in the reference."""
    missing_reference: float
    unseen: float
    """Share of rows with a value that the model does not know; 0 for numbers."""
    unseen_reference: float
    drifted: bool
    stale: bool

    @property
    def excess(self) -> float:
        """PSI beyond what sampling alone makes."""
        return self.psi - self.psi_noise


@dataclass(frozen=True)
class DriftReport:
    """All columns, the largest excess first. `rows` is the partition's, `rows_reference` the training window's."""

    rows: int
    rows_reference: int
    predicted: int
    """Rows of the partition's predictions; `predicted_reference` of the holdout's."""
    predicted_reference: int
    features: tuple[Drift, ...]
    predictions: tuple[Drift, ...]
    """One entry; multiclass two: the class that wins, and its probability."""

    @property
    def prediction(self) -> Drift:
        """The predictions' drift (of a multiclass the larger one)."""
        return self.predictions[0]

    @property
    def worst(self) -> Drift | None:
        """The feature that has moved farthest; None for a model without features."""
        return self.features[0] if self.features else None

    @property
    def drifted(self) -> list[str]:
        """Names of the features that have drifted, farthest first."""
        return [d.name for d in self.features if d.drifted]

    @property
    def stale(self) -> list[str]:
        """Names of the features that are missing more than in training, the largest rise first."""
        rises = sorted((d for d in self.features if d.stale), key=lambda d: (d.missing_reference - d.missing, d.name))
        return [d.name for d in rises]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; what is not a number is null."""
        counts = ("rows", "rows_reference", "predicted", "predicted_reference")
        out: dict[str, Any] = {n: getattr(self, n) for n in counts}
        for part in ("features", "predictions"):
            out[part] = [{k: _finite(v) for k, v in asdict(d).items()} for d in getattr(self, part)]
        return out


def compare(
    reference: Reference,
    features_files: Sequence[Path],
    predictions: pa.ChunkedArray | pa.Array | npt.NDArray[Any],
    *,
    share: float = 1.0,
) -> DriftReport:
    """Compare a partition with a model's reference.

    `features_files` are its features.parquet (streamed: they need not fit the memory), `predictions` the column
    `prediction` of its scores: [N] numbers, or lists of one probability per class, in the model's order; null where
    there is none. `share` samples the features by key, as scores of a sample are. Raises `DataError` when a feature
    is gone, has another type, or when predictions do not fit the reference's classes.
    """
    features = histograms.count_files(features_files, reference.features.bins, share=share)
    table = references.prediction_table(_matrix(predictions, len(reference.classes)), reference.classes)
    predicted = histograms.count(table, reference.predictions.bins)
    return DriftReport(
        rows=features.rows,
        rows_reference=reference.features.rows,
        predicted=predicted.rows,
        predicted_reference=reference.predictions.rows,
        features=of_counts(reference.features, features),
        predictions=of_counts(reference.predictions, predicted),
    )


def _matrix(predictions: Any, classes: int) -> Floats:
    """Return predictions as float64 [N] or [N, classes], NaN where there is none."""
    if isinstance(predictions, pa.ChunkedArray):
        predictions = predictions.combine_chunks()
    if not isinstance(predictions, pa.Array):
        values = np.asarray(predictions, np.float64)
    elif pa.types.is_floating(predictions.type) or pa.types.is_null(predictions.type):
        values = np.asarray(predictions.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    else:
        present = predictions.is_valid().to_numpy(zero_copy_only=False)
        flat = pc.list_flatten(predictions.drop_null()).to_numpy(zero_copy_only=False)
        if len(flat) != present.sum() * classes:
            raise DataError(f"predictions are not lists of {classes} probabilities")
        values = np.full((len(present), classes), math.nan)
        values[present] = flat.reshape(-1, classes)
    if values.shape[1:] != ((classes,) if classes else ()):
        raise DataError(f"predictions have shape {list(values.shape)}; the reference has {classes or 'no'} classes")
    return values


# -- formulas ----------------------------------------------------------------------------------------


def of_counts(reference: Counts, current: Counts) -> tuple[Drift, ...]:
    """Return the drift of every column, largest excess first. Raises `DataError` when the bins are not the same."""
    if reference.bins != current.bins:
        raise DataError("drift is computed on the reference's bins, and these are others")
    names = list(reference.bins)
    p = benjamini_hochberg([chi_square(*pooled(reference.of(n), current.of(n))) for n in names])
    lost = benjamini_hochberg([chi_square(_present(reference, n), _present(current, n)) for n in names])
    found = [_drift(reference, current, *column) for column in zip(names, p, lost, strict=True)]
    return tuple(sorted(found, key=lambda d: (-d.excess if math.isfinite(d.excess) else 0.0, d.name)))


def _drift(reference: Counts, current: Counts, name: str, p: float, p_lost: float) -> Drift:
    before, now = pooled(reference.of(name), current.of(name))
    far, noise = psi(before, now), psi_noise(before, now)
    missing, missing_reference = _share(current.nulls(name), current), _share(reference.nulls(name), reference)
    return Drift(
        name=name,
        kind="category" if isinstance(reference.bins[name], Category) else "numeric",
        psi=far,
        psi_noise=noise,
        js=jensen_shannon(before, now),
        p=p,
        missing=missing,
        missing_reference=missing_reference,
        unseen=_share(current.unseen(name), current),
        unseen_reference=_share(reference.unseen(name), reference),
        drifted=p <= ALPHA and far - noise >= MIN_PSI,
        stale=p_lost <= ALPHA and missing - missing_reference >= MIN_RISE,
    )


def _present(counts: Counts, name: str) -> Ints:
    return np.array([counts.rows - counts.nulls(name), counts.nulls(name)], np.int64)


def _share(part: int, counts: Counts) -> float:
    return part / counts.rows if counts.rows else math.nan


def pooled(reference: Ints, current: Ints) -> tuple[Ints, Ints]:
    """Return both sides with all sparse bins put together into one, the last.

    Sparse is a bin that has, and by the reference should have, fewer than `SPARSE` of the current rows: a category of
    a thousand values would otherwise say more about the size of a partition than about the world.
    """
    if not reference.sum() or not current.sum():
        return reference, current
    expected = reference * (current.sum() / reference.sum())
    sparse = (np.maximum(expected, current) < SPARSE) & (reference + current > 0)
    if sparse.sum() < 2:
        return reference, current
    together = [np.append(side[~sparse], side[sparse].sum()) for side in (reference, current)]
    return together[0], together[1]


def psi(reference: Ints, current: Ints, empty: float | None = EMPTY) -> float:
    """Return the population stability index of counts [bins] on the same bins; NaN when one side has no row.

    `empty` is what the share of an empty bin counts as (a bin that is empty on both sides says nothing). None follows
    Evidently 0.7 to the letter: 0.0001, or a millionth of the smallest share that there is where that is below 0.0001.
    """
    if not reference.sum() or not current.sum():
        return math.nan
    some = (reference > 0) | (current > 0)
    p, q = (_filled(side[some] / side.sum(), empty) for side in (reference, current))
    return float(np.sum((q - p) * np.log(q / p)))


def _filled(shares: Floats, empty: float | None) -> Floats:
    smallest = float(shares[shares > 0].min())
    if empty is None:
        empty = smallest / 1e6 if smallest <= EMPTY else EMPTY
    return np.where(shares > 0, shares, empty)


def psi_noise(reference: Ints, current: Ints) -> float:
    """Return the PSI to be expected of two samples of one population: (bins in use - 1)(1/n + 1/m)."""
    n, m = int(reference.sum()), int(current.sum())
    if not n or not m:
        return math.nan
    return (int(((reference > 0) | (current > 0)).sum()) - 1) * (1 / n + 1 / m)


def jensen_shannon(reference: Ints, current: Ints) -> float:
    """Return the Jensen-Shannon distance in base 2, from 0 to 1; NaN when one side has no row."""
    if not reference.sum() or not current.sum():
        return math.nan
    p, q = reference / reference.sum(), current / current.sum()
    middle = (p + q) / 2
    divergence = sum(float(np.sum(s[s > 0] * np.log2(s[s > 0] / middle[s > 0]))) for s in (p, q)) / 2
    return math.sqrt(max(0.0, divergence))


def chi_square(reference: Ints, current: Ints) -> float:
    """Return the p-value of Pearson's test that both are of one population; 1 when there is nothing to test."""
    some = (reference > 0) | (current > 0)
    seen = np.stack([reference[some], current[some]]).astype(np.float64)
    totals = seen.sum(axis=1, keepdims=True)
    if seen.shape[1] < 2 or not totals.all():
        return 1.0
    expected = totals * seen.sum(axis=0) / seen.sum()
    statistic = float(np.sum((seen - expected) ** 2 / expected))
    from scipy.special import gammaincc  # where it is used: scipy takes a tenth of a second

    return float(gammaincc((seen.shape[1] - 1) / 2, statistic / 2))


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: below q are those of which a share q at most is so by chance."""
    values = np.asarray(p, np.float64)
    order = np.argsort(-values)
    ranks = np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum.accumulate(np.minimum(1.0, values[order] * len(values) / ranks))
    return [float(v) for v in corrected]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
