"""How the processes of a training share the work: one process alone, DDP, or FSDP2. (DeepSpeed's ZeRO: `zero`.)

A strategy owns the optimizer. What it is given are losses of microbatches that add up to this process's mean loss over
its share of the global batch; it averages the gradients over the processes. So `batch_size` rows make one step however
many processes there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from orrery.training.place import Place
from orrery.training.settings import Settings

# Parameters from which a module of a list (a transformer's block) is sharded apart: below, gathering costs more.
SHARD_FROM = 1_000_000


class Strategy(Protocol):
    """What the trainer needs of a way to share the work."""

    replica: nn.Module
    optimizer: torch.optim.Optimizer

    def prepare(self, *, last: bool) -> None:
        """Before a microbatch's forward; `last`: with it the step's gradients are complete, and are averaged."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a microbatch's gradients."""
        ...

    def step(self, *, norm: bool = True) -> Tensor | None:
        """Clip, step, forget the gradients. Returns their norm before clipping, when it is known or asked for."""
        ...

    def tensors(self) -> dict[str, Any]:
        """Return what a checkpoint holds of weights and optimizer, as torch.distributed.checkpoint takes it."""
        ...

    def forget(self) -> None:
        """Undo what `tensors` has done to a fresh optimizer: there was no checkpoint to fill it."""
        ...

    def restore(self, tensors: dict[str, Any]) -> None:
        """Take up what a checkpoint held, after it was read into `tensors()`."""
        ...

    def copy(self) -> dict[str, Any]:
        """Return a copy of the weights as they are here: each process its part, when they are in parts."""
        ...

    def whole(self, copy: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a copy's weights whole, on the CPU, on rank 0; nothing elsewhere. Collective."""
        ...


def make(module: nn.Module, settings: Settings, place: Place, device: torch.device) -> Strategy:
    """Return the strategy that the settings name. The module is moved to `device` and may be changed in place."""
    if settings.strategy.startswith("zero"):
        from orrery.training import zero

        stage = {"zero1": 1, "zero2": 2, "zero3": 3}[settings.strategy]
        return zero.ZeroStrategy(
            module.to(device),
            stage,  # type: ignore[arg-type]
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
        )
    return Torch(module.to(device), settings, place, device)


class Torch:
    """single, ddp and fsdp: torch's own."""

    def __init__(self, module: nn.Module, settings: Settings, place: Place, device: torch.device) -> None:
        self.module, self.settings, self.place = module, settings, place
        if settings.compile:
            module.compile()
        self._sharded = settings.strategy == "fsdp"
        self.replica = self._replicated(module, device)
        # fused: one kernel for all parameters, a third of the step's time for small networks on a CPU.
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.replica.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self._buffers = list(module.buffers())
        self._parameters = [p for p in self.replica.parameters() if p.requires_grad]

    def _replicated(self, module: nn.Module, device: torch.device) -> nn.Module:
        if self._sharded:
            mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (self.place.world,))
            for part in module.modules():
                if isinstance(part, nn.ModuleList):
                    for block in part:
                        if sum(p.numel() for p in block.parameters()) >= SHARD_FROM:
                            fully_shard(block, mesh=mesh)
            return fully_shard(module, mesh=mesh)
        if self.place.world == 1:
            return module
        devices = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def prepare(self, *, last: bool) -> None:
        """See `Strategy.prepare`."""
        if isinstance(self.replica, FSDPModule):
            self.replica.set_requires_gradient_sync(last)
            for buffer in self._buffers:  # rank 0's count, as DDP has it
                torch.distributed.broadcast(buffer, 0)
        elif isinstance(self.replica, nn.parallel.DistributedDataParallel):
            self.replica.require_backward_grad_sync = last  # what its no_sync() sets; it is read in forward

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy.backward`."""
        loss.backward()

    def step(self, *, norm: bool = True) -> Tensor | None:
        """See `Strategy.step`."""
        found: Tensor | None = None
        if self.settings.clip is not None:
            found = nn.utils.clip_grad_norm_(self._parameters, self.settings.clip)
        elif norm:
            found = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found.full_tensor() if isinstance(found, DTensor) else found

    def tensors(self) -> dict[str, Any]:
        """See `Strategy.tensors`."""
        model, optimizer = states.get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def forget(self) -> None:
        """See `Strategy.forget`: torch fills an empty state by a step of rate 0, which counts as a step."""
        self.optimizer.state.clear()

    def restore(self, tensors: dict[str, Any]) -> None:
        """See `Strategy.restore`."""
        states.set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )

    def copy(self) -> dict[str, Any]:
        """See `Strategy.copy`."""
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def whole(self, copy: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Strategy.whole`."""
        found: dict[str, Tensor] = {}
        for name, value in copy.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.place.rank == 0:
                found[name] = full.cpu()
        return found
