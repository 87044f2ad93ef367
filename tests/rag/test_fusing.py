"""Attention as one operator: the same vectors, and left alone where a graph adds more than the mask."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_bert
from onnx import helper, numpy_helper

from orrery.rag.embedding import graph
from orrery.rag.embedding.fusing import fuse
from orrery.rag.embedding.session import FACTS, MODEL, Embedder
from orrery.rag.embedding.source import facts, source
from orrery.rag.spec import Embedding

TEXTS = ("a pear", "The plum ripens in week 22, and is kept cool. " * 9, "apples", "medlars and quinces, in the cellar")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as torch exports it, not fused."""
    root = tmp_path_factory.mktemp("plain")
    wanted = Embedding(model=str(tiny_bert.write(root / "bert")))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the process does that exports
        patch.setattr(graph, "_fuse", lambda *_: None)
        graph.make(root / "bert", root / "made", facts(source(wanted, root, root), wanted))
    return root / "made"


def kinds(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(folder / MODEL)).graph.node]


def test_fused_it_makes_the_same_vectors(plain: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(plain, tmp_path / "made"))
    graph._fuse(made, heads=2)
    assert "Softmax" in kinds(plain) and "Softmax" not in kinds(made)
    assert kinds(made).count("Attention") == 1
    assert kinds(made).count("MatMul") == kinds(plain).count("MatMul") - 5  # three projections, two products
    np.testing.assert_allclose(Embedder.open(made).embed(TEXTS), Embedder.open(plain).embed(TEXTS), atol=1e-6)
    assert sorted(p.name for p in made.iterdir()) == sorted((MODEL, FACTS, "tokenizer.json"))


@pytest.mark.parametrize("size", [20, tiny_bert.POSITIONS], ids=["near", "window"])
def test_one_that_adds_more_than_the_mask_is_left_alone(plain: Path, tmp_path: Path, size: int) -> None:
    """A bias by distance, and a window that only texts beyond 40 tokens feel."""
    made = Path(shutil.copytree(plain, tmp_path / "made"))
    model = onnx.load(str(made / MODEL))
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    apart = np.abs(np.subtract.outer(np.arange(64), np.arange(64)))
    bias = -apart if size == 20 else np.where(apart > 40, -1e4, 0.0)
    # Sliced to the length at hand, as such models do it.
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name)
        for name, array in (
            ("near_bias", bias.astype(np.float32)), ("near_from", np.zeros(2, np.int64)), ("near_axes", np.array([0, 1])),
            ("near_one", np.array([1])),
        )
    )  # fmt: skip
    (masked,) = (node for node in model.graph.node if softmax.input[0] in node.output)
    made_by = {name: node for node in model.graph.node for name in node.output}
    side = next(i for i, name in enumerate(masked.input) if made_by[name].op_type not in ("MatMul", "Mul", "Div"))
    at = list(model.graph.node).index(masked)
    for node in (
        helper.make_node("Add", [masked.input[side], "sliced"], ["biased"]),
        helper.make_node("Slice", ["near_bias", "near_from", "near_to", "near_axes"], ["sliced"]),
        helper.make_node("Concat", ["near_length", "near_length"], ["near_to"], axis=0),
        helper.make_node("Gather", ["near_shape", "near_one"], ["near_length"], axis=0),
        helper.make_node("Shape", ["input_ids"], ["near_shape"]),
    ):
        model.graph.node.insert(at, node)
    masked.input[side] = "biased"
    onnx.save(model, str(made / MODEL))
    assert fuse(made / MODEL, tmp_path / "fused.onnx", 2) == 1  # it looks alike
    before, wanted = (made / MODEL).read_bytes(), Embedder.open(made).embed(TEXTS)
    graph._fuse(made, heads=2)
    assert (made / MODEL).read_bytes() == before
    np.testing.assert_array_equal(Embedder.open(made).embed(TEXTS), wanted)
    assert np.abs(wanted - Embedder.open(plain).embed(TEXTS)).max() > 1e-3


@pytest.mark.parametrize("heads", [0, 3, 5])
def test_a_number_of_heads_that_does_not_divide_is_left(plain: Path, tmp_path: Path, heads: int) -> None:
    made = Path(shutil.copytree(plain, tmp_path / "made"))
    graph._fuse(made, heads)
    assert (made / MODEL).read_bytes() == (plain / MODEL).read_bytes()
