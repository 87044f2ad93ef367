"""Labelled questions: what a generation is measured on, and which of its chunks answer them.

    {"id": "q001", "question": "…", "answerable": true, "passages": [{"uri": "gate.md", "quote": "…"}]}
    {"id": "u001", "question": "…", "answerable": false}

One JSON object a line, in a file of the project folder. A chunk is relevant when it is of that document and holds
the quote, whatever its case and spaces; of a quote that was cut between two neighbours, the one with the larger part
counts. `uri` may be the end of a document's address. `groups` asks the question as one of theirs would; without, it
is asked as anybody would.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictBool, StringConstraints, ValidationError, model_validator

from orrery.errors import SpecError, nearest
from orrery.fields import Frozen
from orrery.rag.records import Chunk
from orrery.rag.spec import Group, reader

MAX_BYTES = 16 << 20
# With fewer, nothing can be learned of when to abstain: a fold of the cross-fit would hold none.
LEAST_ANSWERABLE, LEAST_UNANSWERABLE = 20, 10
# Of these, chunkers, readers of Markdown and typists make one or the other; a quote is the same with either.
SAME = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "`": None, "*": None, "\u00ad": None})
# A quote is cut where it is long; a few letters at a chunk's end are no part of it.
LEAST_PART = 8


class Passage(Frozen):
    """Where a question is answered: a document, and words that stand in it."""

    uri: str = Field(min_length=1, max_length=2000)
    quote: str = Field(min_length=3, max_length=5000)


class Question(Frozen):
    """One question and its label."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    question: str = Field(min_length=3, max_length=2000)
    answerable: StrictBool
    passages: tuple[Passage, ...] = ()
    groups: tuple[Group, ...] | None = None

    @model_validator(mode="after")
    def _labelled(self) -> Question:
        if self.answerable and not self.passages:
            raise ValueError("`passages` must say where an answerable question is answered")
        if not self.answerable and self.passages:
            raise ValueError("`passages` must be left out of a question that has no answer")
        if self.groups is not None and not self.groups:
            raise ValueError("`groups` is empty: nobody asks; leave it out to ask as anybody would")
        return self

    @property
    def reader(self) -> frozenset[str]:
        """The groups that it is asked with."""
        return reader(self.groups or ())


@dataclass(frozen=True)
class Labels:
    """What answers each answerable question in one generation: ids of its chunks.

    `lost` says of an answerable question why nothing does: it is missed, never left out.
    """

    relevant: Mapping[str, frozenset[str]]
    lost: Mapping[str, str] = field(default_factory=dict)


def read(file: Path) -> list[Question]:
    """Read a questions file. Raises `SpecError` that names file, line and field."""
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise SpecError(f"{file}: {size:,} bytes; at most {MAX_BYTES:,} are allowed")
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as e:
        raise SpecError(f"{file}: {e.strerror}", hint="`questions` in spec.yaml names this file") from None
    except UnicodeDecodeError as e:
        raise SpecError(f"{file}: byte {e.start} is not UTF-8") from None
    found: dict[str, tuple[int, Question]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        question = _question(line, f"{file}: line {number}")
        if question.id in found:
            raise SpecError(f"{file}: line {number}: id {question.id!r} stands in line {found[question.id][0]}, too")
        found[question.id] = number, question
    if not any(question.answerable for _, question in found.values()):
        raise SpecError(
            f"{file}: there is no answerable question in it", hint="write some, or leave `questions` out of spec.yaml"
        )
    return [question for _, question in found.values()]


def _question(line: str, where: str) -> Question:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise SpecError(f"{where}: this is no JSON: {e}", hint="one object a line, such as " + _EXAMPLE) from None
    if not isinstance(told, dict):
        raise SpecError(f"{where}: {line.strip()[:80]!r} is no JSON object", hint=_EXAMPLE)
    try:
        return Question.model_validate(told)
    except ValidationError as e:
        # A name that is mistyped is also one that is missing: the mistake is told.
        errors = sorted(e.errors(), key=lambda one: one["type"] != "extra_forbidden")
        raise _told(errors[0], where) from None


_EXAMPLE = '{"id": "q1", "question": "…", "answerable": true, "passages": [{"uri": "guide.md", "quote": "…"}]}'


def _told(first: Any, where: str) -> SpecError:
    """Return pydantic's first error in our words."""
    at = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = Passage.model_fields if "passages" in first["loc"] else Question.model_fields
        return SpecError(f"{where}: unknown field {at!r}", hint=nearest(str(first["loc"][-1]), known))
    if first["type"] == "missing":
        return SpecError(f"{where}: {at!r} is missing", hint=_EXAMPLE)
    given = "" if not at else f"{at}: {str(first['input'])[:80]!r}: "
    return SpecError(f"{where}: {given}{str(first['msg']).removeprefix('Value error, ')}")


# -- which chunks answer -------------------------------------------------------------------------------


def label(questions: Sequence[Question], chunks: Iterable[Chunk]) -> Labels:
    """Return which of the chunks answer each answerable question. The chunks are gone through once, one at a time."""
    asked = [q for q in questions if q.answerable]
    matching = _Matching(asked)
    for chunk in chunks:
        matching.look(chunk)
    relevant: dict[str, frozenset[str]] = {}
    lost: dict[str, str] = {}
    for question in asked:
        found = matching.of(question)
        seen = frozenset(id_ for id_, groups in found.items() if question.reader & set(groups))
        relevant[question.id] = seen
        if not seen:
            lost[question.id] = _why(question, found, matching)
    return Labels(relevant, lost)


def _why(question: Question, found: Mapping[str, Sequence[str]], matching: _Matching) -> str:
    if found:
        groups = ", ".join(sorted({g for some in found.values() for g in some}))
        asked = ", ".join(sorted(question.reader))
        return f"its passage may be read by {groups}, it is asked as {asked}: name `groups`"
    missing = [p.uri for p in question.passages if p.uri not in matching.known]
    if missing:
        return f"there is no document {missing[0]}: the source has changed, relabel"
    return f"its passage is not in {question.passages[0].uri} any more: the source has changed, relabel"


class _Matching:
    """Looks for all the questions' quotes while chunks go by, those of one document in their order."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.known: set[str] = set()  # those of the passages' uris that there is a document for
        self._passages = sorted({(p.uri, p.quote) for q in questions for p in q.passages})
        self._whole: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {p: {} for p in self._passages}
        self._parts: dict[tuple[str, str], list[tuple[int, Chunk]]] = {p: [] for p in self._passages}
        self._wanted: dict[str, list[tuple[tuple[str, str], str, str]]] = {}
        self._before: tuple[str, int, Chunk, str] | None = None

    def look(self, chunk: Chunk) -> None:
        """Look at the next chunk."""
        before, self._before = self._before, None
        wanted = self._of_uri(chunk.uri)
        if not wanted:
            return
        spaced = normal(chunk.text)
        tight = spaced.replace(" ", "")
        for passage, quote, whole in wanted:
            self.known.add(passage[0])
            if quote in spaced:
                self._whole[passage][chunk.id] = chunk.groups
            elif before and before[0] == chunk.document and before[1] + 1 == chunk.position:
                self._cut(passage, whole, before[2], before[3], chunk, tight)
        self._before = (chunk.document, chunk.position, chunk, tight)

    def _of_uri(self, uri: str) -> list[tuple[tuple[str, str], str, str]]:
        """Return the passages of a document: as they were given, normalised, and without any space."""
        if uri not in self._wanted:
            of = [p for p in self._passages if uri == p[0] or uri.endswith("/" + p[0].lstrip("/"))]
            self._wanted[uri] = [(p, normal(p[1]), normal(p[1]).replace(" ", "")) for p in of]
        return self._wanted[uri]

    def _cut(self, passage: tuple[str, str], quote: str, one: Chunk, head: str, other: Chunk, tail: str) -> None:
        """Remember the chunk with the larger part of a quote that begins at the end of `one` and ends in `other`."""
        first = next((n for n in range(min(len(quote), len(head)), 0, -1) if head.endswith(quote[:n])), 0)
        last = next((n for n in range(min(len(quote), len(tail)), 0, -1) if tail.startswith(quote[-n:])), 0)
        if first + last >= len(quote) and min(first, last) >= min(LEAST_PART, len(quote) // 2):
            self._parts[passage].append((max(first, last), one if first >= last else other))

    def of(self, question: Question) -> dict[str, tuple[str, ...]]:
        """Return what answers a question: the groups of each chunk by its id."""
        found: dict[str, tuple[str, ...]] = {}
        for passage in {(p.uri, p.quote) for p in question.passages}:
            found |= self._whole[passage]
            if not self._whole[passage] and self._parts[passage]:
                _, chunk = max(self._parts[passage], key=lambda part: part[0])
                found[chunk.id] = chunk.groups
        return found


def normal(text: str) -> str:
    """Return a text as it is compared: without case, marks of typography, and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(SAME).casefold().split())
