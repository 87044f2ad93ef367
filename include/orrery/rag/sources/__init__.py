"""Where documents come from: what a source holds now, and how each of it is fetched.

LangChain's loaders are not used: they follow links out of a folder, fetch any address and read without bounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fsspec.utils import glob_translate

Fate = Literal["failed", "skipped", "gone"]


@dataclass(frozen=True, slots=True)
class Raw:
    """A document's bytes and its kind (`reading.kinds`); `charset` as a server named it."""

    data: bytes
    kind: str
    charset: str | None = None


class NotRead(Exception):
    """A document was not fetched: its fate, and why. `away`: the network's fault, later it may be there."""

    def __init__(self, fate: Fate, why: str, *, away: bool = False) -> None:
        super().__init__(why)
        self.fate, self.why, self.away = fate, why, away


@dataclass(frozen=True, slots=True)
class Entry:
    """One document that is to be read. `uri` is what a reader is shown, `name` what a title may be made of.

    `fetch` raises `NotRead`, and `reading.Unreadable` for what is no document by its content.
    """

    uri: str
    name: str
    fetch: Callable[[], Raw]


@dataclass(slots=True)
class Listing:
    """What a source holds: documents sorted by uri, and what was left out, with why. `other`: not asked for."""

    entries: list[Entry] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    other: int = 0

    def leave(self, uri: str, why: str) -> None:
        """Note what is there and is not read."""
        self.left[uri] = why

    def sort(self) -> None:
        """Bring the documents into order, and leave out what has the address of another one."""
        found: dict[str, Entry] = {}
        for entry in sorted(self.entries, key=lambda e: (e.uri, e.name)):
            if entry.uri in found:
                self.leave(f"{entry.uri} (again)", "another document has the same address")
            else:
                found[entry.uri] = entry
        self.entries = list(found.values())


class Wanted:
    """Tells by its path below the source whether a document is asked for."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include = [_pattern(p) for p in include]
        self._exclude = [_pattern(p) for p in exclude]

    def __call__(self, path: str) -> bool:
        """Tell whether one of `include` matches and none of `exclude`."""
        return any(p.match(path) for p in self._include) and not any(p.match(path) for p in self._exclude)


def _pattern(text: str) -> re.Pattern[str]:
    """Return a pattern as for files: `*` within a folder, `**` through folders; a folder's name means all below it."""
    text = text.strip().removeprefix("./").lstrip("/")
    return re.compile(glob_translate(f"{text}**" if text.endswith("/") else text))
