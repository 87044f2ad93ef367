"""An exported embedder that is quick and always the same: the mean of a random vector for each of MiniLM's tokens.

Texts that share words have similar vectors, which is all that most tests need of one. `embedder: {model: FOLDER}`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from orrery.rag.embedding.source import source
from orrery.rag.spec import Embedding

DIMENSIONS, LIMIT = 32, 256


def write(folder: Path, *, limit: int = LIMIT, dimensions: int = DIMENSIONS, seed: int = 0) -> Path:
    """Write an embedder to `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = source(Embedding(), folder, folder).need("tokenizer.json")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    words = len(json.loads(tokenizer.read_bytes())["model"]["vocab"])
    onnx.save(_graph(words, dimensions, seed), str(folder / "model.onnx"))
    told = {
        "id": "tiny",
        "name": "tiny",
        "precision": "fp32",
        "dimensions": dimensions,
        "limit": limit,
        "pooling": "mean",
        "inputs": ["input_ids", "attention_mask"],
    }
    (folder / "embedder.json").write_text(json.dumps(told))
    return folder


def _graph(words: int, dimensions: int, seed: int) -> onnx.ModelProto:
    table = np.random.default_rng(seed).normal(size=(words, dimensions)).astype(np.float32)
    constants = {"table": table, "last": np.array([-1], np.int64), "second": np.array([1], np.int64)}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["each"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["weights"]),
        helper.make_node("Mul", ["each", "weights"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "second"], ["sum"], keepdims=0),
        helper.make_node("LpNormalization", ["sum"], ["vectors"], axis=1, p=2),
    ]
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    )
    vectors = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["batch", dimensions])
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", [ids, mask], [vectors], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
