"""The signature refuses a column of another type than it was trained on, and takes every column of its own."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from orrery.errors import DataError
from orrery.training.schema import Schema

SCHEMA = Schema(task="binary", numeric_columns=("wind",), vocabularies={"gate": ("1", "2")})


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"wind": ["3", "calm"], "gate": ["1", "2"]}, "wind is string, the model was trained on a number"),
        ({"wind": [3.0, 4.0], "gate": [1, 2]}, "gate is int64, the model was trained on text"),
        ({"wind": [3.0, 4.0], "gate": [True, False]}, "gate is bool, the model was trained on text"),
    ],
)
def test_a_column_that_changed_its_type_is_refused_with_both_types(columns: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says) as e:
        SCHEMA.encode(pa.table(columns))
    assert "train again" in e.value.hint


@pytest.mark.parametrize("number", [pa.int16(), pa.float32(), pa.bool_()])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_number_and_every_text_is_taken(number: pa.DataType, text: pa.DataType) -> None:
    numeric, ids = SCHEMA.encode(
        pa.table({"wind": pa.array([1, 0]).cast(number), "gate": pa.array(["2", "?"]).cast(text)})
    )
    assert numeric.tolist() == [[1.0], [0.0]]
    assert ids.tolist() == [[2], [0]]


def test_a_column_without_any_value_is_missing_not_mistyped() -> None:
    numeric, ids = SCHEMA.encode(pa.table({"wind": pa.nulls(2), "gate": pa.nulls(2)}))
    assert np.isnan(numeric).all()
    assert ids.tolist() == [[0], [0]]
