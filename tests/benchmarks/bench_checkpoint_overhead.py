"""What checkpoints take from a training: Orrery's in the background against torch.save, which the training waits for.

A network whose weights and AdamW state are 240 MB trains on one core. The same steps are timed in three ways, in turns:
no saving; Orrery's saver at the interval that is best for one interruption per 15 minutes (Young, Daly), in the
service of which it measures its own cost; and torch.save to the same disk, synced, at its own best interval. All of it
counts: the copy, the thread's writing and hashing beside the steps, the commit, the removal of older checkpoints.
The share of time that saving takes is a save's cost over the interval. The cost is the larger of two: what the saver
tells, and how much longer a round of steps took, from the save until it was over, than as many steps of the round
before took without one (the median; a machine with other work on it makes this large).

    .venvs/ml/bin/python tests/benchmarks/bench_checkpoint_overhead.py
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from orrery.store import Store
from orrery.training.checkpoints import Checkpoints
from orrery.training.interval import optimum, overhead
from orrery.training.place import Place
from orrery.training.saving import ShardedSaver

BETWEEN_S = 900.0  # mean time between interruptions
ROUNDS, STEPS = 7, 16  # of each kind; a round of steps is much longer than a save in the background
WIDTH, LAYERS, ROWS = 1580, 8, 48  # 20 million parameters, three float32 each


class Training:
    """Steps that take as long as those of a small real training."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
        self.module = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)
        self.x = torch.randn(ROWS, WIDTH)

    def step(self) -> None:
        self.module(self.x).pow(2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Any]:
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def steps(self, save: Callable[[], None], over: Callable[[], bool]) -> tuple[float, int]:
        """Return seconds and steps of a round with one save after its first step; it lasts until the save is over."""
        began, done = time.perf_counter(), 1
        self.step()
        save()
        while done < STEPS or not over():
            self.step()
            done += 1
        return time.perf_counter() - began, done


def main() -> None:
    torch.set_num_threads(1)
    training = Training()
    training.step()
    size = sum(t.nbytes for t in training.module.parameters()) * 3
    room = tempfile.TemporaryDirectory(prefix="bench-checkpoints-")
    folder = Path(room.name)
    saver = ShardedSaver(Checkpoints(Store(f"file://{folder}/store"), "p/train/a/checkpoints"), Place(), folder / "s")
    at = {"step": 0}
    blocked: list[float] = []
    waited: list[float] = []

    def ours() -> None:
        at["step"] += 1
        saver.begin(at["step"], training.tensors(), {"step": at["step"]}, {})
        blocked.append(saver.cost())

    def theirs() -> None:
        began = time.perf_counter()
        path = folder / "torch.pt"
        with path.with_suffix(".part").open("wb") as f:
            torch.save(training.tensors(), f)
            f.flush()
            os.fsync(f.fileno())
        path.with_suffix(".part").replace(path)
        waited.append(time.perf_counter() - began)

    def nothing() -> None:
        pass

    ours()
    saver.wait()
    theirs()
    blocked.clear(), waited.clear()
    costs: dict[str, list[float]] = {"ours": [], "torch.save": []}
    for _ in range(ROUNDS):
        seconds, done = training.steps(nothing, lambda: True)
        step = seconds / done
        for kind, save, over in (("ours", ours, lambda: saver.wait(0)), ("torch.save", theirs, lambda: True)):
            seconds, done = training.steps(save, over)
            costs[kind].append(seconds - done * step)
    assert saver.committed() == ROUNDS + 1, "a save failed"
    longer = {kind: statistics.median(values) for kind, values in costs.items()}
    cost, their_cost = (
        max(longer["ours"], statistics.median(blocked)),
        max(longer["torch.save"], statistics.median(waited)),
    )
    every, their_every = optimum(cost, BETWEEN_S), optimum(their_cost, BETWEEN_S)
    share, their_share = cost / (every + cost), their_cost / (their_every + their_cost)
    against = f"torch.save, synced, {size / 1e6:.0f} MB of state"
    rows = [
        ("checkpoint_overhead", 100 * share, "% of time", 100 * their_share),
        ("checkpoint_cost", cost, "s per save", their_cost),
        ("checkpoint_blocked", statistics.median(blocked), "s stood still", statistics.median(waited)),
        ("checkpoint_interval", every, "s between", their_every),
        ("checkpoint_lost", 100 * overhead(cost, BETWEEN_S, every), "% in all", 100 * overhead(their_cost, BETWEEN_S, their_every)),
    ]  # fmt: skip
    told = {kind: [round(v, 3) for v in values] for kind, values in costs.items()}
    print(f"longer by: {told}; a step takes {step:.3f} s")
    print(
        json.dumps(
            [
                {
                    "name": n,
                    "value": v,
                    "unit": u,
                    "against": f"{against}: {t:.3g} (ratio: theirs to ours)",
                    "ratio": t / v,
                }
                for n, v, u, t in rows
            ]
        )
    )
    saver.close()
    room.cleanup()


if __name__ == "__main__":
    main()
