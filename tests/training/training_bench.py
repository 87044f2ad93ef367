"""A store with committed features, a project folder, and the verb run on them as the engine runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orrery import bundle
from orrery.contract import Result, StepConfig
from orrery.data.tables import write_parquet
from orrery.step import execute
from orrery.store import File, Manifest, Ref, Store, content_digest

SPEC = """
version: 1
kind: model
owner: tests
task: {task}
label: {{column: late}}
sources:
  trips: {{uri: "${{data}}/{{partition}}.parquet", partition: month}}
gate: {gate}
"""

# A small torch model: one embedding per category beside the numbers.
TORCH_MODEL = """
import torch
from pydantic import BaseModel
from torch import nn
from orrery.training import tunable

class Params(BaseModel):
    dim: int = tunable(4, low=2, high=16)
    dropout: float = tunable(0.0, low=0.0, high=0.5)
    epochs: int = 4
    batch_size: int = 128
    learning_rate: float = tunable(0.01, low=0.0001, high=0.1, log=True)

class Net(nn.Module):
    def __init__(self, schema, params, width):
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(n, params.dim) for n in schema.categorical.values())
        self.one = width == 1
        wide = schema.numeric_width + params.dim * len(schema.categorical)
        self.layers = nn.Sequential(nn.Linear(wide, 16), nn.ReLU(), nn.Dropout(params.dropout), nn.Linear(16, width))

    def forward(self, numeric, categorical):
        parts = [embed(categorical[:, i]) for i, embed in enumerate(self.embed)]
        out = self.layers(torch.cat([numeric, *parts], dim=1))
        return out.squeeze(1) if self.one else out

def build(schema, params):
    return Net(schema, params, len(schema.classes) or 1)
"""


@dataclass
class Run:
    """One run of the verb: its result, and the folder's committed files by name."""

    result: Result
    files: dict[str, Path]

    def json(self, name: str) -> Any:
        return json.loads(self.files[name].read_text())


@dataclass
class Bench:
    """A store of its own with one project."""

    root: Path
    project: str = "trips"
    store: Store = field(init=False)
    refs: list[Ref] = field(default_factory=list)
    digest: str = ""

    def __post_init__(self) -> None:
        self.store = Store(f"file://{self.root / 'store'}")

    def write_project(self, model: str, task: str = "binary", gate: str = "{}") -> None:
        folder = self.root / "project"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.yaml").write_text(SPEC.format(task=task, gate=gate))
        (folder / "model.py").write_text(model)
        self.pack()

    def pack(self) -> None:
        """Push the project folder as it stands."""
        packed = bundle.pack(self.root / "project")
        bundle.push(self.store, packed)
        self.digest = packed.digest

    def commit(self, key: str, table: pa.Table) -> None:
        """Commit a partition of features."""
        path = self.root / f"{key}.parquet"
        write_parquet(table, path)
        self.commit_file(key, path)

    def commit_file(self, key: str, path: Path) -> None:
        """Commit a partition's features, already written."""
        base = f"{self.project}/materialize/{key}"
        done: File = self.store.upload(path, f"{base}/a/features.parquet")
        files = {"features.parquet": File(path="a/features.parquet", size=done.size, sha256=done.sha256)}
        manifest = Manifest(
            project=self.project, verb="materialize", key=key, address=key, digest=content_digest(files), files=files
        )
        assert self.store.put_if_absent(manifest.path, manifest.model_dump_json().encode())
        self.refs.append(manifest.ref)

    def config(self, address: str, sample: float = 1.0, verb: str = "train", inputs: dict[str, tuple[Ref, ...]]
               | None = None, **params: Any) -> StepConfig:  # fmt: skip
        return StepConfig(
            project=self.project,
            verb=verb,
            key=f"{self.refs[0].key}..{self.refs[-1].key}",
            partitions=tuple(r.key for r in self.refs),
            sample=sample,
            params=params,
            inputs={"features": tuple(self.refs)} if inputs is None else inputs,
            store=self.store.uri,
            bundle=self.digest,
            address=address,
            run="test",
            task=verb,
            folder=f"{self.project}/runs/test/{address}/1",
        )

    def train(self, address: str, **options: Any) -> Run:
        """Run the verb in this process; training itself forks."""
        return self._read(self._execute(self.config(address, **options)))

    def release(self, candidate: Run, champion: Run | None = None, address: str = "judged") -> Result:
        """Evaluate a candidate on the window's holdout and let the gate decide, both as the engine runs them."""
        inputs = {"features": tuple(self.refs), "candidate": (self._ref(candidate.result),)}
        if champion is not None:
            inputs["champion"] = (self._ref(champion.result),)
        evaluated = self._execute(self.config(f"{address}-e", verb="evaluate", inputs=inputs, draws=300))
        gate = {"evaluation": (self._ref(evaluated),)}
        return self._execute(self.config(f"{address}-g", verb="gate", inputs=gate))

    def _execute(self, config: StepConfig) -> Result:
        scratch = self.root / f"scratch-{config.address}"
        scratch.mkdir()
        return execute(config, self.store, scratch, {})

    def _ref(self, result: Result) -> Ref:
        manifest = self.store.manifest(str(result.output))
        assert manifest is not None
        return manifest.ref

    def train_apart(self, address: str, **options: Any) -> Run:
        """Run the verb as the engine does: `orrery step` in a process of its own."""
        config = self.config(address, **options)
        self.store.put(f"{config.folder}/config.json", config.model_dump_json().encode())
        where = f"{self.store.uri}/{config.folder}"
        code = "import sys, time; from orrery.step import main; sys.exit(main(sys.argv[1:], time.time()))"
        argv = [sys.executable, "-c", code, "--config", f"{where}/config.json", "--result", f"{where}/result.json"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        result = Result.model_validate_json(self.store.read(f"{config.folder}/result.json"))
        assert done.returncode == 0, done.stdout + done.stderr
        return self._read(result)

    def _read(self, result: Result) -> Run:
        assert result.output
        manifest = self.store.manifest(result.output)
        assert manifest is not None
        return Run(result, {name: Path(self.store.full(manifest.uri(name))) for name in manifest.files})


def trips(rows: int, seed: int = 0, month: int = 1, kind: str = "binary") -> pa.Table:
    """Return one month of features with a label that can be learnt: late when it is far, windy, or carrier C."""
    rng = np.random.default_rng((seed, month))
    start = datetime(2013, month, 1, tzinfo=UTC)
    minutes = np.sort(rng.integers(0, 28 * 24 * 60, rows))
    distance, wind = rng.gamma(2.0, 400.0, rows), rng.normal(10, 4, rows)
    carrier = rng.choice(np.array(["A", "B", "C"]), rows)
    score = (distance - 800) / 400 + (wind - 10) / 4 + 1.5 * (carrier == "C") - 0.5
    wind[rng.random(rows) < 0.1] = np.nan
    label: npt.NDArray[Any] = (rng.random(rows) < 1 / (1 + np.exp(-2 * score))).astype(np.int64)
    if kind == "regression":
        label = 40 + 12 * score + rng.normal(0, 3, rows)
    if kind == "multiclass":
        label = np.where(score < -0.7, "early", np.where(score < 0.7, "on_time", "late"))
    times = [start + timedelta(minutes=int(m)) for m in minutes]
    stamp = pa.timestamp("us", tz="UTC")
    return pa.table(
        {
            "key": [f"{month}-{i}" for i in range(rows)],
            "prediction_time": pa.array(times, stamp),
            "label": pa.array(label),
            "label_time": pa.array([t + timedelta(hours=3) for t in times], stamp),
            "distance": pa.array(distance),
            "weather__wind": pa.array(wind, from_pandas=True),
            "holiday": pa.array(rng.random(rows) < 0.05),
            "carrier": pa.array(carrier),
            "_route": pa.array(["helper"] * rows),
        }
    )


def bench(root: Path, model: str = TORCH_MODEL, task: str = "binary", rows: int = 1500) -> Bench:
    made = Bench(root)
    made.write_project(model, task)
    for month in (1, 2):
        made.commit(f"2013-{month:02d}", trips(rows, month=month, kind=task))
    return made
