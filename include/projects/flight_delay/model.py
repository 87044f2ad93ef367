"""Entity embeddings beside the numbers, a small network on top, and a straight line past it.

    categorical [B, C] ids --embed--> [B, C x dim] --+
                                                     +--> hidden layer(s) --> logit [B]
    numeric [B, N] standardised ---------------------+                          ^
          +--------------------- linear ----------------------------------------+

The line keeps what logistic regression gets right already, also where a month lies outside what was seen;
the network adds what only holds together (a storm at this airport, for this carrier, in the evening).
"""

from __future__ import annotations

from typing import Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from orrery.training import tunable

# Beyond five standard deviations a number says "very much" and no more: a new season cannot shout the rest down.
WIDEST = 5.0


class Schema(Protocol):
    """What the engine tells about the features: ids per category (0 = unknown or missing), numbers after encoding."""

    @property
    def categorical(self) -> dict[str, int]: ...
    @property
    def numeric_width(self) -> int: ...


class Params(BaseModel):
    """What training may vary; `tune` searches the bounds."""

    dim: int = tunable(8, low=4, high=32)
    hidden: int = tunable(64, low=16, high=256)
    dropout: float = tunable(0.3, low=0.0, high=0.6)
    epochs: int = tunable(20, low=2, high=40)
    batch_size: int = tunable(512, low=128, high=8192)
    learning_rate: float = tunable(0.0005, low=0.0001, high=0.02, log=True)
    weight_decay: float = tunable(0.1, low=0.0001, high=1.0, log=True)


class WideAndDeep(nn.Module):
    """(numeric [B, N] float32, categorical [B, C] int64) -> logits [B] float32."""

    def __init__(self, sizes: list[int], numeric_width: int, params: Params) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, min(params.dim, (size + 1) // 2)) for size in sizes)
        width = numeric_width + sum(embedding.embedding_dim for embedding in self.embeddings)
        for embedding in self.embeddings:
            # Small, so that a rare category starts as a category that says nothing.
            nn.init.normal_(embedding.weight, std=0.05)
        self.deep = nn.Sequential(
            nn.Linear(width, params.hidden),
            nn.ReLU(),
            nn.Dropout(params.dropout),
            nn.Linear(params.hidden, params.hidden // 2),
            nn.ReLU(),
            nn.Dropout(params.dropout),
            nn.Linear(params.hidden // 2, 1),
        )
        self.wide = nn.Linear(width, 1)

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        embedded = [embed(categorical[:, column]) for column, embed in enumerate(self.embeddings)]
        known = torch.cat([numeric.clamp(-WIDEST, WIDEST), *embedded], dim=1)
        return (self.wide(known) + self.deep(known)).squeeze(1)


def build(schema: Schema, params: Params) -> nn.Module:
    """Return the module for these features; the engine trains it on binary cross-entropy with logits."""
    return WideAndDeep(list(schema.categorical.values()), schema.numeric_width, params)
