"""A part read from shards: each row once an epoch, the same global batches on one process and on several, from any step.

Rows carry their own number as a value, so what a batch holds can be told.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orrery.errors import OrreryError, SpecError
from orrery.training import Dataset, shards, stream
from orrery.training.batches import CHUNK, Batch
from orrery.training.place import Place
from orrery.training.schema import Schema
from orrery.training.shards import Layout, Shards, Writer, layout
from orrery.training.stream import Streamed

SCHEMA = Schema(task="binary", numeric_columns=("row", "noise"), vocabularies={"gate": ("a", "b", "c"), "day": ("x",)})


def numbered(start: int, rows: int, schema: Schema = SCHEMA) -> Dataset:
    """Rows that hold their own number: as a number, as a label, and its remainders as ids."""
    n = np.arange(start, start + rows)
    numeric = np.stack([n, np.where(n % 7 == 0, np.nan, n * 0.5)], axis=1).astype(np.float32)
    label = n.astype(np.int64 if schema.task == "multiclass" else np.float32)
    return Dataset(numeric, np.stack([n % 4, n % 2], axis=1).astype(np.int64), label, schema)


def written(folder: Path, rows: int, groups: int, piece: int = 1000, schema: Schema = SCHEMA) -> Shards:
    with Writer(folder / "part.parquet", schema, Layout(rows, groups)) as writer:
        for start in range(0, rows, piece):
            writer.add(numbered(start, min(piece, rows - start), schema))
    return writer.shards


def numbers(batch: Batch) -> list[int]:
    """The rows of a batch; all its columns have to be of the same ones."""
    n = batch.label.numpy().astype(np.int64)
    wanted = numbered(0, int(n.max()) + 1 if len(n) else 1)
    np.testing.assert_array_equal(batch.numeric.numpy(), wanted.numeric[n])
    np.testing.assert_array_equal(batch.categorical.numpy(), wanted.categorical[n])
    return [int(x) for x in n]


def epoch(made: Shards, world: int, lanes: int, size: int = 64, number: int = 1, start: int = 0) -> list[list[int]]:
    """The rows of every global batch, over all processes of a world."""
    every = [list(Streamed(made, 5, size, Place(r, world), lanes).batches(number, start)) for r in range(world)]
    assert len({len(e) for e in every}) == 1
    assert len({b.rows for e in every for b in e}) <= 1
    return [sorted(n for e in every for n in numbers(e[i])) for i in range(len(every[0]))]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW_BYTES", 12 * 1024)


@given(st.integers(40, 3000), st.integers(1, 9), st.sampled_from([1, 2, 3, 4]), st.integers(1, 40), st.integers(1, 700))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_is_in_an_epoch_once_but_for_the_stated_remainder(
    tmp_path: Path, rows: int, deck: int, lanes: int, share: int, piece: int
) -> None:
    made = written(tmp_path, rows, deck * lanes, piece)
    if rows < deck * lanes:
        return
    part = Streamed(made, 5, share * lanes, Place(), lanes)
    batches = epoch(made, 1, lanes, share * lanes)
    flat = [n for b in batches for n in b]
    assert len(flat) == len(set(flat))
    assert len(batches) == part.steps and {len(b) for b in batches} == {part.batch}
    # Each lane's last share is cut, and its groups may have a row more than the smallest.
    assert rows - len(flat) < part.batch + deck * lanes


@pytest.mark.parametrize(("lanes", "worlds"), [(2, [1, 2]), (4, [1, 2, 4])])
def test_global_batches_do_not_depend_on_the_number_of_processes(tmp_path: Path, lanes: int, worlds: list[int]) -> None:
    made = written(tmp_path, 2003, 20)
    wanted = epoch(made, 1, lanes)
    assert all(epoch(made, world, lanes) == wanted for world in worlds)
    assert epoch(made, 1, lanes, number=2) != wanted


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_goes_on_from_any_batch(tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(tmp_path, 2003, 20)
    wanted = epoch(made, world, 2)
    assert len(wanted) > 25
    for start in range(len(wanted) + 1):
        assert epoch(made, world, 2, start=start) == wanted[start:]
    read: list[int] = []
    whole = Shards.read
    monkeypatch.setattr(
        Shards, "read", lambda self, groups, file=None: read.extend(groups) or whole(self, groups, file)
    )
    epoch(made, 1, 2, start=len(wanted) - 1)
    assert 0 < len(read) <= 6, "the windows before were read as well"


def test_a_batch_holds_rows_from_all_over_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW_BYTES", 60_000)
    made = written(tmp_path, 20_000, 100)
    assert Streamed(made, 5, 64, Place(), 1)._windows == 10
    spread = [np.std(b) / (20_000 / np.sqrt(12)) for b in epoch(made, 1, 1)]
    # A window is ten groups of a hundred here: as wide as uniform draws, but for chance.
    assert 0.85 < np.mean(spread) < 1.1
    assert min(spread) > 0.4
    neighbours = [b - a == 1 for batch in epoch(made, 1, 1) for a, b in pairwise(batch)]
    assert np.mean(neighbours) < 0.2, "a batch is a slice of the table"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_chunks_hold_every_row_once_and_are_equally_many(
    tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK", 50)
    made = written(tmp_path, 1202, 12)  # groups of 100 and 101 rows: some have two chunks, some three
    every = [list(Streamed(made, 0, 64, Place(r, world), 6).chunks()) for r in range(world)]
    assert len({len(e) for e in every}) == 1
    assert sorted(n for e in every for b in e for n in numbers(b)) == list(range(1202))
    assert max(b.rows for e in every for b in e) <= 50 < CHUNK
    whole = [n for b in Streamed(made, 0, 64, Place(1, 2), 6).whole() for n in numbers(b)]
    assert whole == list(range(1202))


def test_no_more_than_two_windows_are_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(tmp_path, 20_000, 100)
    part, begun = Streamed(made, 5, 64, Place(), 1), threading.Semaphore(0)
    count, whole = [0], Streamed._window

    def window(self: Streamed, *given: object) -> Dataset:
        count[0] += 1
        begun.release()
        return whole(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Streamed, "_window", window)
    batches = part.batches(1)
    for taken, batch in enumerate(batches):
        used = taken * batch.rows // (20_000 // part._windows - 200)
        assert count[0] <= used + 2
        if taken > 40:
            break
    batches.close()  # a caller that has enough
    assert not [t for t in threading.enumerate() if t.name.startswith("orrery-read")]


def test_a_reader_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(tmp_path, 20_000, 100)
    batches = Streamed(made, 5, 64, Place(), 1).batches(1)
    next(batches)

    def broken(*given: object) -> Dataset:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Shards, "read", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        list(batches)


def test_other_processes_than_divide_the_lanes_are_refused(tmp_path: Path) -> None:
    made = written(tmp_path, 1000, 12)
    with pytest.raises(SpecError, match="3 processes cannot share 12 row groups dealt to 4 lanes"):
        Streamed(made, 0, 64, Place(0, 3), 4)
    with pytest.raises(SpecError, match="dealt to 5 lanes"):
        Streamed(made, 0, 64, Place(), 5)
    with pytest.raises(SpecError, match="a batch of 3 rows"):
        Streamed(made, 0, 3, Place(), 4)


def test_the_layout_is_equal_groups_of_half_a_megabyte(tmp_path: Path) -> None:
    large = layout(5_000_000, SCHEMA, 3)
    assert large.groups % 3 == 0
    assert sum(large.size(g) for g in range(large.groups)) == 5_000_000
    assert {large.size(g) for g in range(large.groups)} <= {large.largest, large.largest - 1}
    assert 0.9 < large.largest * shards.row_bytes(SCHEMA) / shards.GROUP_BYTES < 1.1
    assert layout(10, SCHEMA, 4).groups == 4


@pytest.mark.parametrize("task", ["binary", "regression", "multiclass"])
def test_what_was_written_is_read(tmp_path: Path, task: str) -> None:
    schema = SCHEMA.model_copy(update={"task": task})
    made = written(tmp_path, 1234, 7, piece=100, schema=schema)
    wanted = numbered(0, 1234, schema)
    for found, rows in ((made.read(range(7)), 1234), (made.head(300), 300), (made.head(9999), 1234)):
        for name in ("numeric", "categorical", "label"):
            array = getattr(found, name)
            np.testing.assert_array_equal(array, getattr(wanted, name)[:rows])
            assert array.dtype == getattr(wanted, name).dtype
    assert made.open().metadata.num_row_groups == 7
    spread = made.spread(3 * made.layout.largest * shards.row_bytes(schema)).label
    assert len(spread) == 3 * 177 - 2 and spread[0] == 0 and spread[-1] == 1233


def test_a_part_of_another_size_than_announced_is_a_bug(tmp_path: Path) -> None:
    for rows in (90, 110):
        with (
            pytest.raises(OrreryError, match="part.parquet"),
            Writer(tmp_path / "part.parquet", SCHEMA, Layout(100, 4)) as writer,
        ):
            writer.add(numbered(0, rows))
