"""What all processes of a training share: the window's fit and tune part, encoded once and laid into scratch.

The step prepares; its processes take their rows from there, and the statistics with them, so no process computes
on rows that it does not train on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from orrery.errors import DataError
from orrery.step import Work
from orrery.training import Dataset, dataset
from orrery.training.labels import classes
from orrery.training.place import Place
from orrery.training.schema import Schema, feature_names, infer
from orrery.training.split import split

if TYPE_CHECKING:
    from orrery.training.batches import Part

Name: TypeAlias = Literal["fit", "tune"]
ARRAYS = ("numeric", "categorical", "label")


@dataclass(frozen=True, eq=False)
class Prepared:
    """The two parts that a training reads, and what is known of them. Small: it travels to every process.

    mean, std: float64 [numeric inputs] of the fit part, NaN left out. label_mean, label_std: of a regression's fit
    part, for who standardises; 0 and 1 for the other tasks. Labels in the parts are as the data have them.
    bounds, rows: what `split.json` and the result hold.
    """

    schema: Schema
    fit_rows: int
    tune_rows: int
    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    label_mean: float
    label_std: float
    folder: Path
    bounds: dict[str, str]
    rows: dict[str, int]

    def part(self, name: Name, seed: int, batch_size: int, place: Place, lanes: int = 1) -> Part:
        """Return a part as the process at `place` takes it; `lanes`: the spec's `processes` (see `stream`)."""
        from orrery.training.batches import InMemory  # torch, which a model of another library does without

        return InMemory(self.dataset(name), seed, batch_size, place)

    def head(self, name: Name, rows: int) -> Dataset:
        """Return a part's first rows (at most `rows`), as arrays."""
        whole = self.dataset(name)
        numeric, categorical, label = (np.array(getattr(whole, array)[:rows]) for array in ARRAYS)
        return Dataset(numeric, categorical, label, self.schema)

    def dataset(self, name: Name) -> Dataset:
        """Return a whole part; its arrays are mapped from files, read as they are used."""
        numeric, categorical, label = (np.load(self.folder / f"{name}-{a}.npy", mmap_mode="r") for a in ARRAYS)
        return Dataset(numeric, categorical, label, self.schema)


def prepared(work: Work, processes: int = 1) -> Prepared:
    """Read, split and encode the config's window into the step's scratch folder.

    `processes`: the spec's. Raises `DataError` for data that cannot be trained on.
    """
    parts = split(dataset.read(work), work.spec.split, work.spec.task)
    schema = infer(parts.fit, work.spec.task, classes(parts.fit, work.spec.task))
    _refuse_nothing(work, schema, feature_names(parts.fit.schema))
    folder = work.scratch / "arrays"
    folder.mkdir(parents=True, exist_ok=True)
    fit, tune = dataset.encoded(parts.fit, schema), dataset.encoded(parts.tune, schema)
    for name, data in (("fit", fit), ("tune", tune)):
        for array in ARRAYS:
            np.save(folder / f"{name}-{array}.npy", getattr(data, array))
    mean, std = dataset.moments(fit.numeric)
    shift, scale = _of_label(fit)
    return Prepared(schema, fit.rows, tune.rows, mean, std, shift, scale, folder, parts.bounds, parts.counts)


def _refuse_nothing(work: Work, schema: Schema, names: list[str]) -> None:
    """Refuse a table without a feature; say which features have no value."""
    if not schema.columns:
        raise DataError(
            "the features table has no feature", hint="features.py must add a column beside the reserved ones"
        )
    for name in sorted(set(names) - set(schema.columns)):
        work.log.warning(f"feature {name} has no value in the whole window: the model does without it")


def _of_label(fit: Dataset) -> tuple[float, float]:
    """Return mean and standard deviation of a regression's label, else 0 and 1."""
    if fit.schema.task != "regression":
        return 0.0, 1.0
    return float(np.mean(fit.label, dtype=np.float64)), float(np.std(fit.label, dtype=np.float64)) or 1.0
