"""What lies between the steps of a knowledge base: documents, their sections and chunks, one JSON line each. Light."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from orrery.errors import UserError

T = TypeVar("T")
Raw: TypeAlias = str | bytes
DOCUMENTS, CHUNKS = "documents.jsonl", "chunks.jsonl"


@dataclass(frozen=True, slots=True)
class Section:
    """A piece of a document below one heading: the path of headings, outermost first, and its page if it has one."""

    heading: tuple[str, ...]
    text: str
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """One document as it was collected; `digest` is the sha256 of its raw bytes, `uri` is what a reader is shown."""

    id: str
    source: str
    uri: str
    title: str
    mime: str
    groups: tuple[str, ...]
    digest: str
    bytes: int
    sections: tuple[Section, ...]

    def line(self) -> str:
        """Return it as one canonical JSON line, with its end."""
        return _line(asdict(self))

    @classmethod
    def from_line(cls, line: Raw) -> Document:
        """Read a line. Raises `ValueError`, `KeyError` or `TypeError` when it is none."""
        told = _told(line)
        sections = tuple(
            Section(tuple(map(str, s["heading"])), str(s["text"]), s.get("page")) for s in told.pop("sections")
        )
        return cls(**{**told, "groups": tuple(told["groups"]), "sections": sections})


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage: `text` is what a reader sees, `embedded` the text with its context as the embedder is given it.

    `tokens` counts `embedded` as the embedder does, special tokens and its prefix included; `position` counts the
    chunks of one document from 0.
    """

    id: str
    document: str
    source: str
    uri: str
    title: str
    groups: tuple[str, ...]
    heading: tuple[str, ...]
    page: int | None
    text: str
    embedded: str
    tokens: int
    position: int

    def line(self) -> str:
        """Return it as one canonical JSON line, with its end."""
        return _line({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def from_line(cls, line: str | bytes) -> Chunk:
        """Read a line. Raises `ValueError`, `KeyError` or `TypeError` when it is none."""
        told = _told(line)
        return cls(**{**told, "groups": tuple(told["groups"]), "heading": tuple(told["heading"])})


def documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file, one at a time. Raises `UserError` that names the line when one is damaged."""
    return _lines(path, Document.from_line, "document")


def chunks(path: Path) -> Iterator[Chunk]:
    """Yield the chunks of a file, one at a time. Raises `UserError` that names the line when one is damaged."""
    return _lines(path, Chunk.from_line, "chunk")


def _lines(path: Path, read: Callable[[bytes], T], what: str) -> Iterator[T]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield read(line)
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(
                    f"{path}: line {number} is no {what} of this version: {type(e).__name__}: {e}",
                    hint="it was damaged or edited: delete that output's folder, and run the step again",
                ) from None


def _told(line: str | bytes) -> dict[str, Any]:
    told = json.loads(line)
    if not isinstance(told, dict):
        raise TypeError(f"a {type(told).__name__} instead of an object")
    return told


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False) + "\n"
