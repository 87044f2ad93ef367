"""A small network beside a straight line: what is fitted with products of area and cold, no line can tell."""

from __future__ import annotations

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from orrery.training import tunable
from orrery.training.schema import Schema


class Params(BaseModel):
    """What training may vary."""

    epochs: int = tunable(12, low=2, high=40)
    batch_size: int = tunable(256, low=64, high=1024)
    learning_rate: float = tunable(0.01, low=0.0001, high=0.1, log=True)


class Network(nn.Module):
    """(numeric [B, N] float32, categorical [B, C] int64) -> [B]."""

    def __init__(self, sizes: list[int], width: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, 4) for size in sizes)
        width += 4 * len(sizes)
        self.deep = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        self.wide = nn.Linear(width, 1)

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        known = torch.cat([numeric, *(e(categorical[:, i]) for i, e in enumerate(self.embeddings))], dim=1)
        return (self.wide(known) + self.deep(known)).squeeze(1)


def build(schema: Schema, params: Params) -> nn.Module:
    """Return the module for these features."""
    return Network(list(schema.categorical.values()), schema.numeric_width)
