"""A BERT of one layer with random weights, in Hugging Face's layout: what a user's own folder looks like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from orrery.rag.embedding.source import source
from orrery.rag.spec import Embedding

HIDDEN, INNER, VOCABULARY, POSITIONS = 32, 64, 30522, 64


def write(folder: Path, *, pooling: str = "cls_token") -> Path:
    """Write a model to `folder`, and return it."""
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(source(Embedding(), folder, folder).need("tokenizer.json").read_bytes())
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    draw = np.random.default_rng(0)
    save_file(
        {
            name: draw.normal(scale=0.2, size=size).astype(np.float32)
            if len(size) > 1
            else np.full(size, one, np.float32)
            for name, size, one in _weights()
        },
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def _weights():
    for name, rows in (("word", VOCABULARY), ("position", POSITIONS), ("token_type", 2)):
        yield f"embeddings.{name}_embeddings.weight", (rows, HIDDEN), 0
    layer = "encoder.layer.0"
    linear = {
        f"{layer}.attention.self.query": (HIDDEN, HIDDEN),
        f"{layer}.attention.self.key": (HIDDEN, HIDDEN),
        f"{layer}.attention.self.value": (HIDDEN, HIDDEN),
        f"{layer}.attention.output.dense": (HIDDEN, HIDDEN),
        f"{layer}.intermediate.dense": (INNER, HIDDEN),
        f"{layer}.output.dense": (HIDDEN, INNER),
        "pooler.dense": (HIDDEN, HIDDEN),
    }
    for name, size in linear.items():
        yield f"{name}.weight", size, 0
        yield f"{name}.bias", size[:1], 0
    for name in ("embeddings", f"{layer}.attention.output", f"{layer}.output"):
        yield f"{name}.LayerNorm.weight", (HIDDEN,), 1
        yield f"{name}.LayerNorm.bias", (HIDDEN,), 0
