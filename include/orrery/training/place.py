"""Which process of a training this is, of how many."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Rank of `world` processes, from 0."""

    rank: int = 0
    world: int = 1
