"""Mergeable histograms: exact sums in any order, bins that see what moves, nulls, unseen values, files of any shape."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orrery.data import histograms
from orrery.data.histograms import Category, Counts, Numeric, count
from orrery.errors import DataError

BINS = {"x": Numeric((-1.0, 0.0, 2.5)), "c": Category(("u", "v"))}
ROWS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([-1.0, 0.0, 2.5])),
        st.one_of(st.none(), st.sampled_from(["u", "v", "w", ""])),
    ),
    max_size=60,
)


def table(rows: list[tuple[Any, Any]]) -> pa.Table:
    return pa.table(
        {"x": pa.array([r[0] for r in rows], pa.float64()), "c": pa.array([r[1] for r in rows], pa.string())}
    )


def by_hand(rows: list[tuple[Any, Any]]) -> dict[str, tuple[int, ...]]:
    """Count row by row, in the plainest way."""
    x, c = [0] * 5, [0] * 4
    for value, text in rows:
        if value is None or math.isnan(value):
            x[4] += 1
        else:
            x[sum(value >= e for e in (-1.0, 0.0, 2.5))] += 1
        c[3 if text is None else {"u": 0, "v": 1}.get(text, 2)] += 1
    return {"x": tuple(x), "c": tuple(c)}


@given(ROWS)
def test_counts_are_those_of_counting_row_by_row(rows: list[tuple[Any, Any]]) -> None:
    made = count(table(rows), BINS)
    assert made.counts == by_hand(rows)
    assert made.rows == len(rows)


@given(ROWS, ROWS, ROWS)
def test_merging_is_associative_commutative_and_exact(a: list[Any], b: list[Any], c: list[Any]) -> None:
    one, two, three = (count(table(rows), BINS) for rows in (a, b, c))
    assert (one + two) + three == one + (two + three) == three + one + two == count(table(a + b + c), BINS)
    assert one + histograms.nothing(BINS) == one


@given(ROWS)
def test_json_gives_the_same_counts_back(rows: list[tuple[Any, Any]]) -> None:
    made = count(table(rows), BINS)
    assert Counts.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@settings(max_examples=25, deadline=None)
@given(ROWS, st.integers(1, 7), st.integers(1, 5))
def test_files_row_groups_threads_and_spark_count_alike(rows: list[Any], group: int, threads: int) -> None:
    import tempfile

    whole = table(rows)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "a.parquet"), Path(folder, "b.parquet")]
        cut = len(rows) // 3
        pq.write_table(whole.slice(0, cut), files[0], row_group_size=group)
        pq.write_table(whole.slice(cut), files[1], row_group_size=group)
        assert histograms.count_files(files, BINS, threads=threads) == count(whole, BINS)
    handed = [b for part in (whole.slice(0, cut), whole.slice(cut)) for b in tasks(part)]
    assert histograms.merged(handed, BINS) == count(whole, BINS)


def tasks(part: pa.Table) -> Iterator[str]:
    for batch in histograms.count_batches(iter(part.to_batches(max_chunksize=4)), BINS):
        assert batch.schema == pa.schema({"counts": pa.string()})
        yield from batch.column(0).to_pylist()


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int16(), pa.int64(), pa.uint8(), pa.bool_()])
def test_every_number_is_counted_as_itself(kind: pa.DataType) -> None:
    column = pa.array([1, 0, None, 1], pa.int64()).cast(kind)
    assert Numeric((0.5,)).tally(column).tolist() == [1, 2, 1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_every_text_is_counted_as_itself(kind: pa.DataType) -> None:
    column = pa.array(["v", None, "u", "v", "other"], pa.string()).cast(kind)
    assert Category(("u", "v")).tally(column).tolist() == [1, 2, 1, 1]


def test_a_dictionary_may_hold_a_null_and_values_of_no_row() -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1], pa.int32()), pa.array(["u", None, "other"]))
    assert Category(("u", "v")).tally(column).tolist() == [1, 0, 0, 3]


def test_a_column_of_no_type_is_all_null() -> None:
    made = count(pa.table({"x": pa.nulls(3), "c": pa.nulls(3)}), BINS)
    assert made.nulls("x") == made.nulls("c") == 3


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"x": [1.0]}, "no column c"),
        ({"x": ["1"], "c": ["u"]}, "column x cannot be counted: it is string, not a number"),
        ({"x": [1.0], "c": [1]}, "column c cannot be counted: it is int64, not text"),
    ],
)
def test_a_column_that_is_gone_or_another_is_refused(columns: dict[str, list[Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        count(pa.table(columns), BINS)
    pq.write_table(pa.table(columns), tmp_path / "f.parquet")
    with pytest.raises(DataError, match=said):
        histograms.count_files([tmp_path / "f.parquet"], BINS)


def test_other_bins_are_not_merged() -> None:
    with pytest.raises(DataError, match="different bins"):
        histograms.nothing(BINS) + histograms.nothing({"x": Numeric((-1.0, 0.0)), "c": Category(("u", "v"))})


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("rows"),
        lambda d: d["columns"]["x"].pop("counts"),
        lambda d: d["columns"]["x"]["edges"].pop(),
        lambda d: d["columns"]["c"]["counts"].__setitem__(0, 7),
        lambda d: d["columns"].__setitem__("x", 3),
    ],
)
def test_what_is_no_histogram_is_refused(damage: Any) -> None:
    data = count(table([(1.0, "u"), (None, "v")]), BINS).to_dict()
    damage(data)
    with pytest.raises(DataError, match="not a histogram"):
        Counts.from_dict(data)


# -- bins --------------------------------------------------------------------------------------------


def test_deciles_hold_a_tenth_each() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    made = Numeric(histograms.edges(values))
    assert made.tally(pa.array(values)).tolist() == pytest.approx([1000] * 10 + [0], abs=1)


@pytest.mark.parametrize("constant", [0.0, -3.5, 1e300, 7.0])
def test_a_constant_has_a_bin_of_its_own(constant: float) -> None:
    made = Numeric(histograms.edges(np.full(50, constant)))
    moved = pa.array([constant, np.nextafter(constant, math.inf), np.nextafter(constant, -math.inf)])
    assert made.tally(moved).tolist() == [1, 1, 1, 0]


def test_a_value_of_many_rows_has_a_bin_of_its_own() -> None:
    values = np.concatenate([np.zeros(600), np.random.default_rng(0).uniform(0.1, 1, 400)])
    made = Numeric(histograms.edges(values))
    assert made.tally(pa.array([0.0, 0.0, 0.05]))[:3].tolist() == [0, 2, 1]


def test_bins_of_nothing_and_of_what_is_not_finite() -> None:
    assert histograms.edges(np.array([])) == ()
    assert histograms.edges(np.array([math.nan, math.inf])) == ()
    assert Numeric(()).tally(pa.array([1.0, None, math.inf])).tolist() == [2, 1]
    assert Numeric((0.0,)).tally(pa.array([-math.inf, math.inf])).tolist() == [1, 1, 0]


def test_bins_of_files_are_those_of_the_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = pa.table(
        {"x": pa.array(rng.normal(size=5000), mask=rng.random(5000) < 0.1), "c": rng.choice(["u", "v", "w"], 5000)}
    )
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(whole.slice(0, 1234), files[0], row_group_size=500)
    pq.write_table(whole.slice(1234), files[1], row_group_size=700)
    made = histograms.bins_of_files(files, ["x"], {"c": None})
    assert made == histograms.bins_of(whole)
    assert made["c"] == Category(("u", "v", "w"))
    assert histograms.bins_of_files(files, ["x"], {"c": ("v",)})["c"] == Category(("v",))


def test_bins_of_many_rows_come_from_a_draw_that_is_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(100_000.0)
    file = tmp_path / "f.parquet"
    pq.write_table(pa.table({"x": values}), file, row_group_size=9000)
    monkeypatch.setattr(histograms, "BIN_ROWS", 20_000)
    made = histograms.bins_of_files([file], ["x"], {})
    assert made == histograms.bins_of_files([file], ["x"], {}, threads=1)
    shares = histograms.count_files([file], made).of("x")[:10] / len(values)
    assert shares.sum() == 1
    assert shares == pytest.approx(0.1, abs=0.01)
    assert made != {"x": Numeric(histograms.edges(values))}


def test_what_has_too_many_values_is_no_category(tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    pq.write_table(pa.table({"c": [str(i) for i in range(10_001)]}), file, row_group_size=2000)
    with pytest.raises(DataError, match="c has more than 10,000 values"):
        histograms.bins_of_files([file], [], {"c": None})


def test_a_sample_is_by_key_as_in_training(tmp_path: Path) -> None:
    from orrery.data.tables import sample

    whole = pa.table({"key": [f"k{i}" for i in range(2000)], "x": np.arange(2000.0), "c": ["u"] * 2000})
    file = tmp_path / "f.parquet"
    pq.write_table(whole, file, row_group_size=300)
    made = histograms.count_files([file], BINS, share=0.3)
    assert made == count(sample(whole, 0.3), BINS)
    assert 0 < made.rows < 2000
