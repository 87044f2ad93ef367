"""The rows of one part as a process takes them: its share of every global batch, in an order that (seed, epoch) give.

The order does not depend on the number of processes: rank r of w takes rows r, r+w, ... of each global batch. So a
position is one number, the batch's, and a training may go on with other processes than it began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orrery.training import Dataset
from orrery.training.place import Place

CHUNK = 8192  # rows of one forward pass where no gradient is needed


class Batch(NamedTuple):
    """Some rows: numeric float32 [n, N], categorical int64 [n, C], label float32 or int64 [n]."""

    numeric: Tensor
    categorical: Tensor
    label: Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.label)

    def to(self, device: torch.device) -> Batch:
        """Return the rows on a device; from pinned memory without waiting for it."""
        return Batch(*(t.to(device, non_blocking=True) for t in self))


class Part(Protocol):
    """One part (fit or tune) of a window, as one process sees it."""

    @property
    def rows(self) -> int:
        """Rows of the whole part, over all processes."""
        ...

    @property
    def steps(self) -> int:
        """Global batches of an epoch. A last, smaller one is left out: the next epoch's order uses its rows."""
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this process's share of an epoch's global batches, from batch `start` on."""
        ...

    def chunks(self) -> Iterator[Batch]:
        """Yield this process's share of all rows, at most `CHUNK` at a time, equally many chunks on every process.

        A chunk may be empty. All processes' chunks together hold every row once.
        """
        ...

    def whole(self) -> Iterator[Batch]:
        """Yield all rows in order, whatever the process."""
        ...


class InMemory:
    """A part whose arrays are in memory, or mapped: an epoch is one full permutation."""

    def __init__(self, data: Dataset, seed: int, batch_size: int, place: Place) -> None:
        self.data, self.seed, self.place = data, seed, place
        self.batch = min(batch_size, data.rows - data.rows % place.world)

    @property
    def rows(self) -> int:
        """Rows of the whole part."""
        return self.data.rows

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return self.rows // self.batch

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Part.batches`."""
        order = self._index(np.random.default_rng((self.seed, epoch)).permutation(self.rows))
        for step in range(start, self.steps):
            rows = order[step * self.batch : (step + 1) * self.batch]
            yield self._take(rows[self.place.rank :: self.place.world])

    def chunks(self) -> Iterator[Batch]:
        """See `Part.chunks`."""
        mine = self._index(np.arange(self.place.rank, self.rows, self.place.world))
        longest = -(-self.rows // self.place.world)
        for start in range(0, longest, CHUNK):
            yield self._take(mine[start : start + CHUNK])

    def whole(self) -> Iterator[Batch]:
        """See `Part.whole`."""
        for start in range(0, self.rows, CHUNK):
            yield self._take(self._index(np.arange(start, min(start + CHUNK, self.rows))))

    def _index(self, rows: npt.NDArray[np.int64]) -> Any:
        """Return row numbers in the form in which `_take` is given slices of them."""
        return rows

    def _take(self, rows: Any) -> Batch:
        arrays = (self.data.numeric[rows], self.data.categorical[rows], self.data.label[rows])
        return Batch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
