"""On a machine with a GPU: bf16 throughput against a hand-written loop, what checkpoints cost, and SIGTERM.

    make bench-gpu        or        .venvs/ml/bin/python tests/benchmarks/bench_gpu.py [--device cpu] [--rows N]

One process, a network of four layers of 2,048, batches of 8,192 rows gathered from the host's memory, AdamW, autocast to
bfloat16. Both loops take turns. Orrery's is as a training has it: deterministic kernels, one thread, saving every two
seconds; the other has torch's defaults and saves nothing. `--device cpu` tries the benchmark itself where there is no GPU; its figures say nothing.
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
from orrery.training.feed import on_device  # noqa: E402
from orrery.training.interval import Schedule  # noqa: E402
from orrery.training.place import Place  # noqa: E402
from orrery.training.saving import ShardedSaver  # noqa: E402
from orrery.training.settings import Settings  # noqa: E402
from orrery.training.trainer import Trainer  # noqa: E402
from orrery.training.worker import deterministic  # noqa: E402

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a training has it
BATCH, EPOCHS, TURNS = 8192, 6, 3
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


class Timed(ShardedSaver):
    """Tells how long the training stood still at each save."""

    stood: list[float]

    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self.stood.append(self._blocked)


def ours(
    data: Any, fit: Dataset, tune: Dataset, device: torch.device, every: str, hidden: int
) -> tuple[float, list[float], float]:
    """Rows per second, seconds that the training stood still at each save but the last, and what the last one took.

    The last is waited for until it is written, and is no part of the rate: the other loop saves nothing.
    """
    settings = Settings(epochs=EPOCHS, batch_size=BATCH, patience=99, precision="bf16")
    net = network(data, hidden)
    threads = torch.get_num_threads()
    deterministic(device)
    strategy = strategies.make(net.module, settings, HERE, device)
    with tempfile.TemporaryDirectory() as folder:
        saver = Timed(Checkpoints(Store(f"file://{folder}/store"), "c"), HERE, Path(folder) / "scratch")
        saver.stood = []
        checkpoint = Checkpoint.model_validate({"every": every})
        trainer = Trainer(
            net, data, settings, HERE, strategy, saver, lambda step: Schedule(checkpoint, time.monotonic(), step),
            Control(HERE, Signals(25)), device,
        )  # fmt: skip
        began = time.perf_counter()
        trainer.fit(*(on_device(InMemory(part, 0, BATCH, HERE), device) for part in (fit, tune)))
        seconds = time.perf_counter() - began
        saver.close()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    *stood, _ = saver.stood
    last = trainer.clock.seconds["checkpoint"] - sum(stood)
    return trainer.state.done * BATCH / (seconds - last), stood, last


def bare(data: Any, fit: Dataset, tune: Dataset, device: torch.device, hidden: int) -> float:
    net = network(data, hidden).to(device)
    optimizer = torch.optim.AdamW(net.module.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    arrays = [torch.from_numpy(a) for a in (fit.numeric, fit.categorical, fit.label)]
    tuned = [torch.from_numpy(a) for a in (tune.numeric, tune.categorical, tune.label)]
    steps = fit.rows // BATCH
    began = time.perf_counter()
    for epoch in range(EPOCHS):
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
    return EPOCHS * steps * BATCH / (time.perf_counter() - began)


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
    stood: list[float] = []
    for turn in range(TURNS + 1):
        rate, still, last = ours(data, fit, tune, device, "2s", args.hidden)
        other = bare(data, fit, tune, device, args.hidden)
        if turn:
            rates["ours"].append(rate)
            rates["bare"].append(other)
            stood += still
    stood = stood or [0.0]  # too few rows for two seconds
    middle = {name: statistics.median(values) for name, values in rates.items()}
    seconds, went_on = stopped()
    assert went_on
    report = [
        {"name": "gpu_train_vs_bare_loop", "value": round(middle["ours"]), "unit": "rows/s", "ratio": round(middle["ours"] / middle["bare"], 3),
         "against": f"a hand-written loop: {middle['bare']:,.0f} rows/s"},
        {"name": "gpu_checkpoint_blocked", "value": round(1000 * statistics.median(stood), 1), "unit": "ms per save", "ratio": None,
         "against": f"{len(stood)} saves, one each 2 s; the longest {1000 * max(stood):.0f} ms; the last, written to its "
                    f"end, {last:.2f} s"},
        {"name": "gpu_sigterm", "value": round(seconds, 2), "unit": "s to exit 143", "ratio": None, "against": "25 s of grace"},
    ]  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
