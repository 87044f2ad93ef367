"""Orrery's training loop against one written by hand, and against Lightning's: one process, and DDP on two.

    .venvs/ml/bin/python tests/benchmarks/bench_train.py [--rows 400000] [--turns 5]

The same network (embeddings beside 14 numbers, as flight_delay's), the same rows in memory, global batches of 512,
AdamW, the same pass over a small tune part after each epoch; gloo and one torch thread per process. The loops take
turns in the same processes, and a figure is the median of the turns' rows per second. Orrery's saves checkpoints
meanwhile (Young and Daly's interval for an interruption in 15 minutes), as it always does; the others save none.
Lightning runs `barebones`, its fastest, on batches that are drawn at once and not row by row.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

from orrery import log
from orrery.spec import Checkpoint
from orrery.store import Store
from orrery.training import Dataset, strategies
from orrery.training.batches import InMemory
from orrery.training.checkpoints import Checkpoints
from orrery.training.control import Control, Signals
from orrery.training.interval import Schedule
from orrery.training.network import Head, Inputs, Network
from orrery.training.place import Place
from orrery.training.prepare import Arrays, Prepared
from orrery.training.saving import ShardedSaver
from orrery.training.schema import Schema
from orrery.training.settings import Settings
from orrery.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
sys.path.insert(0, str(ROOT / "tests" / "training"))
import ranks  # noqa: E402

BATCH, EPOCHS, TUNE, NUMBERS = 512, 3, 8192, 14
STORE = Path(tempfile.gettempdir()) / f"bench-store-{os.getpid()}"
SIZES = {"carrier": 16, "dest": 104, "hour": 24}


class Net(nn.Module):
    """Embeddings and numbers into two hidden layers, and a straight line past them."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, 8) for n in SIZES.values())
        width = NUMBERS + 8 * len(SIZES)
        self.deep = nn.Sequential(
            nn.Linear(width, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
        )
        self.wide = nn.Linear(width, 1)

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor) -> torch.Tensor:
        parts = [embed(categorical[:, i]) for i, embed in enumerate(self.embeddings)]
        known = torch.cat([numeric, *parts], dim=1)
        out: torch.Tensor = (self.wide(known) + self.deep(known)).squeeze(1)
        return out


def made(rows: int) -> Prepared:
    rng = np.random.default_rng(0)
    numeric = rng.normal(size=(rows, NUMBERS)).astype(np.float32)
    categorical = np.stack([rng.integers(1, n, rows) for n in SIZES.values()], axis=1)
    label = (rng.random(rows) < 1 / (1 + np.exp(-numeric[:, 0]))).astype(np.float32)
    schema = Schema(
        task="binary", numeric_columns=tuple(f"n{i}" for i in range(NUMBERS)), missing=(),
        vocabularies={name: tuple(map(str, range(1, n))) for name, n in SIZES.items()},
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    found: dict[Any, Any] = {}
    for part, where in (("fit", slice(0, rows - TUNE)), ("tune", slice(rows - TUNE, rows))):
        (folder / part).mkdir()
        for name, array in (("numeric", numeric), ("categorical", categorical), ("label", label)):
            np.save(folder / part / f"{name}.npy", array[where])
        found[part] = Arrays(folder / part, schema, len(label[where]))
    ones = np.ones(NUMBERS)
    return Prepared(schema, found, ones * 0, ones, 0.0, 1.0, {}, {})


def network(data: Prepared) -> Network:
    torch.manual_seed(0)
    return Network(data.schema, Inputs(data.schema, data.mean, data.std), Net(), Head("binary"))


def parts(data: Prepared) -> tuple[Dataset, Dataset]:
    """Both parts, in memory."""
    found = []
    for name in ("fit", "tune"):
        d = data.dataset(name)  # type: ignore[arg-type]
        found.append(Dataset(np.array(d.numeric), np.array(d.categorical), np.array(d.label), d.schema))
    return found[0], found[1]


def ours(data: Prepared, fit: Dataset, tune: Dataset, place: Place) -> float:
    settings = Settings(epochs=EPOCHS, batch_size=BATCH, patience=99, strategy="ddp" if place.world > 1 else "single")
    net, cpu = network(data), torch.device("cpu")
    strategy = strategies.make(net.module, settings, place, cpu)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"file://{STORE}")
        saver = ShardedSaver(
            Checkpoints(store, f"c{time.monotonic_ns() if place.world == 1 else 0}"), place, Path(folder)
        )
        trainer = Trainer(
            net, data, settings, place, strategy, saver,
            lambda step: Schedule(Checkpoint(), time.monotonic(), step), Control(place, Signals(25)), cpu,
        )  # fmt: skip
        began = time.perf_counter()
        trainer.fit(InMemory(fit, 0, BATCH, place), InMemory(tune, 0, BATCH, place))
        seconds = time.perf_counter() - began
        saver.close()
        if place.rank == 0:
            saver.checkpoints.remove_all()
    return trainer.state.done * BATCH / seconds


def bare(data: Prepared, fit: Dataset, tune: Dataset, place: Place) -> float:
    net = network(data)
    module: nn.Module = nn.parallel.DistributedDataParallel(net.module) if place.world > 1 else net.module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    x, c, y = (torch.from_numpy(a) for a in (fit.numeric, fit.categorical, fit.label))
    tx, tc, ty = (torch.from_numpy(a) for a in (tune.numeric, tune.categorical, tune.label))
    steps = fit.rows // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    began = time.perf_counter()
    for epoch in range(EPOCHS):
        module.train()
        order = torch.randperm(fit.rows, generator=torch.Generator().manual_seed(epoch))
        total = torch.zeros(())
        for i in range(steps):
            rows = order[i * BATCH + place.rank : (i + 1) * BATCH : place.world]
            loss = loss_of(module(net.inputs(x[rows]), c[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        module.eval()
        with torch.no_grad():
            float(loss_of(net.module(net.inputs(tx), tc), ty)), float(total)
    return EPOCHS * steps * BATCH / (time.perf_counter() - began)


def lightning(data: Prepared, fit: Dataset, tune: Dataset, place: Place) -> float:
    import lightning.pytorch as pl
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

    class Rows(torch.utils.data.Dataset[Any]):
        def __init__(self, d: Dataset) -> None:
            self.arrays = [torch.from_numpy(a) for a in (d.numeric, d.categorical, d.label)]

        def __len__(self) -> int:
            return len(self.arrays[2])

        def __getitem__(self, rows: list[int]) -> list[torch.Tensor]:
            which = torch.as_tensor(rows)
            return [a[which] for a in self.arrays]

    net = network(data)

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.module = net.inputs, net.module

        def _loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return nn.functional.binary_cross_entropy_with_logits(
                self.module(self.inputs(batch[0]), batch[1]), batch[2]
            )

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return self._loss(batch)

        def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
            self._loss(batch)

        def configure_optimizers(self) -> Any:
            made = torch.optim.AdamW(self.module.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
            steps = EPOCHS * (fit.rows // BATCH)
            rate = torch.optim.lr_scheduler.CosineAnnealingLR(made, steps)
            return {"optimizer": made, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    share = BATCH // place.world
    rows = Rows(fit)
    sampler: Any = RandomSampler(rows)
    if place.world > 1:
        sampler = torch.utils.data.DistributedSampler(rows, num_replicas=place.world, rank=place.rank, drop_last=True)
    loader = DataLoader(rows, sampler=BatchSampler(sampler, share, drop_last=True), batch_size=None)
    valid = DataLoader(Rows(tune), sampler=BatchSampler(SequentialSampler(Rows(tune)), TUNE, False), batch_size=None)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=place.world, strategy="ddp" if place.world > 1 else "auto",
        barebones=True, use_distributed_sampler=False,
    )  # fmt: skip
    model = Model()
    began = time.perf_counter()
    trainer.fit(model, loader, valid)
    seconds = time.perf_counter() - began
    return EPOCHS * (fit.rows // BATCH) * BATCH / seconds


def measured(data: Prepared, turns: int, place: Place) -> dict[str, float]:
    """Let the loops take turns; return the medians."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ |= {"RANK": str(place.rank), "LOCAL_RANK": str(place.rank), "WORLD_SIZE": str(place.world)}
    if place.world > 1:
        # Lightning then takes the group that is there, as it does under torchrun.
        os.environ |= {"TORCHELASTIC_RUN_ID": "bench", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(place.world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29507"}
    log.configure()
    fit, tune = parts(data)
    found: dict[str, list[float]] = {"ours": [], "bare": [], "lightning": []}
    loops: list[tuple[str, Any]] = [("ours", ours), ("bare", bare), ("lightning", lightning)]
    for turn in range(turns + 1):
        for name, loop in loops:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                rate = loop(data, fit, tune, place)
            if turn:  # the first is to warm up
                found[name].append(rate)
    return {name: statistics.median(rates) for name, rates in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    sys.path.insert(0, str(VENVS / "bench"))
    data = made(args.rows)
    report = []
    for world, name in ((1, "single"), (2, "ddp")):
        with tempfile.TemporaryDirectory() as folder:
            answers = ranks.run(lambda p: measured(data, args.turns, p), world, Path(folder), timeout=1800)
        rates = answers[0]
        print(name, {k: round(v) for k, v in rates.items()}, flush=True)
        for against, told in (("bare", "a hand-written loop"), ("lightning", "Lightning, barebones")):
            report.append(
                {
                    "name": f"train_vs_{'bare_loop' if against == 'bare' else against}_{name}",
                    "value": round(rates["ours"]), "unit": "rows/s",
                    "against": f"{told}: {rates[against]:,.0f} rows/s", "ratio": round(rates["ours"] / rates[against], 3),
                }
            )  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
