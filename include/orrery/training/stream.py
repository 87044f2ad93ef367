"""A part that is too large for memory, read from its shards in an order that is nearly a full shuffle.

Every epoch deals the row groups, in an order drawn from (seed, epoch), to `lanes`, the number of processes that the
spec asks for. A lane reads its groups through a window of many, shuffles the window's rows and passes on to the next.
Every global batch takes the same number of rows from every lane, and a process works off the lanes rank, rank + world,
...: so which rows are in global batch b follows from (seed, epoch) alone, on any number of processes that divides the
lanes, and going on from batch b reads no window before it.

An epoch has each row at most once. Left out are fewer than one global batch and one row per group; the next epoch
draws anew which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from orrery.errors import SpecError
from orrery.training import Dataset
from orrery.training.batches import CHUNK, Batch
from orrery.training.place import Place
from orrery.training.shards import Shards, cut, join, row_bytes

T = TypeVar("T")
WINDOW_BYTES = 64 << 20  # of all lanes together: rows are shuffled as widely whatever their number


class Streamed:
    """A part in shards, as one process sees it (see `batches.Part`). At most two windows per lane are in memory."""

    def __init__(self, shards: Shards, seed: int, batch_size: int, place: Place, lanes: int) -> None:
        groups = shards.layout.groups
        if lanes % place.world or groups % lanes:
            raise SpecError(
                f"{place.world} processes cannot share {groups} row groups dealt to {lanes} lanes",
                hint="go on with the spec's train.processes, or with a number that divides it",
            )
        self.shards, self.seed, self.place, self.lanes = shards, seed, place, lanes
        self._deck = groups // lanes
        # Every lane has at least so many rows, whichever groups it is dealt.
        self._least = shards.rows // groups * self._deck
        self.share = min(batch_size // lanes, self._least)
        if self.share < 1:
            raise SpecError(f"a batch of {batch_size} rows of {shards.rows} cannot be shared by {lanes} processes",
                            hint="a larger batch_size, or fewer train.processes")  # fmt: skip
        largest = row_bytes(shards.schema) * shards.layout.largest
        self._windows = -(-self._deck // max(1, WINDOW_BYTES // lanes // largest))

    @property
    def rows(self) -> int:
        """Rows of the whole part."""
        return self.shards.rows

    @property
    def batch(self) -> int:
        """Rows of a global batch."""
        return self.share * self.lanes

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return self._least // self.share

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Part.batches`. What is not read yet is decoded by a thread while the caller trains."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.shards.layout.groups)
        file = self.shards.open()
        with ThreadPoolExecutor(1, "orrery-read") as pool:
            mine = range(self.place.rank, self.lanes, self.place.world)
            lanes = [self._lane(file, pool, order[i :: self.lanes], (self.seed, epoch, i), start) for i in mine]
            for _ in range(start, self.steps):
                yield _batch(join([next(lane) for lane in lanes]))

    def _lane(
        self, file: pq.ParquetFile, pool: ThreadPoolExecutor, deck: npt.NDArray[np.int64], key: tuple[int, int, int],
        start: int,
    ) -> Iterator[Dataset]:  # fmt: skip
        """Yield a lane's shares of the global batches from `start` on, each of `share` rows."""
        jobs, skip = [], start * self.share
        for i, groups in enumerate(np.array_split(deck, self._windows)):
            rows = sum(self.shards.layout.size(int(g)) for g in groups)
            if skip < rows:
                jobs.append(partial(self._window, file, groups, (*key, i), skip))
            skip = max(0, skip - rows)
        rest: list[Dataset] = []
        for data in ahead(pool, jobs):
            at = self.share - sum(d.rows for d in rest)
            if data.rows < at:
                rest.append(data)
                continue
            yield join([*rest, cut(data, slice(0, at))])
            while at + self.share <= data.rows:
                yield cut(data, slice(at, at + self.share))
                at += self.share
            # A copy: a view would keep the whole window in memory.
            rest = [cut(data, np.arange(at, data.rows))]
            del data

    def _window(self, file: pq.ParquetFile, groups: npt.NDArray[np.int64], key: tuple[int, ...], skip: int) -> Dataset:
        """Read groups, shuffle their rows together, and leave out the first `skip` of them."""
        data = self.shards.read([int(g) for g in groups], file)
        return cut(data, np.random.default_rng(key).permutation(data.rows)[skip:])

    def chunks(self) -> Iterator[Batch]:
        """See `Part.chunks`."""
        mine = range(self.place.rank, self.shards.layout.groups, self.place.world)
        for data in self._groups(mine):
            # By the largest group: equally many chunks on every process.
            for start in range(0, self.shards.layout.largest, CHUNK):
                yield _batch(cut(data, slice(start, start + CHUNK)))

    def whole(self) -> Iterator[Batch]:
        """See `Part.whole`."""
        for data in self._groups(range(self.shards.layout.groups)):
            for start in range(0, data.rows, CHUNK):
                yield _batch(cut(data, slice(start, start + CHUNK)))

    def _groups(self, groups: Iterable[int]) -> Iterator[Dataset]:
        file = self.shards.open()
        with ThreadPoolExecutor(1, "orrery-read") as pool:
            yield from ahead(pool, [partial(self.shards.read, [g], file) for g in groups])


def ahead(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield what the jobs return, in order; while the caller is busy with one, the next is being done."""
    waiting: Future[T] | None = None
    for job in jobs:
        after = pool.submit(job)
        if waiting is not None:
            yield waiting.result()
        waiting = after
    if waiting is not None:
        yield waiting.result()


def _batch(data: Dataset) -> Batch:
    arrays = (data.numeric, data.categorical, data.label)
    return Batch(*(torch.from_numpy(a) for a in arrays))
