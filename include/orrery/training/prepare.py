"""What all processes of a training share: the window's fit and tune part, encoded once and laid into scratch.

The step prepares; its processes take their rows from there, and the statistics with them, so no process computes
on rows that it does not train on. A window of more than `STREAM_ABOVE` encoded bytes is prepared piece by piece into
shards (see `survey`, `shards`, `stream`), so that neither preparing nor training holds it; a smaller one is
encoded whole, into arrays that the processes map, and every epoch is one full permutation of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orrery.data.tables import LABEL, RESERVED
from orrery.errors import DataError
from orrery.step import Work
from orrery.training import Dataset, dataset
from orrery.training.labels import classes, is_known
from orrery.training.place import Place
from orrery.training.schema import Schema, infer
from orrery.training.shards import Shards, Writer, empty, layout
from orrery.training.split import split
from orrery.training.survey import survey

if TYPE_CHECKING:
    from orrery.training.batches import Part

Name: TypeAlias = Literal["fit", "tune"]
ARRAYS = ("numeric", "categorical", "label")
STREAM_ABOVE = 64 << 20  # encoding at once takes about ten times as much: keys, text, and the copies of each step


@dataclass(frozen=True)
class Arrays:
    """A part as .npy files, to be mapped."""

    folder: Path
    schema: Schema
    rows: int

    def dataset(self) -> Dataset:
        """Return the whole part; its arrays are read as they are used."""
        numeric, categorical, label = (np.load(self.folder / f"{a}.npy", mmap_mode="r") for a in ARRAYS)
        return Dataset(numeric, categorical, label, self.schema)

    def head(self, rows: int) -> Dataset:
        """Return the first rows (at most `rows`), in memory."""
        whole = self.dataset()
        numeric, categorical, label = (np.array(getattr(whole, a)[:rows]) for a in ARRAYS)
        return Dataset(numeric, categorical, label, self.schema)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The two parts that a training reads, and what is known of them. Small: it travels to every process.

    mean, std: float64 [numeric inputs] of the fit part, NaN left out. label_mean, label_std: of a regression's fit
    part, for who standardises; 0 and 1 for the other tasks. Labels in the parts are as the data have them.
    bounds, rows: what `split.json` and the result hold.
    """

    schema: Schema
    parts: dict[Name, Arrays | Shards]
    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    label_mean: float
    label_std: float
    bounds: dict[str, str]
    rows: dict[str, int]

    @property
    def fit_rows(self) -> int:
        """Rows of the fit part."""
        return self.parts["fit"].rows

    @property
    def tune_rows(self) -> int:
        """Rows of the tune part."""
        return self.parts["tune"].rows

    @property
    def streamed(self) -> bool:
        """Whether the parts are too large to be held in memory."""
        return isinstance(self.parts["fit"], Shards)

    def part(self, name: Name, seed: int, batch_size: int, place: Place, lanes: int = 1) -> Part:
        """Return a part as the process at `place` takes it; `lanes`: the spec's `processes` (see `stream`)."""
        # torch, which a model of another library does without
        from orrery.training.batches import InMemory
        from orrery.training.stream import Streamed

        found = self.parts[name]
        if isinstance(found, Shards):
            return Streamed(found, seed, batch_size, place, lanes)
        return InMemory(found.dataset(), seed, batch_size, place)

    def head(self, name: Name, rows: int) -> Dataset:
        """Return a part's first rows (at most `rows`), as arrays in memory."""
        return self.parts[name].head(rows)

    def dataset(self, name: Name) -> Dataset:
        """Return a whole part; its arrays are mapped from files, read as they are used."""
        found = self.parts[name]
        return (_unpacked(found) if isinstance(found, Shards) else found).dataset()

    def sample(self, name: Name) -> Dataset:
        """Return the whole part, or when it is streamed `STREAM_ABOVE` bytes of rows evenly spread over it."""
        found = self.parts[name]
        return found.spread(STREAM_ABOVE) if isinstance(found, Shards) else found.dataset()


def prepared(work: Work, processes: int = 1) -> Prepared:
    """Read, split and encode the config's window into the step's scratch folder.

    `processes`: the spec's; a streamed part is laid out for them. Raises `DataError` for data that cannot be
    trained on.
    """
    window = dataset.Window(work)
    found = _by_pieces(work, window, processes) if window.size > STREAM_ABOVE else _at_once(work, window)
    if not found.schema.columns:
        raise DataError(
            "the features table has no feature", hint="features.py must add a column beside the reserved ones"
        )
    for name in sorted(set(window.names) - set(found.schema.columns)):
        work.log.warning(f"feature {name} has no value in the whole window: the model does without it")
    return found


def _at_once(work: Work, window: dataset.Window) -> Prepared:
    parts = split(window.read(), work.spec.split, work.spec.task)
    schema = infer(parts.fit, work.spec.task, classes(parts.fit, work.spec.task))
    fit, tune = dataset.encoded(parts.fit, schema), dataset.encoded(parts.tune, schema)
    laid: dict[Name, Arrays | Shards] = {
        "fit": _laid(work.scratch / "fit", fit), "tune": _laid(work.scratch / "tune", tune)
    }  # fmt: skip
    label = (0.0, 1.0)
    if schema.task == "regression":
        label = float(np.mean(fit.label, dtype=np.float64)), float(np.std(fit.label, dtype=np.float64)) or 1.0
    return Prepared(schema, laid, *dataset.moments(fit.numeric), *label, parts.bounds, parts.counts)


def _laid(folder: Path, data: Dataset) -> Arrays:
    folder.mkdir(parents=True, exist_ok=True)
    for array in ARRAYS:
        np.save(folder / f"{array}.npy", getattr(data, array))
    return Arrays(folder, data.schema, data.rows)


def _by_pieces(work: Work, window: dataset.Window, processes: int) -> Prepared:
    """Prepare a window that memory should not hold: read through for what must be known first, then encoded."""
    known = survey(window, work.spec.split, work.spec.task)
    layouts = {name: layout(known.counts[name], known.schema, processes) for name in ("fit", "tune")}
    work.log.info("the window is streamed from shards", mb=window.size >> 20, groups=layouts["fit"].groups)
    paths = {name: work.scratch / f"{name}.parquet" for name in layouts}
    with (
        Writer(paths["fit"], known.schema, layouts["fit"]) as fit,
        Writer(paths["tune"], known.schema, layouts["tune"]) as tune,
    ):
        for piece in window.pieces([*RESERVED[1:], *known.schema.columns]):
            labelled = piece.filter(is_known(piece[LABEL]))
            masks = known.bounds.masks(labelled)
            for name, writer in (("fit", fit), ("tune", tune)):
                if masks[name].any():
                    writer.add(dataset.encoded(labelled.filter(pa.array(masks[name])), known.schema))
    _give_back()
    parts: dict[Name, Arrays | Shards] = {"fit": fit.shards, "tune": tune.shards}
    label = known.label_mean, known.label_std
    return Prepared(known.schema, parts, known.mean, known.std, *label, known.bounds.text, known.counts)


def _unpacked(shards: Shards) -> Arrays:
    """Lay a streamed part out as arrays to be mapped, once: for who can only take all of it."""
    folder = shards.path.with_suffix("")
    arrays = Arrays(folder, shards.schema, shards.rows)
    if folder.exists():
        return arrays
    folder.mkdir()
    like = empty(shards.schema, 0)
    outs = [
        np.lib.format.open_memmap(
            folder / f"{a}.npy", "w+", getattr(like, a).dtype, (shards.rows, *getattr(like, a).shape[1:])
        )
        for a in ARRAYS
    ]
    file, at = shards.open(), 0
    for group in range(shards.layout.groups):
        data = shards.read([group], file)
        for out, array in zip(outs, ARRAYS, strict=True):
            out[at : at + data.rows] = getattr(data, array)
        at += data.rows
    return arrays


def _give_back() -> None:
    """Return Arrow's free memory to the system: the processes are forked from this one."""
    pa.default_memory_pool().release_unused()
