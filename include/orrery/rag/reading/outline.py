"""What a reading is, and how headings and blocks become sections."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from orrery.rag.records import Section

# All but tab and newline; NUL bytes among them. And halves of surrogate pairs, which no encoding can write.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_SPACES = re.compile(r"[ \t]+\n")
_GAP = re.compile(r"\n{3,}")
LONGEST_HEADING, LONGEST_TITLE = 300, 300


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a document may have at most: pages of a PDF, characters of text."""

    pages: int = 2000
    characters: int = 2_000_000


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read. `title` is empty where the document has none; `notes` say what was not read as it stood."""

    title: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()


class Unreadable(Exception):
    """A document cannot be read, and `why`. `skip`: nothing is wrong with it, it is none for a knowledge base."""

    def __init__(self, why: str, *, skip: bool = False) -> None:
        super().__init__(why)
        self.why, self.skip = why, skip


def tidy(text: str) -> str:
    """Return text in composed form, without control characters, trailing spaces and wide gaps."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _CONTROL.sub(lambda m: "\ufffd" if "\ud800" <= m[0] <= "\udfff" else "", text)
    return _GAP.sub("\n\n", _SPACES.sub("\n", text)).strip("\n").rstrip()


def line(text: str, longest: int) -> str:
    """Return text on one line, cut at `longest` characters."""
    text = " ".join(tidy(text).split())
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


class Outline:
    """Takes headings and blocks in the order in which they stand; gives sections. Raises `Unreadable` for too much."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._path: list[tuple[int, str]] = []
        self._blocks: list[str] = []
        self._sections: list[Section] = []
        self._characters = 0
        self._bare = False  # the newest heading has neither text nor a deeper heading so far
        self.first = ""  # the first heading of the highest level seen

    def heading(self, level: int, text: str) -> None:
        """Begin a section below a heading of `level` (1 to 6)."""
        text = line(text, LONGEST_HEADING)
        if not text:
            return
        deeper = bool(self._path) and level > self._path[-1][0]
        self._close(deeper=deeper)
        while self._path and self._path[-1][0] >= level:
            self._path.pop()
        self._path.append((level, text))
        self._bare = True
        if level == 1 and not self.first:
            self.first = text

    def block(self, text: str) -> None:
        """Add a paragraph, list, table or piece of code."""
        text = tidy(text)
        if not text.strip():
            return
        self.count(len(text))
        self._blocks.append(text)

    def count(self, characters: int) -> None:
        """Count text against the bound."""
        self._characters += characters
        if self._characters > self._bounds.characters:
            raise Unreadable(f"it has more than {self._bounds.characters:,} characters of text", skip=True)

    def sections(self) -> tuple[Section, ...]:
        """Return all sections, in their order."""
        self._close(deeper=False)
        return tuple(self._sections)

    def _close(self, *, deeper: bool) -> None:
        """End the section that is open. A heading alone, with nothing below it, is a section of its own words."""
        if not self._blocks and self._bare and not deeper:
            self.count(len(self._path[-1][1]))
            self._blocks = [self._path[-1][1]]
        if self._blocks:
            heading = tuple(text for _, text in self._path)
            self._sections.append(Section(heading, "\n\n".join(self._blocks)))
        self._blocks, self._bare = [], False
