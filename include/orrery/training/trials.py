"""What a model's module must be able to do, tried on a few rows before the training begins."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from orrery.errors import SpecError
from orrery.training import Dataset, user_model
from orrery.training.network import Network

TRIED_ROWS = 32  # of one trial step: enough for a batch norm


def refuse_shape(network: Network, task: str, classes: int, data: Dataset) -> None:
    """Try the user's module on two rows. Raises `SpecError` when it fails or its output has another shape."""
    numeric, categorical = _tensors(data, 2)
    network.eval()
    with torch.inference_mode(), user_model.told("the module's forward", only_theirs=True):
        try:
            output = network.output(numeric, categorical)
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as e:
            shapes = f"numeric {list(network.inputs(numeric).shape)}, categorical {list(categorical.shape)}"
            raise SpecError(f"model.py: the module's forward fails on {shapes}: {type(e).__name__}: {e}") from e
    wanted = [len(numeric), classes] if task == "multiclass" else [len(numeric)]
    if not isinstance(output, Tensor) or list(output.shape) != wanted or output.dtype != torch.float32:
        got = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        form = "[B, classes]" if task == "multiclass" else "[B]"
        raise SpecError(f"model.py: the module returned {got} for {len(numeric)} rows; wanted torch.float32 {wanted}",
                        hint=f"{task}: forward(numeric, categorical) returns {form}")  # fmt: skip


def refuse_unused(network: Network, data: Dataset, processes: int) -> None:
    """Try one backward pass in training mode, on a copy. Raises `SpecError` when it fails, or reaches no parameter.

    One parameter without a gradient is harmless to one process; several wait for each other's gradients of it.
    """
    numeric, categorical = _tensors(data, TRIED_ROWS)
    with user_model.told("a training step of the module"):
        module = copy.deepcopy(network.module).train()
        output = module(network.inputs(numeric), categorical)
        if output.requires_grad:
            output.sum().backward()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    unused = [name for name, p in trainable.items() if p.grad is None]
    if unused and (processes > 1 or len(unused) == len(trainable)):
        few = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise SpecError(
            f"model.py: forward does not use {few}: no gradient reaches it, with {processes} processes",
            hint="use it in forward, leave it out, or set requires_grad_(False)",
        )


def _tensors(data: Dataset, rows: int) -> tuple[Tensor, Tensor]:
    numeric, categorical = (np.ascontiguousarray(a[:rows]) for a in (data.numeric, data.categorical))
    return torch.from_numpy(numeric), torch.from_numpy(categorical)
