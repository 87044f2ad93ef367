"""Index, chunks and documents are compared both ways, to the last one."""

from __future__ import annotations

from collections.abc import Iterator

from rag_points import chunk

from orrery.rag.reconcile import Reconciliation, reconcile

MADE = [chunk(f"passage {i}", f"guides/{i // 2}.md") for i in range(6)]
DOCUMENTS = {c.document for c in MADE}


class Holding:
    def __init__(self, *ids: str) -> None:
        self._ids = ids

    def ids(self) -> Iterator[str]:
        yield from self._ids


def compared(*ids: str) -> Reconciliation:
    return reconcile(Holding(*ids), MADE, DOCUMENTS)


IDS = [c.id for c in MADE]


def test_all_agree() -> None:
    found = compared(*reversed(IDS))
    assert found.sound
    assert (found.expected, found.found) == (6, 6)
    assert found.sentence() == "6 chunks, 6 points: all agree"
    assert found.told()["sound"] is True


def test_missing_and_extra() -> None:
    found = compared(*IDS[2:], "stray")
    assert (found.missing, found.extra) == (tuple(sorted(IDS[:2])), ("stray",))
    assert (found.missing_count, found.extra_count, found.duplicate, found.orphan) == (2, 1, 0, 0)
    assert not found.sound
    assert found.sentence().startswith("6 chunks, 5 points: 2 missing, 1 extra; missing: ")


def test_a_point_or_a_chunk_that_is_there_twice() -> None:
    assert compared(*IDS, IDS[0]).duplicate == 1
    assert not compared(*IDS, IDS[0]).sound
    assert reconcile(Holding(*IDS), [*MADE, MADE[0], MADE[0]]).duplicate == 2


def test_a_chunk_without_its_document() -> None:
    found = reconcile(Holding(*IDS), MADE, DOCUMENTS - {MADE[0].document})
    assert found.orphan == 2
    assert not found.sound
    assert "2 orphan" in found.sentence()


def test_of_many_the_first_are_shown() -> None:
    found = reconcile(Holding(), [chunk(f"passage {i}") for i in range(50)])
    assert found.missing_count == 50
    assert len(found.missing) == len(found.told()["missing"]) == 20


def test_nothing_at_all_is_sound() -> None:
    assert reconcile(Holding(), [], []).sound
