"""The verb embed: only what was never embedded is computed, whatever happens in between."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from datetime import date, timedelta

import embedding_house
import numpy as np
import pytest
import tiny_embedder
from embedding_house import document

from orrery import step
from orrery.errors import TryAgain, UserError
from orrery.rag import vectors as kept
from orrery.rag.embedding.session import Embedder
from orrery.rag.embedding.sparse import SparseModel
from orrery.rag.records import Section
from orrery.rag.vectors import Cache, key_of
from orrery.store import Store

WORDS = [
    "gate",
    "champion",
    "ledger",
    "store",
    "manifest",
    "lease",
    "fingerprint",
    "partition",
    "window",
    "drift",
    "feature",
    "label",
]
NEXT = "2026-01-06"


def some(count: int, seed: int = 0) -> list:
    draw = random.Random(seed)
    return [document(f"{i}.md", " ".join([f"number{i}", *draw.choices(WORDS, k=20)])) for i in range(count)]


@pytest.fixture
def house(tmp_path, monkeypatch):
    return embedding_house.make(tmp_path, monkeypatch)


def test_each_row_is_its_chunks_vector(house, tmp_path):
    done = embedding_house.embed(house, some(40))
    assert (done.metrics["embedded"], done.metrics["reused"], done.metrics["chunks"]) == (40, 0, 40)
    found = embedding_house.vectors(house)
    alone = Embedder.open(tmp_path / "tiny").embed(list(found))
    assert np.allclose(list(found.values()), alone, atol=1e-6)
    assert np.allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)


def test_what_is_known_is_not_embedded_again(house):
    embedding_house.embed(house, some(40))
    before = embedding_house.vectors(house)
    changed = [*some(40)[1:], document("0.md", "another text"), document("new.md", "a new text")]
    done = embedding_house.embed(house, changed, NEXT)
    assert (done.metrics["embedded"], done.metrics["reused"]) == (2, 39)
    after = embedding_house.vectors(house, NEXT)
    assert all(np.array_equal(after[text], before[text]) for text in set(before) & set(after))


def test_a_moved_or_renamed_document_embeds_nothing(house):
    embedding_house.embed(house, some(10))
    moved = [document(f"elsewhere/{d.uri}", *d.sections, source="team") for d in some(10)]
    done = embedding_house.embed(house, moved, NEXT)
    assert (done.metrics["embedded"], done.metrics["reused"]) == (0, 10)


def test_the_same_text_twice_is_embedded_once(house):
    twice = [document("a.md", "one and the same"), document("b.md", "one and the same"), document("c.md", "another")]
    assert embedding_house.embed(house, twice).metrics["embedded"] == 2
    rows = np.load(house.store.local(house.manifest("vectors").uri("vectors.npy"), house.home))
    assert len(np.unique(rows, axis=0)) == 2 and len(rows) == 3


def test_run_again_it_makes_the_same_bytes_from_what_was_kept(house):
    embedding_house.embed(house, some(30))
    first = house.manifest("vectors")
    house.store.remove(first.path.rpartition("/")[0])
    house.run("embed", run="run-2", force=True)
    assert house.manifest("vectors").digest == first.digest


def test_stopped_in_the_middle_it_goes_on_where_it_was(house, monkeypatch):
    monkeypatch.setattr(Embedder, "_batch_tokens", 100)
    monkeypatch.setattr("orrery.rag.embedding.session.GROUP_TOKENS", 100)
    monkeypatch.setattr("orrery.rag.embedding.session.cores", lambda: 1)
    run, batches = Embedder._run, []

    def dies(self, ids):
        if len(batches) == 5:
            raise TryAgain("the machine goes away")
        batches.append(len(ids))
        return run(self, ids)

    monkeypatch.setattr(Embedder, "_run", dies)
    with pytest.raises(TryAgain):
        embedding_house.embed(house, some(40))
    monkeypatch.setattr(Embedder, "_run", run)
    done = house.run("embed", run="run-2")
    assert done.metrics["reused"] == sum(batches) > 8
    assert done.metrics["embedded"] == 40 - sum(batches)


KILLED = """
import os, signal, sys
from orrery.rag import vectors
from orrery.rag.embedding import session

vectors.SHARD_ROWS, session.GROUP_TOKENS, session.cores = 8, 100, lambda: 1
session.Embedder._batch_tokens, run, batches = 100, session.Embedder._run, []

def dies(self, ids):
    batches.append(len(ids))
    if len(batches) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, ids)

session.Embedder._run = dies
from orrery.step import attempt
attempt(sys.argv[1], sys.argv[2], 0.0)
"""


def test_killed_it_has_lost_no_more_than_a_shard(house, monkeypatch):
    embedding_house.collect(house, some(40))
    house.run("chunk")
    config = house.plan("embed").config
    house.store.put(f"{config.folder}/config.json", config.model_dump_json().encode())
    uris = [f"{house.store.uri}/{config.folder}/{name}.json" for name in ("config", "result")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *uris], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = house.run("embed", run="run-2")
    # Seven batches of three, and what made no full shard of eight is lost.
    assert (done.metrics["reused"], done.metrics["embedded"]) == (18, 22)


def test_a_change_of_the_embedder_embeds_anew_and_the_first_ones_vectors_stay(house, tmp_path):
    embedding_house.embed(house, some(5))
    house.spec(embedder={"model": str(tmp_path / "tiny"), "document_prefix": "passage: "})
    assert embedding_house.embed(house, some(5)).metrics["embedded"] == 5
    assert len(house.store.names("notes/embedding-cache")) == 2
    house.spec(embedder={"model": str(tmp_path / "tiny")})
    assert house.run("embed", run="run-3", force=True).metrics["embedded"] == 0


def test_what_a_question_needs_is_told_beside_the_vectors(house):
    embedding_house.embed(house, some(3))
    told = json.loads(house.read("vectors", "embedder.json"))
    assert told["dimensions"] == tiny_embedder.DIMENSIONS and told["language"] == "english"
    assert house.store.exists(f"_embedders/{told['id']}/model.onnx")
    model = SparseModel.of(told["sparse"])
    rows = np.load(house.store.local(house.manifest("vectors").uri("sparse.npz"), house.home))
    texts = [c.embedded for c in embedding_house.chunks(house)]
    assert all(np.array_equal(rows[n], made) for n, made in zip(rows, model.encode_documents(texts), strict=True))


def test_a_damaged_shard_is_computed_again(house):
    embedding_house.embed(house, some(6))
    folder = f"notes/embedding-cache/{house.store.names('notes/embedding-cache')[0]}"
    name = house.store.names(folder)[0]
    data = bytearray(house.store.read(f"{folder}/{name}"))
    data[-3] ^= 1
    house.store.put(f"{folder}/{name}", bytes(data))
    done = embedding_house.embed(house, [*some(6), document("new.md", "a new text")], NEXT)
    assert done.metrics["embedded"] == 7
    assert name not in house.store.names(folder)


def test_without_chunks_there_are_no_vectors(house):
    done = embedding_house.embed(house, [document("empty.md", "  \n ")])
    assert done.metrics["chunks"] == 0
    rows = np.load(house.store.local(house.manifest("vectors").uri("vectors.npy"), house.home))
    assert rows.shape == (0, tiny_embedder.DIMENSIONS)


def test_a_gpu_class_without_cuda_says_so(house, tmp_path):
    embedding_house.collect(house, some(2))
    house.run("chunk")
    config = house.plan("embed").config
    config = config.model_copy(update={"params": {"device": "cuda"}})
    with pytest.raises(UserError, match="torch finds no CUDA"):
        step.execute(config, house.store, tmp_path, {})


# -- the cache by itself -----------------------------------------------------------------------------


def keys(*names: str):
    return np.frombuffer(b"".join(key_of(n) for n in names), np.uint8).reshape(-1, 32)


def rows(*values: float):
    return np.array([[v, v + 1] for v in values], np.float32)


@pytest.fixture
def cache(tmp_path):
    return Cache(Store(f"file://{tmp_path}/store"), "p/embedding-cache/e", 2, tmp_path / "scratch")


def known(cache: Cache, *names: str) -> list[bool]:
    return cache.fill(keys(*names), np.zeros((len(names), 2), np.float32)).tolist()


def add(cache: Cache, *names: str) -> None:
    cache.add(keys(*names), rows(*map(len, names)))
    cache.flush()


def test_many_shards_become_few_and_nothing_is_lost(cache):
    names = [f"text {i}" for i in range(kept.MANY + 1)]
    for name in names:
        add(cache, name)
    assert cache.tidy(keys(*names[:3]), 1000)
    assert len(cache.store.names(cache.folder)) == 1
    assert all(known(cache, *names))
    assert not cache.tidy(keys(), 1000)


def test_what_two_looks_a_month_apart_found_unused_is_left_out(cache, monkeypatch):
    monkeypatch.setattr(kept, "MANY", 0)
    add(cache, "used", "unused", "used again")
    day = date(2026, 1, 1)
    for days, used, expected in (
        (0, ("used", "used again"), [True, True, True]),
        (29, ("used",), [True, True, True]),
        (40, ("used", "used again"), [True, False, True]),
    ):
        cache.tidy(keys(*used), (day + timedelta(days)).toordinal())
        assert known(cache, "used", "unused", "used again") == expected, days


def test_a_kill_while_shards_are_joined_loses_nothing(cache, monkeypatch):
    monkeypatch.setattr(kept, "MANY", 2)
    names = [f"text {i}" for i in range(4)]
    for name in names:
        add(cache, name)
    monkeypatch.setattr(cache.store, "remove", lambda path: (_ for _ in ()).throw(TryAgain("killed")))
    with pytest.raises(TryAgain):
        cache.tidy(keys(), 1)
    monkeypatch.undo()
    assert all(known(cache, *names))


def test_shards_that_another_run_joins_meanwhile_are_no_error(cache):
    add(cache, "a"), add(cache, "b")
    shards = cache._shards()
    first = next(shards)
    for name in cache.store.names(cache.folder):
        cache.store.remove(f"{cache.folder}/{name}")
    assert list(shards) == [] and first.vectors.tolist() == rows(1).tolist()


def test_a_shard_of_other_dimensions_is_not_taken(cache):
    other = Cache(cache.store, cache.folder, 3, cache.scratch)
    other.add(keys("a"), np.ones((1, 3), np.float32))
    other.flush()
    assert known(cache, "a") == [False]


def test_sections_with_headings_are_embedded_with_them(house):
    embedding_house.embed(house, [document("a.md", Section(("Install", "Linux"), "Use the package."), title="Guide")])
    assert list(embedding_house.vectors(house)) == ["Guide › Install › Linux\nUse the package."]
