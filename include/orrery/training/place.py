"""Which process of a training this is, of how many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Rank of `world` processes, from 0. Those from `first` on, `here` of them, are on this node."""

    rank: int = 0
    world: int = 1
    first: int = 0
    here: int | None = None

    @property
    def local(self) -> int:
        """Which process of this node it is, from 0."""
        return self.rank - self.first

    @property
    def beside(self) -> int:
        """How many processes are on this node."""
        return self.world if self.here is None else self.here


@dataclass(frozen=True)
class Span:
    """A training on several nodes, as the ranks of one of them are told: `first`, `here` and `world` as in `Place`.

    All ranks meet at `host` and `port`, which is rank 0's.
    """

    first: int
    here: int
    world: int
    host: str
    port: int

    def place(self, local: int) -> Place:
        """Return the place of one of this node's processes."""
        return Place(self.first + local, self.world, self.first, self.here)


def backends(device: torch.device) -> str:
    """Return what the processes of a training on such devices talk over, as torch.distributed names it."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
