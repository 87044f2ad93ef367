"""Thumbs that readers gave: the last word of each answer, and lines for the questions file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orrery.rag.thumbs import candidates, thumbs
from orrery.store import Store

P = "notes"


def put(store: Store, day: str, number: int, **entry: Any) -> None:
    told = {"query_id": "q1", "question": "What is it?", "thumb": "up", "at": f"{day}T10:00:0{number}", **entry}
    store.put(f"{P}/feedback/{day}/{told['query_id']}-{number}.jsonl", (json.dumps(told) + "\n").encode())


def test_the_last_word_counts_and_what_is_no_entry_does_not(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    assert thumbs(store, P) == []
    put(store, "2026-01-05", 1)
    put(store, "2026-01-05", 2, thumb="down", comment="it is wrong")
    put(store, "2026-01-06", 1, query_id="q2", question="And that?")
    store.put(f"{P}/feedback/2026-01-06/zz-1.jsonl", b"\xff nonsense\n[1]\n{}\n")
    store.put(f"{P}/feedback/elsewhere/q3-1.jsonl", b"{}")
    found = thumbs(store, P)
    assert [(e["query_id"], e["thumb"]) for e in found] == [("q1", "down"), ("q2", "up")]
    assert [e["query_id"] for e in thumbs(store, P, "2026-01-06")] == ["q2"]


def test_candidates_are_lines_of_a_questions_file(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    put(store, "2026-01-05", 1, groups=["everyone", "team"])
    put(store, "2026-01-05", 2, query_id="q2", abstained=True)
    put(store, "2026-01-05", 3, query_id="q3", thumb="down")
    first, second, third = candidates(thumbs(store, P))
    asked = {"id": "q1", "question": "What is it?", "answerable": True, "passages": [], "groups": ["team"]}
    assert first == asked
    assert second["answerable"] is False and "groups" not in second
    assert third["answerable"] is False
