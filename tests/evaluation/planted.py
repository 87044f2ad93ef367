"""A store with planted rows and models: linear ONNX graphs whose quality is known before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from orrery import bundle
from orrery.contract import Result, StepConfig
from orrery.data.tables import write_parquet
from orrery.step import Work, execute
from orrery.store import File, Manifest, Ref, Store, content_digest
from orrery.training.schema import Schema

START = datetime(2013, 1, 1, tzinfo=UTC)
HOLDOUT = START + timedelta(hours=1000)
WINDOW = "2013-01..2013-01"
SPEC = """
version: 1
kind: model
owner: tests
task: {task}
label: {{column: late}}
sources: {{rows: {{uri: "/nowhere/{{partition}}.parquet"}}}}
gate: {gate}
"""


def rows(n: int = 4000, seed: int = 0, start: datetime = START) -> dict[str, Any]:
    """Two weak signals a and b, noise, a category c of which v is later than the others, and a binary label."""
    rng = np.random.default_rng(seed)
    a, b, noise = rng.normal(size=(3, n))
    c = rng.choice(["u", "v", "w"], size=n, p=[0.5, 0.3, 0.2])
    chance = 1 / (1 + np.exp(-(a + b + (c == "v") - 0.8)))
    label = (rng.random(n) < chance).astype(float)
    times = [start + timedelta(hours=i * 2000 / n) for i in range(n)]
    return {
        "key": [f"k{i:05d}" for i in range(n)],
        "prediction_time": pa.array(times, pa.timestamp("us", "UTC")),
        "label": label,
        "label_time": pa.array([t + timedelta(days=1) for t in times], pa.timestamp("us", "UTC")),
        "a": a,
        "b": b,
        "noise": noise,
        "c": c,
        "_group": c,
    }


def linear(weights: Mapping[str, float], *, categories: Sequence[str] = (), bias: float = 0.0, task: str = "binary",
           classes: Sequence[str] = (), ends_early: bool = False) -> tuple[bytes, Schema]:  # fmt: skip
    """Return a graph sigmoid(numeric · weights + bias), NaN where a number is missing, and its schema.

    regression: no sigmoid. multiclass: the score of class i is i times the sum. `ends_early` leaves out the sigmoid.
    """
    schema = Schema(
        task=task,
        numeric_columns=tuple(weights),
        vocabularies=dict.fromkeys(categories, ("u", "v", "w")),
        classes=tuple(classes),
    )
    w = np.array(list(weights.values()), np.float32)[:, None]
    out = [1]
    if task == "multiclass":
        w, out = w * np.arange(len(classes), dtype=np.float32)[None, :], [len(classes)]
    nodes = [
        helper.make_node("MatMul", ["numeric", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["z"]),
    ]
    if task == "multiclass":
        nodes.append(helper.make_node("Softmax", ["z"], ["prediction"], axis=1))
        shape: list[Any] = ["N", len(classes)]
    else:
        last = "prediction" if task == "regression" or ends_early else "flat"
        nodes.append(helper.make_node("Squeeze", ["z", "axis"], [last]))
        if last == "flat":
            nodes.append(helper.make_node("Sigmoid", ["flat"], ["prediction"]))
        shape = ["N"]
    inputs = [helper.make_tensor_value_info("numeric", TensorProto.FLOAT, ["N", len(weights)])]
    if categories:
        inputs.append(helper.make_tensor_value_info("categorical", TensorProto.INT64, ["N", len(categories)]))
    graph = helper.make_graph(
        nodes,
        "linear",
        inputs,
        [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(w, "w"),
            numpy_helper.from_array(np.full(out, bias, np.float32), "b"),
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString(), schema


class House:
    """A store, one project, and what the steps before would have committed."""

    def __init__(self, root: Path, *, task: str = "binary", gate: str = "{}", project: str = "demo") -> None:
        self.project, self.root = project, root
        self.store = Store(f"file://{root}/store")
        folder = root / "project"
        folder.mkdir(parents=True)
        (folder / "spec.yaml").write_text(SPEC.format(task=task, gate=gate))
        packed = bundle.pack(folder)
        bundle.push(self.store, packed)
        self.bundle = packed.digest
        self.attempts = 0

    def commit(
        self,
        verb: str,
        address: str,
        files: Mapping[str, bytes],
        *,
        key: str = WINDOW,
        inputs: Mapping[str, tuple[Ref, ...]] | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Commit an output as a step would."""
        kept = {}
        for name, data in files.items():
            source = self.root / "made" / address / name
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_bytes(data)
            done = self.store.upload(source, f"{self.project}/{verb}/{address}/a1/{name}")
            kept[name] = File(path=f"a1/{name}", size=done.size, sha256=done.sha256)
        manifest = Manifest(
            project=self.project,
            verb=verb,
            key=key,
            address=address,
            digest=content_digest(kept),
            files=kept,
            inputs=dict(inputs or {}),
            fingerprint={"code": "c0de"},
            result=dict(result or {}),
        )
        assert self.store.put_if_absent(manifest.path, manifest.model_dump_json().encode())
        return manifest

    def features(self, columns: Mapping[str, Any], key: str = "2013-01", address: str = "f1") -> Manifest:
        """Commit a features partition."""
        file = self.root / f"{address}.parquet"
        write_parquet(pa.table(dict(columns)), file)
        return self.commit("materialize", address, {"features.parquet": file.read_bytes()}, key=key)

    def candidate(self, model: tuple[bytes, Schema], features: Sequence[Manifest], address: str = "c1", *,
                  baseline: tuple[bytes, Schema] | None = None, key: str = WINDOW,
                  holdout: datetime = HOLDOUT) -> Manifest:  # fmt: skip
        """Commit a training's output; the baseline is a guess from noise unless given."""
        graph, schema = model
        if baseline is None:
            nothing = dict.fromkeys(schema.numeric, 0.0)
            baseline = linear(nothing, categories=list(schema.vocabularies), task=schema.task, classes=schema.classes)
        split = {"tune_start": START.isoformat(), "holdout_start": holdout.isoformat()}
        files = {
            "model.onnx": graph,
            "baseline.onnx": baseline[0],
            "schema.json": schema.model_dump_json().encode(),
            "params.json": b'{"dim": 16}\n',
            "split.json": json.dumps(split).encode(),
        }
        return self.commit("train", address, files, key=key, inputs={"features": tuple(m.ref for m in features)})

    def config(self, verb: str, inputs: Mapping[str, Sequence[Manifest]], params: Mapping[str, Any] | None = None,
               address: str | None = None, key: str = WINDOW, sample: float = 1.0) -> StepConfig:  # fmt: skip
        """Return an attempt's config as the planner would make it."""
        self.attempts += 1
        return StepConfig(
            project=self.project, verb=verb, key=key, partitions=("2013-01",), params=dict(params or {}), sample=sample,
            inputs={n: tuple(m.ref for m in found) for n, found in inputs.items()}, store=self.store.uri,
            bundle=self.bundle, address=address, run="r1", task=verb, attempt=self.attempts,
            folder=f"{self.project}/runs/r1/{verb}/{self.attempts}",
        )  # fmt: skip

    def run(self, verb: str, inputs: Mapping[str, Sequence[Manifest]], params: Mapping[str, Any] | None = None,
            address: str | None = None, **options: Any) -> Result:  # fmt: skip
        """Run a verb in this process, through the engine."""
        config = self.config(verb, inputs, params, address, **options)
        scratch = self.root / f"scratch{self.attempts}"
        scratch.mkdir()
        return execute(config, self.store, scratch, {})

    def work(self, verb: str, inputs: Mapping[str, Sequence[Manifest]], address: str | None = None) -> Work:
        """Return what a verb is handed, without running it."""
        config = self.config(verb, inputs, address=address)
        scratch = self.root / f"scratch{self.attempts}"
        scratch.mkdir()
        return Work(config, self.store, scratch)

    def evaluate(
        self,
        candidate: Manifest,
        features: Sequence[Manifest],
        champion: Manifest | None = None,
        *,
        address: str = "e1",
        draws: int = 200,
        **options: Any,
    ) -> tuple[Result, Manifest, dict[str, Any]]:
        """Evaluate; return result, manifest and report."""
        inputs = {"features": features, "candidate": [candidate], **({"champion": [champion]} if champion else {})}
        result = self.run("evaluate", inputs, {"draws": draws}, address, **options)
        manifest = self.store.manifest(str(result.output))
        assert manifest is not None
        return result, manifest, self.store.read_json(manifest.uri("report.json"))

    def gate(self, evaluation: Manifest, address: str = "v1") -> Result:
        """Decide on an evaluation."""
        return self.run("gate", {"evaluation": [evaluation]}, address=address)
