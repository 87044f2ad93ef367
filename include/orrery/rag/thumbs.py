"""Thumbs that readers gave, as candidates for labelled questions: what the service wrote down, read again. Light."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orrery.store import Store

DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


def thumbs(store: Store, project: str, since: str = "") -> list[dict[str, Any]]:
    """Return the thumbs since a day (`2026-01-05`; all without), oldest first: of each answer the last word.

    What is no entry is left out: the folder is written by a service that the world talks to.
    """
    last: dict[str, dict[str, Any]] = {}
    for entry in _entries(store, project, since):
        last[str(entry["query_id"])] = entry
    return sorted(last.values(), key=lambda entry: str(entry["at"]))


def _entries(store: Store, project: str, since: str) -> Iterator[dict[str, Any]]:
    folder = f"{project}/feedback"
    for day in sorted(d for d in store.names(folder) if DAY.fullmatch(d) and d >= since):
        # By number: whoever changed their mind wrote another one.
        for name in sorted(store.names(f"{folder}/{day}"), key=lambda n: (len(n), n)):
            for line in store.read(f"{folder}/{day}/{name}").decode("utf-8", "replace").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict) and {"query_id", "question", "thumb", "at"} <= entry.keys():
                    yield entry


def candidates(entries: Sequence[Mapping[str, Any]], groups: str = "everyone") -> Iterator[dict[str, Any]]:
    """Return lines for a questions file: a person completes `answerable` and `passages` (uri and quote).

    `answerable` is what the thumb suggests: an answer that was liked is there, one that was abstained from may not be.
    """
    for entry in entries:
        told: dict[str, Any] = {
            "id": str(entry["query_id"]),
            "question": str(entry["question"]),
            "answerable": not entry.get("abstained") and entry["thumb"] == "up",
            "passages": [],
        }
        if own := sorted(set(map(str, entry.get("groups") or ())) - {groups}):
            told["groups"] = own
        yield told
