"""What monitoring compares with: the features that a model was trained on, and what it predicted on its holdout.

`evaluate` makes it, with the model, and keeps it as `reference.json`. A multiclass prediction is two columns: the
class that wins, and its probability.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orrery.data import histograms
from orrery.data.histograms import Counts
from orrery.errors import DataError
from orrery.evaluation.metrics import Array
from orrery.training.schema import Schema

FILE = "reference.json"
PREDICTION, CONFIDENCE = "prediction", "confidence"


@dataclass(frozen=True)
class Reference:
    """Bins and counts of a model's features (its training window) and predictions (its holdout)."""

    window: str
    features: Counts
    predictions: Counts
    classes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "version": 1,
            "window": self.window,
            "classes": list(self.classes),
            "features": self.features.to_dict(),
            "predictions": self.predictions.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reference:
        """Read what `to_dict` made. Raises `DataError` for anything else."""
        try:
            return cls(
                str(data["window"]),
                Counts.from_dict(data["features"]),
                Counts.from_dict(data["predictions"]),
                tuple(data["classes"]),
            )
        except (KeyError, TypeError) as e:
            raise DataError(f"not a reference: {type(e).__name__}: {e}", hint="run evaluate again") from None


def make(files: Sequence[Path], schema: Schema, predictions: Array, window: str, share: float = 1.0) -> Reference:
    """Count a window's features files, streamed twice (for bins and counts), and holdout predictions [N] or [N, C]."""
    bins = histograms.bins_of_files(files, schema.numeric, schema.vocabularies, share=share)
    table = prediction_table(predictions, schema.classes)
    own = histograms.bins_of(table, {PREDICTION: schema.classes} if schema.classes else None)
    features = histograms.count_files(files, bins, share=share)
    return Reference(window, features, histograms.count(table, own), schema.classes)


def prediction_table(predictions: Array, classes: Sequence[str] = ()) -> pa.Table:
    """Return predictions [N] or [N, C] as columns to count; a row that is not finite is null."""
    values = np.asarray(predictions, np.float64)
    if values.ndim == 1:
        return pa.table({PREDICTION: values})
    lost = ~np.isfinite(values).all(axis=1)
    if not len(values):
        return pa.table({PREDICTION: pa.array([], pa.string()), CONFIDENCE: pa.array([], pa.float64())})
    won = pa.array(np.where(lost, 0, np.nan_to_num(values).argmax(axis=1)).astype(np.int32), mask=lost)
    names = pa.DictionaryArray.from_arrays(won, pa.array(list(classes), pa.string()))
    return pa.table({PREDICTION: names, CONFIDENCE: pa.array(values.max(axis=1), mask=lost)})


def read(file: Path) -> Reference:
    """Read `reference.json`. Raises `DataError` when it is none."""
    try:
        data = json.loads(file.read_bytes())
    except ValueError as e:
        raise DataError(f"{file.name} is not JSON: {e}", hint="run evaluate again") from None
    return Reference.from_dict(data)
