"""The embedder: exported once, the same vectors as its makers', any order, any batch, any number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tiny_bert
import tiny_embedder

from orrery.errors import SpecError, UserError
from orrery.rag.embedding import source as sources
from orrery.rag.embedding.export import prepare
from orrery.rag.embedding.gpu import on_device
from orrery.rag.embedding.session import GROUP_TOKENS, Embedder, Facts, batched, store_folder
from orrery.rag.spec import Embedding
from orrery.store import Store, storage_options

TEXTS = [
    "How do I roll back to the earlier version?",
    "Rollback: the version before becomes the live one again.",
    "The cook salts the soup.",
    "gate " * 400,  # cut at the limit
]
# As sentence-transformers 6.2.0 has them for these texts: the vectors' first five numbers, and their cosines.
FIRST = [
    [0.04351, 0.02788, 0.04715, -0.00996, 0.07441],
    [-0.06898, 0.05657, -0.01774, -0.01485, 0.05866],
    [-0.08525, 0.0161, 0.03713, 0.0226, -0.07017],
    [0.03788, -0.02677, -0.02732, -0.02508, -0.02385],
]
COSINES = [[1, 0.6928, 0.0074, 0.0778], [0.6928, 1, 0.0196, 0.0446], [0.0074, 0.0196, 1, 0.0906]]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(f"file://{tmp_path_factory.mktemp('store')}")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return tiny_bert.write(tmp_path_factory.mktemp("bert") / "My Model")


@pytest.fixture
def tiny(tmp_path) -> Embedder:
    return Embedder.open(tiny_embedder.write(tmp_path / "tiny"), threads=2)


def opened(store: Store, wanted: Embedding, scratch: Path) -> Embedder:
    return Embedder.open(store_folder(store, prepare(store, wanted, scratch), scratch))


def test_minilm_is_what_sentence_transformers_makes_of_it(store, tmp_path, monkeypatch):
    minilm = opened(store, Embedding(), tmp_path)
    vectors = minilm.embed(TEXTS)
    assert (minilm.dimensions, minilm.limit) == (384, 256)
    assert np.allclose(vectors[:, :5], FIRST, atol=1e-4)
    assert np.allclose(vectors[:3] @ vectors.T, COSINES, atol=1e-3)
    # A second time it is found, and nothing is exported.
    monkeypatch.setattr("orrery.rag.embedding.export._make", None)
    assert prepare(store, Embedding(), tmp_path) == minilm.id


def test_a_folder_is_exported_in_int8_and_by_its_own_pooling(store, bert, tmp_path):
    small = opened(store, Embedding(model=f"file://{bert}", precision="int8"), tmp_path)
    assert small.id.startswith("my-model-int8-")
    assert (small.facts.pooling, small.limit) == ("cls", tiny_bert.POSITIONS)
    # What the GPU would run, here in torch on the CPU.
    wanted = Embedding(model=str(bert))
    origin = sources.source(wanted, tmp_path, tmp_path)
    exact = on_device(origin, store_folder(store, small.id, tmp_path), sources.facts(origin, wanted), "cpu")
    vectors = exact.embed(TEXTS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert ((small.embed(TEXTS) * vectors).sum(1) > 0.98).all()
    first = exact.embed(["gate"]) @ exact.embed(["gate", "gate keeps"]).T
    assert first[0, 0] > 0.9999 > first[0, 1]


def test_vectors_come_in_the_order_given_whatever_the_batches(tiny):
    texts = [f"{'gate ' * (i * 7 % 50)} number {i}" for i in range(200)]
    done: list[int] = []
    together = tiny.embed(texts, on_batch=done.append)
    assert sum(done) == 200
    assert np.allclose(together, [tiny.embed([text])[0] for text in texts], atol=1e-6)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert tiny.embed([]).shape == (0, 32)


def test_a_stream_gives_every_row_once(tiny):
    texts = ["gate " * (i % 90) + str(i) for i in range(900)]
    lengths = [tiny.count(text) for text in texts]
    assert sum(lengths) > 2 * GROUP_TOKENS
    found = np.full((900, 32), np.nan, np.float32)
    for rows, vectors in tiny.stream(lengths, lambda rows: [texts[row] for row in rows]):
        assert np.isnan(found[rows]).all()
        found[rows] = vectors
    assert np.allclose(found, tiny.embed(texts), atol=1e-6)


def test_a_stream_that_fails_says_so_and_ends(tiny):
    def gone(rows):
        raise FileNotFoundError("chunks.jsonl")

    with pytest.raises(FileNotFoundError):
        list(tiny.stream([100] * 1000, gone))


def test_prefixes_are_part_of_what_is_embedded(tmp_path):
    folder = tiny_embedder.write(tmp_path / "tiny")
    store = Store(f"file://{tmp_path}/store")
    plain = opened(store, Embedding(model=str(folder)), tmp_path)
    with_ = opened(store, Embedding(model=str(folder), query_prefix="ask: ", document_prefix="say: "), tmp_path)
    assert plain.id != with_.id
    assert np.array_equal(with_.embed(["gate"]), plain.embed(["say: gate"]))
    assert np.array_equal(with_.embed(["gate"], query=True), plain.embed(["ask: gate"]))
    assert with_.count("gate") == plain.count("say: gate") == plain.count("gate") + 2


@pytest.mark.parametrize("lengths", [[], [5], [300, 1, 1, 1], list(range(1, 60)), [7] * 100])
def test_batches_hold_every_text_once_within_their_bound(lengths):
    batches = list(batched(lengths, 64))
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[r] for r in rows) <= 64 for rows in batches)


def test_only_the_light_libraries_are_imported(tmp_path):
    folder = tiny_embedder.write(tmp_path / "tiny")
    code = f"""
import sys, pathlib
from orrery.rag.embedding import session, sparse
session.Embedder.open(pathlib.Path({str(folder)!r})).embed(["a text"]), sparse.encode_query("a text")
heavy = {{"torch", "transformers", "onnx", "pyarrow", "sklearn", "langchain_text_splitters"}} & set(sys.modules)
assert not heavy, heavy
"""
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- what is refused ---------------------------------------------------------------------------------


def broken(bert: Path, folder: Path, **files: str | None) -> Embedding:
    """Return a copy of the model with other files (none: removed)."""
    folder.mkdir()
    for path in bert.iterdir():
        (folder / path.name).symlink_to(path)
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_safetensors", ".safetensors")
        if path.parent.is_symlink():
            path.parent.unlink()
            path.parent.mkdir()
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
    return Embedding(model=str(folder))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model_safetensors": None}, "has no model.safetensors"),
        ({"tokenizer_json": None}, "has no tokenizer.json"),
        ({"config_json": "{"}, "config.json is no JSON"),
        ({"1_Pooling__config_json": '{"pooling_mode_max_tokens": true}'}, "asks for pooling_mode_max_tokens"),
    ],
)
def test_a_folder_that_is_no_embedder_is_refused_before_torch_is_imported(bert, tmp_path, files, said):
    wanted = broken(bert, tmp_path / "model", **files)
    with pytest.raises(SpecError, match=said):
        sources.facts(sources.source(wanted, tmp_path, tmp_path), wanted)


def test_what_transformers_cannot_load_is_the_users(bert, tmp_path):
    config = json.dumps({"model_type": "nonsense", "hidden_size": 32, "auto_map": {"AutoModel": "code.Model"}})
    wanted = broken(bert, tmp_path / "model", config_json=config, code_py="raise SystemExit('it was run')")
    with pytest.raises(SpecError, match="transformers cannot load"):
        prepare(Store(f"file://{tmp_path}/store"), wanted, tmp_path)


def test_a_uri_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"nonsense://\*\*\*@host/model cannot be read"):
        sources.source(Embedding(model="nonsense://me:secret@host/model"), tmp_path, tmp_path)


def test_an_exported_folder_of_another_precision_is_refused(tmp_path):
    folder = tiny_embedder.write(tmp_path / "tiny")
    with pytest.raises(SpecError, match="is exported in fp32"):
        prepare(Store(f"file://{tmp_path}/store"), Embedding(model=str(folder), precision="int8"), tmp_path)


def test_damaged_files_are_named(tmp_path):
    folder = tiny_embedder.write(tmp_path / "tiny")
    for name, said in (
        ("model.onnx", "is no model"),
        ("tokenizer.json", "no tokenizer"),
        ("embedder.json", "does not"),
    ):
        data = (folder / name).read_bytes()
        (folder / name).write_text("{}")
        with pytest.raises(UserError, match=said):
            Embedder.open(folder)
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match="is not in the store"):
        store_folder(Store(f"file://{tmp_path}/store"), "minilm-fp32-0", tmp_path)


def test_facts_of_a_later_version_are_read(tmp_path):
    folder = tiny_embedder.write(tmp_path / "tiny")
    told = json.loads((folder / "embedder.json").read_bytes())
    (folder / "embedder.json").write_text(json.dumps({**told, "later": 1}))
    assert Facts.read(folder / "embedder.json").dimensions == 32


def test_a_bucket_is_read_and_written_like_a_folder(s3_bucket, bert, tmp_path):
    uri = f"{s3_bucket}/models/tiny"
    fs, root = fsspec.core.url_to_fs(uri, **storage_options(uri))
    fs.put(str(tiny_embedder.write(tmp_path / "tiny")), root, recursive=True)
    store = Store(f"{s3_bucket}/store")
    there = opened(store, Embedding(model=uri), tmp_path / "scratch")
    here = Embedder.open(tmp_path / "tiny")
    assert np.array_equal(there.embed(TEXTS), here.embed(TEXTS))
