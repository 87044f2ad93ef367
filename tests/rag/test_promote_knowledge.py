"""`promote` and `rollback`: whole steps on a folder, and on a server played by qdrant-client's local mode."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import rag_house
import tiny_embedder
import yaml
from rag_house import DAY, PROJECT, House
from rag_points import URL, Lasting

from orrery import champions
from orrery.errors import UserError
from orrery.rag import promote
from orrery.rag.engines import server

DOCUMENTS = {
    "guides/lease.md": "# Leases\n\nA lease numbers the attempts.\n",
    "team/pay.md": "# Pay\n\nSalaries are paid on the last day of the month.\n",
}
ASKED = {
    "id": "q1",
    "question": "What does a lease number?",
    "answerable": True,
    "passages": [{"uri": "lease.md", "quote": "numbers the attempts"}],
}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    model = tiny_embedder.write(tmp_path / "model")
    return rag_house.make(tmp_path, monkeypatch, DOCUMENTS, embedder={"model": str(model)}, gate={"worse": 1})


def pointer(house: House) -> dict[str, Any]:
    return dict(json.loads(house.store.read(f"{PROJECT}/live.json")))


def day(number: int) -> str:
    return f"2026-01-{number:02d}"


def reindexed(house: House, number: int) -> str:
    """Change a document, reindex, and return the generation's path."""
    house.document("guides/lease.md", f"# Leases\n\nA lease numbers the attempts. Edition {number}.\n")
    house.reindex(day(number), run=f"run-{number}")
    return house.manifest("generation", day(number)).path


def back(house: House, to: str | None = None, run: str = "back-1") -> Any:
    planner = house.planner()
    request = champions.rollback_request(planner, to, run=run, actor="tester", reason="a test")
    return house.run("rollback", request.partitions[0], run=run, **request.options)


def test_what_is_promoted_is_what_services_follow(house: House) -> None:
    house.questions(ASKED)
    first = reindexed(house, 5)
    told = pointer(house)
    assert (told["version"], told["generation"], told["proven"], told["before"]) == ("1", first, True, [])
    assert told["evaluation"] == house.manifest("evaluation").path
    assert told["digest"] == house.manifest("generation").digest
    # Driven again it changes nothing, not even the time.
    house.run("promote", run="run-again")
    assert pointer(house) == told


def test_back_and_forth(house: House) -> None:
    first, second = reindexed(house, 5), reindexed(house, 6)
    assert pointer(house)["before"] == [{"version": "1", "generation": first}]
    assert back(house).reasons[0].startswith("version 1 is live again: 2 passages")
    told = pointer(house)
    assert (told["version"], told["generation"]) == ("1", first)
    assert told["before"] == [{"version": "2", "generation": second}]
    assert back(house, "2", "back-2").facts["model_version"] == "2"
    assert pointer(house)["generation"] == second


def test_a_damaged_generation_is_refused_and_the_live_one_stays(house: House) -> None:
    reindexed(house, 5)
    before = pointer(house)
    house.document("guides/lease.md", "# Leases\n\nChanged.\n")
    house.reindex("2026-01-06", run="run-2", until="gate")
    made = house.manifest("generation", "2026-01-06")
    archive = next(name for name in made.files if name.startswith("shard"))
    whole = house.store.read(made.uri(archive))
    house.store.put(made.uri(archive), whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="damaged|digest"):
        house.run("promote", "2026-01-06", run="run-2")
    assert pointer(house) == before


def test_a_refused_generation_does_not_go_live(house: House) -> None:
    house.questions(ASKED)
    reindexed(house, 5)
    before = pointer(house)
    house.spec(gate={"mrr": {"max": 0}})
    house.document("guides/lease.md", "# Leases\n\nA lease numbers the attempts, still.\n")
    done = house.reindex("2026-01-06", run="run-2", until="gate")
    assert done["gate"].verdict == "kept"
    assert house.run("promote", "2026-01-06", run="run-2").skipped
    assert pointer(house) == before


def test_unproven_never_takes_the_place_of_proven(house: House) -> None:
    house.questions(ASKED)
    reindexed(house, 5)
    proven = pointer(house)
    # The questions vanish: the same generation keeps what was proven of it …
    spec = yaml.safe_load((house.folder / "spec.yaml").read_text())
    del spec["questions"]
    (house.folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    house.reindex("2026-01-06", run="run-2")
    told = pointer(house)
    assert (told["generation"], told["evaluation"], told["proven"]) == (
        proven["generation"],
        proven["evaluation"],
        True,
    )
    # … and another one is kept by the gate.
    house.document("guides/lease.md", "# Leases\n\nChanged.\n")
    done = house.reindex("2026-01-07", run="run-3", until="gate")
    assert done["gate"].verdict == "kept"
    assert done["gate"].reasons[0].startswith("unproven: no questions were asked, and what is live has been proven")


def test_a_verdict_from_before_the_live_one_was_proven_is_refused(house: House) -> None:
    reindexed(house, 5)
    house.document("guides/lease.md", "# Leases\n\nChanged.\n")
    assert house.reindex("2026-01-06", run="run-2", until="gate")["gate"].verdict == "promote"
    told = pointer(house)
    house.store.put(f"{PROJECT}/live.json", json.dumps({**told, "proven": True}).encode())
    with pytest.raises(UserError, match="is unproven, and what is live"):
        house.run("promote", "2026-01-06", run="run-2")


def aged(house: House, path: str, days: float) -> None:
    """Make a generation's manifest older."""
    told = json.loads(house.store.read(path))
    told["created"] = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    house.store.put(path, json.dumps(told).encode())


def test_on_a_server_alias_and_retention_follow(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Lasting(":memory:")
    monkeypatch.setattr(server, "connect", lambda url, timeout=0: client)
    monkeypatch.setattr(promote, "BEFORE", 1)
    platform = {**rag_house.PLATFORM, "qdrant": URL}
    (house.home / "include" / "platform.yaml").write_text(yaml.safe_dump(platform))
    client.create_collection("notes-0123456789abcdef", vectors_config={})  # another store's, of the same name
    made = []
    for number in (5, 6, 7):
        path = reindexed(house, number)
        made.append((path, house.manifest("generation", day(number)).facts["collection"]))
        aged(house, path, 0.5 if number == 5 else 3)
    alias = {a.alias_name: a.collection_name for a in client.get_aliases().aliases}
    assert alias == {PROJECT: made[-1][1]}
    there = {c.name for c in client.get_collections().collections}
    # The first is older than the last two, and still too young to go.
    assert there == {c for _, c in made} | {"notes-0123456789abcdef"}
    aged(house, made[0][0], 3)
    last = reindexed(house, 20)
    there = {c.name for c in client.get_collections().collections}
    collection = house.manifest("generation", day(20)).facts["collection"]
    assert there == {made[-1][1], collection, "notes-0123456789abcdef"}
    assert pointer(house)["generation"] == last
    # The oldest that is left can be gone back to, one that went cannot.
    assert back(house, "3").facts["model_version"] == "3"
    assert pointer(house)["before"] == [{"version": "4", "generation": last}]
    assert client.get_aliases().aliases[0].collection_name == made[2][1]
    with pytest.raises(UserError, match="has no collection"):
        back(house, "1", "back-2")
    assert pointer(house)["generation"] == made[2][0]


def test_points_that_were_taken_away_keep_it_from_going_live(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Lasting(":memory:")
    monkeypatch.setattr(server, "connect", lambda url, timeout=0: client)
    (house.home / "include" / "platform.yaml").write_text(yaml.safe_dump({**rag_house.PLATFORM, "qdrant": URL}))
    done = house.reindex(until="gate")
    collection = str(done["index"].facts["collection"])
    client.delete(collection, [str(client.scroll(collection, limit=1)[0][0].id)])
    with pytest.raises(UserError, match="1 of its points are missing"):
        house.run("promote")
    assert not house.store.exists(f"{PROJECT}/live.json")
    assert DAY in house.store.keys(PROJECT, "generation")
