"""What is to be known of a window before its rows can be encoded, without holding them: read through, twice.

First the times of the labelled rows (8 bytes each), whose order says when each part begins; then everything once,
for the counts, the signature and the statistics. In memory is one piece of the table at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orrery.data.tables import LABEL, PREDICTION_TIME, RESERVED
from orrery.spec import Split
from orrery.training.dataset import Moments, Window, refuse_infinite
from orrery.training.labels import Task, classes, encode, is_known
from orrery.training.schema import Inference, Schema, to_float
from orrery.training.split import Bounds, classes_of, micros, refuse, starts, unlabelled


@dataclass(frozen=True)
class Survey:
    """What `survey` found. `mean`, `std`, `label_mean`, `label_std`: as in `prepare.Prepared`.

    `counts`: as `split.Parts.counts`.
    """

    bounds: Bounds
    counts: dict[str, int]
    schema: Schema
    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    label_mean: float
    label_std: float


def survey(window: Window, shares: Split, task: Task) -> Survey:
    """Read through the window. Raises `DataError` as `split` and `schema.infer` do."""
    bounds = _bounds(window, shares)
    seen = _Seen(bounds, task)
    for piece in window.pieces([*RESERVED[1:], *window.names]):
        seen.add(piece)
    refuse(seen.counts, bounds.text, seen.classes, task)
    schema = seen.inference.schema(task, tuple(sorted(seen.names)))
    mean, std = seen.numbers.result()
    shift, scale = (float(a[0]) for a in seen.label.result()) if task == "regression" else (0.0, 1.0)
    return Survey(bounds, seen.counts, schema, mean, std, shift, scale)


def _bounds(window: Window, shares: Split) -> Bounds:
    times, rows = [], 0
    for piece in window.pieces([PREDICTION_TIME, LABEL]):
        rows += piece.num_rows
        times.append(micros(piece.filter(is_known(piece[LABEL])), PREDICTION_TIME))
    window.refuse_empty(rows)
    when = np.concatenate(times)
    if len(when) == 0:
        raise unlabelled(rows)
    return Bounds(*starts(when, shares))


class _Seen:
    """What the second reading gathers."""

    def __init__(self, bounds: Bounds, task: Task) -> None:
        self.bounds, self.task = bounds, task
        self.counts = dict.fromkeys(("fit", "tune", "holdout", "unlabelled", "purged"), 0)
        self.classes: dict[str, set[str]] = {name: set() for name in ("fit", "tune", "holdout")}
        self.names: set[str] = set()  # of the classes of a multiclass
        self.inference, self.numbers, self.label = Inference(), Moments(), Moments()

    def add(self, piece: pa.Table) -> None:
        """Take one piece in."""
        labelled = piece.filter(is_known(piece[LABEL]))
        masks = self.bounds.masks(labelled)
        self.counts["unlabelled"] += piece.num_rows - labelled.num_rows
        self.counts["purged"] += labelled.num_rows - sum(int(m.sum()) for m in masks.values())
        for name, mask in masks.items():
            self.counts[name] += int(mask.sum())
            if self.task != "regression":
                self.classes[name] |= classes_of(labelled.select([LABEL]).filter(pa.array(mask)))
        self._fit(labelled.filter(pa.array(masks["fit"])))

    def _fit(self, rows: pa.Table) -> None:
        if rows.num_rows == 0:
            return
        self.inference.add(rows)
        self.names.update(classes(rows, self.task))
        names = self.inference.numeric
        numeric = np.stack([to_float(rows[n]) for n in names], axis=1) if names else np.zeros((rows.num_rows, 0))
        refuse_infinite(names, numeric.astype(np.float32, copy=False))
        self.numbers.add(numeric)
        if self.task == "regression":
            self.label.add(encode(rows, self.task)[:, None])
