"""The model's signature: which columns go in, in which order, and how strings become ids. No torch here.

Every export, whatever library made it, is an ONNX graph with two inputs and one output:

    numeric      float32 [N, len(schema.numeric)]       raw values, NaN where missing
    categorical  int64   [N, len(schema.categorical)]   ids; 0 is unknown or missing
    prediction   float32 [N]                            probability of the positive class, or the value
                 float32 [N, C]                         multiclass: one probability per class of `classes`

An input whose list is empty is left out of the graph.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from orrery.data.tables import RESERVED
from orrery.errors import DataError

# A category seen fewer times than this in training has too little behind it: it shares id 0 with the unknown.
MIN_COUNT = 10
MAX_CATEGORIES = 5_000
MAX_VALUES = 1_000_000  # rare ones included: what is counted has to fit into memory
CHANGED_HINT = "features.py has changed since: give the column its old type or another name, or train again"


class Schema(BaseModel):
    """Names, order and vocabularies of a model's inputs; part of every candidate (`schema.json`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: Literal["binary", "multiclass", "regression"]
    numeric_columns: tuple[str, ...]
    vocabularies: dict[str, tuple[str, ...]] = Field(description="Categorical column -> its values; id = position + 1.")
    missing: tuple[str, ...] = Field((), description="Numeric columns that had missing values in training.")
    classes: tuple[str, ...] = ()

    @property
    def numeric(self) -> list[str]:
        """Names of the numeric inputs."""
        return list(self.numeric_columns)

    @property
    def numeric_width(self) -> int:
        """What a torch module sees: standardised numerics, then one 0/1 column per entry of `missing`."""
        return len(self.numeric_columns) + len(self.missing)

    @property
    def categorical(self) -> dict[str, int]:
        """Number of ids per categorical input, id 0 included."""
        return {name: len(values) + 1 for name, values in self.vocabularies.items()}

    @property
    def columns(self) -> list[str]:
        """All input columns of a features table."""
        return [*self.numeric_columns, *self.vocabularies]

    def changed(self, features: pa.Schema) -> list[str]:
        """Return a sentence for each column that is there in another type than the model was trained on.

        A column without any value (Arrow's null type) is missing values, of whatever type.
        """
        wanted = [(name, "a number", is_numeric) for name in self.numeric_columns]
        wanted += [(name, "text", is_categorical) for name in self.vocabularies]
        kinds = {field.name: field.type for field in features}
        return [
            f"{name} is {kinds[name]}, the model was trained on {what}"
            for name, what, fits in wanted
            if name in kinds and not pa.types.is_null(kinds[name]) and not fits(kinds[name])
        ]

    def encode(self, table: pa.Table) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return the graph's inputs for a features table.

        Raises `DataError` for a column that is absent or has another type than the model was trained on.
        """
        absent = [c for c in self.columns if c not in table.column_names]
        if absent:
            raise DataError(f"the features lack {', '.join(absent)}, which the model was trained with")
        if changed := self.changed(table.schema):
            raise DataError(f"the features changed their type: {'; '.join(changed)}", hint=CHANGED_HINT)
        numeric = np.empty((table.num_rows, len(self.numeric_columns)), dtype=np.float32)
        for i, name in enumerate(self.numeric_columns):
            numeric[:, i] = to_float(table[name])
        ids = np.zeros((table.num_rows, len(self.vocabularies)), dtype=np.int64)
        for i, (name, values) in enumerate(self.vocabularies.items()):
            found = pc.index_in(table[name].cast(pa.string()), value_set=pa.array(values, pa.string()))
            ids[:, i] = pc.fill_null(pc.add(found, 1), 0).to_numpy(zero_copy_only=False)
        return numeric, ids

    def feed(self, table: pa.Table) -> dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64]]:
        """Return what an ONNX session is fed."""
        numeric, ids = self.encode(table)
        feed: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64]] = {}
        if self.numeric_columns:
            feed["numeric"] = numeric
        if self.vocabularies:
            feed["categorical"] = ids
        return feed


def to_float(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Return a numeric or boolean column as float32, NaN where it is null."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return np.asarray(pc.fill_null(column.cast(pa.float64(), safe=False), float("nan")).to_numpy(), dtype=np.float32)


def is_numeric(kind: pa.DataType) -> bool:
    """Tell whether a column of this type is treated as a number."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_categorical(kind: pa.DataType) -> bool:
    """Tell whether a column of this type is treated as a category."""
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_dictionary(kind)
    )


def feature_names(schema: pa.Schema) -> list[str]:
    """Return the feature columns of a features table: not reserved, and not beginning with `_`."""
    return [f.name for f in schema if f.name not in RESERVED and not f.name.startswith("_")]


class Inference:
    """A signature in the making, from the rows that a model is fitted on (and from no others), piece by piece.

    All pieces have the same column types. A column without any value (Arrow's null type) is left out: it has
    nothing to teach.
    """

    def __init__(self) -> None:
        self._numeric: dict[str, bool] = {}  # name -> whether it has missing values
        self._counts: dict[str, Counter[str]] = {}

    def add(self, table: pa.Table) -> None:
        """Take more rows in. Raises `DataError` for a column that can be no feature."""
        for name in feature_names(table.schema):
            column = table[name]
            if is_categorical(column.type):
                self._count(name, column)
            elif is_numeric(column.type):
                missing = self._numeric.get(name, False)
                self._numeric[name] = missing or bool(pc.any(pc.is_null(column, nan_is_null=True)).as_py())
            elif not pa.types.is_null(column.type):
                raise DataError(
                    f"feature {name} is {column.type}; features are numbers, booleans or strings",
                    hint="prefix it with _ to keep it out",
                )

    @property
    def numeric(self) -> list[str]:
        """Names of the numeric columns so far, in the signature's order."""
        return list(self._numeric)

    def _count(self, name: str, column: pa.ChunkedArray) -> None:
        counts = self._counts.setdefault(name, Counter())
        found = pc.value_counts(column.cast(pa.string()).combine_chunks())
        for value, n in zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True):
            if value is not None:
                counts[value] += n
        if len(counts) > MAX_VALUES:
            raise DataError(f"{name} has more than {MAX_VALUES:,} different values: it names rows, it does not "
                            "describe them", hint="prefix it with _ to keep it out")  # fmt: skip

    def schema(self, task: Literal["binary", "multiclass", "regression"], classes: tuple[str, ...] = ()) -> Schema:
        """Return the signature. Raises `DataError` for a column with too many categories."""
        vocabularies = {}
        for name, counts in self._counts.items():
            kept = sorted(v for v, n in counts.items() if n >= MIN_COUNT)
            if len(kept) > MAX_CATEGORIES:
                raise DataError(
                    f"{name} has {len(kept):,} categories; at most {MAX_CATEGORIES:,}",
                    hint="prefix it with _ to keep it out",
                )
            vocabularies[name] = tuple(kept)
        missing = tuple(name for name, some in self._numeric.items() if some)
        return Schema(
            task=task, numeric_columns=tuple(self._numeric), vocabularies=vocabularies, missing=missing, classes=classes
        )


def infer(
    table: pa.Table, task: Literal["binary", "multiclass", "regression"], classes: tuple[str, ...] = ()
) -> Schema:
    """Infer the signature from a table of the rows that a model is fitted on; see `Inference`."""
    inference = Inference()
    inference.add(table)
    return inference.schema(task, classes)
