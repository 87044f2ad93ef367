"""On a machine with a GPU: bf16 throughput against a hand-written loop, what checkpoints cost, and SIGTERM.

    make bench-gpu        or        .venvs/ml/bin/python tests/benchmarks/bench_gpu.py [--device cpu] [--rows N]

One process, a network of four layers of 2,048, batches of 8,192 rows gathered from the host's memory, AdamW, autocast to
bfloat16. Both loops take turns. `--device cpu` tries the benchmark itself where there is no GPU; its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]
import bench_train  # noqa: E402
from interruptions import MODEL, Training  # noqa: E402
from training_bench import trips  # noqa: E402

from orrery.spec import Checkpoint  # noqa: E402
from orrery.store import Store  # noqa: E402
from orrery.training import Dataset, strategies  # noqa: E402
from orrery.training.batches import InMemory  # noqa: E402
from orrery.training.checkpoints import Checkpoints  # noqa: E402
from orrery.training.control import Control, Signals  # noqa: E402
from orrery.training.interval import Schedule  # noqa: E402
from orrery.training.place import Place  # noqa: E402
from orrery.training.saving import ShardedSaver  # noqa: E402
from orrery.training.settings import Settings  # noqa: E402
from orrery.training.trainer import Trainer  # noqa: E402

BATCH, TURNS = 8192, 3
HERE = Place()


class Wide(nn.Module):
    """Embeddings and numbers through four wide layers."""

    def __init__(self, hidden: int = 2048) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, 32) for n in bench_train.SIZES.values())
        widths = [bench_train.NUMBERS + 32 * len(bench_train.SIZES), *[hidden] * 4]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        self.deep = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        parts = [embed(categorical[:, i]) for i, embed in enumerate(self.embeddings)]
        out: torch.Tensor = self.deep(torch.cat([numeric, *parts], dim=1)).squeeze(1)
        return out


def network(data: Any, hidden: int) -> Any:
    net = bench_train.network(data)
    torch.manual_seed(0)
    net.module = Wide(hidden)
    return net


def ours(
    data: Any, fit: Dataset, tune: Dataset, device: torch.device, every: str, hidden: int
) -> tuple[float, float, int]:
    """Rows per second, seconds that the training stood still for saves, and how many there were."""
    settings = Settings(epochs=2, batch_size=BATCH, patience=99, precision="bf16")
    net = network(data, hidden)
    strategy = strategies.make(net.module, settings, HERE, device)
    with tempfile.TemporaryDirectory() as folder:
        saver = ShardedSaver(Checkpoints(Store(f"file://{folder}/store"), "c"), HERE, Path(folder) / "scratch")
        checkpoint = Checkpoint.model_validate({"every": every})
        trainer = Trainer(
            net, data, settings, HERE, strategy, saver, lambda step: Schedule(checkpoint, time.monotonic(), step),
            Control(HERE, Signals(25)), device,
        )  # fmt: skip
        began = time.perf_counter()
        trainer.fit(InMemory(fit, 0, BATCH, HERE), InMemory(tune, 0, BATCH, HERE))
        seconds = time.perf_counter() - began
        saver.close()
    return trainer.state.done * BATCH / seconds, trainer.clock.seconds["checkpoint"], trainer.saves


def bare(data: Any, fit: Dataset, tune: Dataset, device: torch.device, hidden: int) -> float:
    net = network(data, hidden).to(device)
    optimizer = torch.optim.AdamW(net.module.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    arrays = [torch.from_numpy(a) for a in (fit.numeric, fit.categorical, fit.label)]
    tuned = [torch.from_numpy(a) for a in (tune.numeric, tune.categorical, tune.label)]
    steps = fit.rows // BATCH
    began = time.perf_counter()
    for epoch in range(2):
        net.train()
        order = torch.randperm(fit.rows, generator=torch.Generator().manual_seed(epoch))
        for i in range(steps):
            x, c, y = (a[order[i * BATCH : (i + 1) * BATCH]].to(device) for a in arrays)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                output = net.module(net.inputs(x), c)
            optimizer.zero_grad()
            loss_of(output.float(), y).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            x, c, y = (a.to(device) for a in tuned)
            float(loss_of(net.module(net.inputs(x), c).float(), y))
    return 2 * steps * BATCH / (time.perf_counter() - began)


def stopped() -> tuple[float, bool]:
    """Seconds from SIGTERM to the end of a training's process, and whether the next attempt went on from there."""
    with tempfile.TemporaryDirectory() as folder:
        training = Training(
            Path(folder), trips(8000).append_column("row", trips(8000)["distance"]), "{patience: 999}", MODEL
        )
        process = training.start(overrides={"epochs": 5000})
        assert training.when(process, lambda: training.steps() > 200), training.text()
        began = time.perf_counter()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143, training.text()
        seconds = time.perf_counter() - began
        again = training.start(overrides={"epochs": 5000})
        went_on = training.when(again, lambda: "goes on from step" in training.text())
        os.killpg(again.pid, signal.SIGTERM)
        again.wait(60)
    return seconds, went_on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--hidden", type=int, default=2048)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU that torch can use; --device cpu tries the benchmark itself")
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    data = bench_train.made(args.rows)
    fit, tune = bench_train.parts(data)
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    stood, saves = 0.0, 0
    for turn in range(TURNS + 1):
        rate, still, count = ours(data, fit, tune, device, "2s", args.hidden)
        other = bare(data, fit, tune, device, args.hidden)
        if turn:
            rates["ours"].append(rate)
            rates["bare"].append(other)
            stood, saves = stood + still, saves + count
    middle = {name: statistics.median(values) for name, values in rates.items()}
    seconds, went_on = stopped()
    assert went_on
    report = [
        {"name": "gpu_train_vs_bare_loop", "value": round(middle["ours"]), "unit": "rows/s", "ratio": round(middle["ours"] / middle["bare"], 3),
         "against": f"a hand-written loop: {middle['bare']:,.0f} rows/s"},
        {"name": "gpu_checkpoint_blocked", "value": round(1000 * stood / max(1, saves), 1), "unit": "ms per save", "ratio": None,
         "against": "the training standing still, one save each 2 s"},
        {"name": "gpu_sigterm", "value": round(seconds, 2), "unit": "s to exit 143", "ratio": None, "against": "25 s of grace"},
    ]  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
