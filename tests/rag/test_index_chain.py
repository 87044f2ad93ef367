"""From documents to a generation that is asked, by the verbs themselves, and again when a document has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rag_house
import tiny_embedder
import yaml
from rag_points import URL, Lasting

from orrery.errors import UserError
from orrery.rag.engines import server
from orrery.rag.generations import FACTS, open_generation
from orrery.rag.reconcile import reconcile
from orrery.rag.records import chunks, documents
from orrery.rag.retrieval import retrieve
from orrery.rag.spec import reader

LEASE = "# Leases\n\nA lease numbers the attempts; the highest number may commit.\n"
DOCUMENTS = {
    "guides/lease.md": LEASE,
    "guides/store.md": "# The store\n\n## Manifests\n\nA manifest is put once and never changed.\n",
    "team/pay.md": "# Pay\n\nSalaries are paid on the last day of the month.\n",
}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> rag_house.House:
    model = tiny_embedder.write(tmp_path / "model")
    return rag_house.make(tmp_path, monkeypatch, DOCUMENTS, embedder={"model": str(model)})


def test_from_documents_to_answers(house: rag_house.House, tmp_path: Path) -> None:
    house.reindex(until="index")
    made = house.manifest("generation")
    generation = open_generation(house.store, made.path, tmp_path / "open", threads=1)
    found = retrieve(generation, "who may commit with a lease?", groups=reader([]))
    assert found[0].uri.endswith("lease.md")
    assert (found[0].title, found[0].source) == ("Leases", "guides")
    assert all(f.source == "guides" for f in found)
    assert "pay.md" in retrieve(generation, "when are salaries paid?", groups=reader(["team"]))[0].uri

    cut = chunks(house.store.local(house.manifest("chunks").uri("chunks.jsonl"), tmp_path))
    known = documents(house.store.local(house.manifest("documents").uri("documents.jsonl"), tmp_path))
    assert reconcile(generation.engine, cut, [d.id for d in known]).sound

    house.document("guides/lease.md", LEASE.replace("highest", "newest"))
    house.document("guides/store.md", None)
    house.spec(sources={**rag_house.SPEC["sources"], "guides": {"uri": "documents/guides", "missing": 1}})
    house.reindex("2026-01-06", run="run-2", until="index")
    later = house.manifest("generation", "2026-01-06")
    assert later.path != made.path
    newer = open_generation(house.store, later.path, tmp_path / "open", threads=1)
    assert "newest" in retrieve(newer, "who may commit with a lease?", groups=reader([]))[0].text
    assert {f.uri for f in retrieve(newer, "manifest", groups=reader([]))} == {found[0].uri}
    # The one before is what it was.
    assert retrieve(generation, "who may commit with a lease?", groups=reader([])) == found
    generation.close()
    newer.close()
    assert not list((tmp_path / "open").glob(f"{made.address[:16]}-*"))


def test_on_a_server_it_is_looked_at_each_time(
    house: rag_house.House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Lasting(":memory:")
    monkeypatch.setattr(server, "connect", lambda url, timeout=0: client)
    platform = {**rag_house.PLATFORM, "qdrant": URL}
    (house.home / "include" / "platform.yaml").write_text(yaml.safe_dump(platform))
    first = house.reindex(until="index")["index"]
    collection = first.facts["collection"]
    held = {str(p.id) for p in client.scroll(collection, limit=100)[0]}
    assert len(held) == first.metrics["points"] == 3
    client.delete(collection, [sorted(held)[0]])
    again = house.run("index", run="run-2")
    assert again.skipped == "the same generation; 1 points put in, 0 strays taken out"
    assert again.output == first.output
    assert {str(p.id) for p in client.scroll(collection, limit=100)[0]} == held
    generation = open_generation(house.store, str(first.output), tmp_path / "open", qdrant=URL, threads=1)
    assert retrieve(generation, "who may commit with a lease?", groups=reader([]))[0].uri.endswith("lease.md")
    generation.close()
    client.end()


def test_an_embedder_that_is_gone(house: rag_house.House, tmp_path: Path) -> None:
    house.reindex(until="index")
    made = house.manifest("generation")
    facts = json.loads(house.store.read(made.uri(FACTS)))
    house.store.remove(f"_embedders/{facts['embedder']}")
    with pytest.raises(UserError, match="is not in the store"):
        open_generation(house.store, made.path, tmp_path / "open")
