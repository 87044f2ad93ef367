"""A part's rows on a GPU: all of them kept there where they fit, else gathered ahead by a thread.

Either way the batches are the part's own, to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orrery.training import Dataset
from orrery.training.batches import Batch, InMemory, Part

AHEAD = 3  # batches that wait for the GPU
SHARE = 0.25  # of the GPU's free memory that a part may take; activations need the rest


def on_device(part: Part, device: torch.device) -> Part:
    """Return the part with its batches and chunks on `device`."""
    if device.type != "cuda":
        return part
    if isinstance(part, InMemory) and _nbytes(part.data) <= SHARE * torch.cuda.mem_get_info(device)[0]:
        return Resident(part, device)
    return Fed(part, device)


def _nbytes(data: Dataset) -> int:
    return int(data.numeric.nbytes + data.categorical.nbytes + data.label.nbytes)


class Resident(InMemory):
    """A part whose arrays are on the GPU: it gathers each batch itself, and the host only says in which order."""

    def __init__(self, part: InMemory, device: torch.device) -> None:
        super().__init__(part.data, part.seed, part.batch, part.place)
        arrays = (part.data.numeric, part.data.categorical, part.data.label)
        self._arrays = [torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays]
        self._device = device

    def _index(self, rows: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(self._device)  # an epoch's at once: each copy waits for the kernels before it

    def _take(self, rows: Tensor) -> Batch:
        return Batch(*(a.index_select(0, rows) for a in self._arrays))


class Fed:
    """A part whose batches a thread makes and pins while the GPU computes on those before."""

    def __init__(self, part: Part, device: torch.device) -> None:
        self.part, self.device = part, device

    @property
    def rows(self) -> int:
        """See `Part.rows`."""
        return self.part.rows

    @property
    def steps(self) -> int:
        """See `Part.steps`."""
        return self.part.steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Part.batches`."""
        return self._ahead(self.part.batches(epoch, start))

    def chunks(self) -> Iterator[Batch]:
        """See `Part.chunks`."""
        return self._ahead(self.part.chunks())

    def whole(self) -> Iterator[Batch]:
        """See `Part.whole`."""
        return self._ahead(self.part.whole())

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        def pinned() -> Batch | None:
            batch = next(batches, None)
            return None if batch is None else Batch(*(t.pin_memory() for t in batch))

        thread = ThreadPoolExecutor(1, "feed")
        try:
            waiting = deque(thread.submit(pinned) for _ in range(AHEAD))
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(pinned))
                yield batch.to(self.device)
        finally:
            thread.shutdown(cancel_futures=True)
