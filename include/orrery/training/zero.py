"""DeepSpeed's ZeRO: optimizer state (1), gradients too (2), and weights too (3) are shared out among the processes.

What a process has of a parameter is a run of its flattened elements. These runs, of the weights and of the
optimizer's state, are what a checkpoint holds (`staging.Fragment`), so the saver is the one of all strategies: it
writes in the background and reshards. DeepSpeed's own checkpoints are pickles, written while the training waits.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orrery.errors import OrreryError
from orrery.training.place import backends
from orrery.training.staging import Fragment

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class ZeroStrategy:
    """Trains `module` by AdamW under ZeRO of a stage, on gloo and CPUs, or NCCL and GPUs. Weights stay float32."""

    def __init__(
        self, module: nn.Module, stage: Literal[1, 2, 3], *, learning_rate: float, weight_decay: float,
        clip: float | None = None,
    ) -> None:  # fmt: skip
        self.stage = stage
        device = next(module.parameters()).device
        deepspeed = imported(device.type == "cuda")
        self._owns_group = not dist.is_initialized()
        if self._owns_group:  # ZeRO wants a group also where it is one process
            dist.init_process_group(backends(device), store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # torchrun sets it; DeepSpeed asks for it
        trainable = [p for p in module.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=adamw, dist_init_required=False, config=_config(stage, clip)
        )
        self._sharded: Any = self._engine.optimizer
        self.replica: nn.Module = self._engine
        self.optimizer: torch.optim.Optimizer = self._sharded.optimizer

    def prepare(self, *, last: bool) -> None:
        """See `Strategy.prepare`: DeepSpeed asks before the backward pass."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a microbatch's gradients; with `last` this step's gradients are complete."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, *, norm: bool = True) -> Tensor | None:
        """Clip, take the optimizer's step, and return the gradients' norm before clipping."""
        self._engine.step()
        if not norm:
            return None
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)

    def tensors(self) -> dict[str, Any]:
        """Return what a checkpoint holds: this process's runs, in place, and the whole buffers."""
        self._need_moments()
        parameters = list(self._parameters())
        moments = {key: {name: self._fragment(p, key) for name, p in parameters} for key in MOMENTS}
        steps = [self.optimizer.state[flat]["step"] for flat in self._flats()]
        model = {name: self._fragment(p, None) for name, p in parameters}
        return {
            "model": {**model, **dict(self._engine.module.named_buffers())},
            "optimizer": {**moments, "step": float(steps[0])},
        }

    def restore(self, tensors: dict[str, Any]) -> None:
        """Take over what was loaded into `tensors` (the runs are in place already), on all processes."""
        with torch.no_grad():
            mine = self.tensors()
            for name, value in tensors["model"].items():
                if value is not mine["model"][name]:
                    mine["model"][name].copy_(value)
            if "optimizer" in tensors:
                for key in MOMENTS:
                    for name, value in tensors["optimizer"][key].items():
                        mine["optimizer"][key][name].copy_(value)
                for flat in self._flats():
                    self.optimizer.state[flat]["step"].fill_(tensors["optimizer"]["step"])
            self._spread()

    def forget(self) -> None:
        """See `Strategy.forget`: moments of zeros at step 0 are what a fresh optimizer begins with."""

    def copy(self) -> dict[str, Any]:
        """See `Strategy.copy`: this process's runs of the parameters, and the buffers."""
        runs = {name: dataclasses.replace(run, flat=run.flat.clone()) for name, run in self._runs()}
        return {**runs, **{name: b.detach().clone() for name, b in self._engine.module.named_buffers()}}

    def whole(self, copy: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Strategy.whole`. The module is left with that copy's weights: the training is over."""
        mine = self.tensors()["model"]
        for name, value in copy.items():
            mine[name].copy_(value)
        self._spread()
        return self.weights()

    def weights(self) -> dict[str, Tensor]:
        """Return the whole state dict on the CPU, on rank 0, and nothing elsewhere. All processes call it."""
        module = self._engine.module
        first = dist.get_rank() == 0
        if self.stage < 3:
            return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()} if first else {}
        import deepspeed

        whole: dict[str, Tensor] = {}
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, value in module.state_dict(keep_vars=True).items():
            if name not in parameters:
                whole[name] = value.detach().cpu().clone()
                continue
            with deepspeed.zero.GatheredParameters([value]):  # one at a time: the whole may not fit
                if first:
                    whole[name] = value.detach().cpu().clone()
        return whole if first else {}

    def close(self) -> None:
        """Let go of what DeepSpeed holds."""
        self._engine.destroy()
        if self._owns_group:
            dist.destroy_process_group()

    def _runs(self) -> Iterator[tuple[str, Fragment]]:
        return ((name, self._fragment(p, None)) for name, p in self._parameters())

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Frozen parameters follow from the seed, and are in no checkpoint."""
        return ((name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad)

    def _flats(self) -> list[Tensor]:
        """Return the flat partitions that the optimizer steps."""
        own = self._sharded.fp32_partitioned_groups_flat if self.stage == 3 else None
        flats: list[Tensor] = list(own if own is not None else self._sharded.single_partition_of_fp32_groups)
        return flats

    def _fragment(self, parameter: Any, key: str | None) -> Fragment:
        """Return this process's run of a parameter, or of one of its moments, as a view."""
        if self.stage == 3:
            flat, _ = self._sharded._get_fp32_opt_state_partition(parameter, False, key)
            start = flat.numel() * dist.get_rank()  # every process has as many, the last ones padding
            real = max(0, min(flat.numel(), parameter.ds_numel - start))
            return Fragment(flat.detach()[:real], min(start, parameter.ds_numel), parameter.ds_numel)
        mapping = parameter._hp_mapping
        if mapping is None:
            empty = torch.empty(0, dtype=torch.float32, device=parameter.device)
            return Fragment(empty, parameter.numel(), parameter.numel())
        flat = mapping.get_hp_fragment(key) if key else mapping.hp_fragment
        return Fragment(flat.detach(), mapping.lp_fragment_address.start, parameter.numel())

    def _need_moments(self) -> None:
        """Make the optimizer's state where no step has been taken: a checkpoint is loaded into it."""
        for flat in self._flats():
            state = self.optimizer.state[flat]
            if "exp_avg" not in state:
                state.update({key: torch.zeros_like(flat) for key in MOMENTS}, step=torch.zeros(()))
        if self.stage < 3:
            self._sharded._lazy_init_hp_params_optimizer_state()

    def _spread(self) -> None:
        """Bring the weights that the forward pass uses to what the partitions are now."""
        if self.stage < 3:
            self._sharded.update_lp_params()
            return
        for group in range(len(self._flats())):
            self._sharded._reassign_or_swap_out_partitioned_parameters(group)
        if kept := self._sharded.persistent_parameters:  # small ones that every process has whole
            kept[0].partition(kept)
            kept[0].all_gather(kept)


def _config(stage: int, clip: float | None) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and used for its own timers only
        "gradient_accumulation_steps": 1,  # `backward` says which microbatch is the last
        "gradient_clipping": clip or 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def imported(cuda: bool) -> Any:
    """Import DeepSpeed and all that it imports later (10 s): on CPUs do it before the fork, once for all processes.

    Its kernel for shared memory is left out: it is compiled when first used (a minute, a compiler), and a build that
    was killed leaves a lock at which every later training waits for ever.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    try:
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer  # torch's compiler, which every engine asks for
    except ImportError as e:
        raise OrreryError(
            f"strategy zero needs DeepSpeed: {e}", hint="install the environment of this step anew"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls by their old names what torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
