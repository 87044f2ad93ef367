"""What checkpoints take from a training: Orrery's in the background against torch.save, which the training waits for.

A network whose weights and AdamW state are 240 MB trains on one core. The same steps are timed in three ways, in turns:
no saving; Orrery's saver at the interval that is best for one interruption per 15 minutes (Young, Daly), in the
service of which it measures its own cost; and torch.save to the same disk, synced, at its own best interval. All of it
counts: the copy, the thread's writing and hashing beside the steps, the commit, the removal of older checkpoints.
The share of time that saving takes is a save's cost over the interval, and the cost is measured twice: as the saver
tells it, and as the longer time of the very same steps.

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
ROUNDS, STEPS = 5, 20  # of each kind; a round of steps is much longer than a save in the background
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

    def steps(self, save: Callable[[], None], finish: Callable[[], None]) -> float:
        """Return the seconds of a round with one save after its first step, until the save is over as well."""
        began = time.perf_counter()
        self.step()
        save()
        for _ in range(STEPS - 1):
            self.step()
        finish()
        return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    training = Training()
    training.step()
    size = sum(t.nbytes for t in training.module.parameters()) * 3
    folder = Path(os.environ.get("BENCH_FOLDER") or tempfile.mkdtemp(prefix="bench-checkpoints-"))
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
    kinds: dict[str, tuple[Callable[[], None], Callable[[], Any]]] = {
        "none": (nothing, nothing), "ours": (ours, saver.wait), "torch.save": (theirs, nothing),
    }  # fmt: skip
    rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, (save, finish) in kinds.items():
            rounds[kind].append(training.steps(save, finish))
    assert saver.committed() == ROUNDS + 1, "a save failed"
    middle = {kind: statistics.median(times) for kind, times in rounds.items()}
    longer = {kind: max(1e-4, middle[kind] - middle["none"]) for kind in ("ours", "torch.save")}
    cost, their_cost = max(longer["ours"], statistics.median(blocked)), longer["torch.save"]
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
    print(f"rounds of {STEPS} steps, medians: " + ", ".join(f"{kind} {s:.3f} s" for kind, s in middle.items()))
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


if __name__ == "__main__":
    main()
