"""The two modules around a user's: raw inputs made ready before it, a calibrated prediction after it.

    numeric, categorical -> Inputs -> the user's module -> logits -> Head -> prediction

All of it is in the exported graph, so serving cannot prepare its inputs in another way than training did.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from orrery.training.schema import Schema


class Inputs(nn.Module):
    """Numeric [N, n] with NaN -> [N, schema.numeric_width]: standardised, NaN as 0, then the is-missing columns."""

    def __init__(self, schema: Schema, mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean.astype(np.float32)))
        self.register_buffer("std", torch.from_numpy(std.astype(np.float32)))
        where = [schema.numeric.index(name) for name in schema.missing]
        self.register_buffer("where", torch.tensor(where, dtype=torch.int64))

    def forward(self, numeric: Tensor) -> Tensor:
        """Return what the user's module sees."""
        missing = torch.isnan(numeric)
        standard = torch.where(missing, torch.zeros_like(numeric), (numeric - self.mean) / self.std)
        if self.where.shape[0] == 0:
            return standard
        return torch.cat([standard, missing.index_select(1, self.where).to(numeric.dtype)], dim=1)


class Head(nn.Module):
    """Output of the user's module -> prediction: `scale` and `shift` calibrate, or restore the target's units."""

    def __init__(self, task: str, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.task = task
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32))

    def forward(self, output: Tensor) -> Tensor:
        """Return probabilities (binary [N], multiclass [N, C]) or values [N]."""
        scaled = output * self.scale + self.shift
        if self.task == "binary":
            return torch.sigmoid(scaled)
        return torch.softmax(scaled, dim=1) if self.task == "multiclass" else scaled


class Network(nn.Module):
    """The whole of it; an input whose list is empty is left out of the call."""

    def __init__(self, schema: Schema, inputs: Inputs, module: nn.Module, head: Head) -> None:
        super().__init__()
        self.inputs, self.module, self.head = inputs, module, head
        self.has_numeric, self.has_categorical = bool(schema.numeric), bool(schema.categorical)

    def output(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        """Return the user's module's output: logits, or the standardised value."""
        return self.module(self.inputs(numeric), categorical)

    def forward(self, *given: Tensor) -> Tensor:
        """Return predictions for the inputs that the schema has, numeric first."""
        rows = given[0].shape[0]
        numeric = given[0] if self.has_numeric else torch.zeros((rows, 0), dtype=torch.float32)
        categorical = given[-1] if self.has_categorical else torch.zeros((rows, 0), dtype=torch.int64)
        return self.head(self.output(numeric, categorical))
