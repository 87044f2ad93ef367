"""The verb `chunk`: documents cut into passages that the embedder can take in whole, each with its headings.

A passage stays inside one section and ends, in this order of preference, at a paragraph, a line, a sentence or a word:
rows of a table and lines of code stay whole as long as they fit. Its id follows from what it says and where it stands
(document, headings, text), so that an insertion above renames nothing.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orrery.contract import Result
from orrery.rag.contract import ChunkParams
from orrery.rag.embedding.tokens import Tokens
from orrery.rag.records import CHUNKS, DOCUMENTS, Chunk, Document, Section, documents
from orrery.rag.spec import Chunking
from orrery.step import Work

NAMESPACE = uuid.UUID("7ad2f9a4-7d0c-5c53-9d5a-0a6f2f8f3f55")
ARROW = " › "
# A context may take at most this share of a chunk: the passage itself must still say something.
CONTEXT_SHARE = 0.4
SEPARATORS = [r"\n[ \t]*\n+", r"\n", r"(?<=[.!?…])[ \t]+", r"\s+", ""]
# Where an overlap may begin: at a line or a sentence.
_BEGINS = re.compile(r"\n\s*|(?<=[.!?…])[ \t]+")


def run(work: Work, params: ChunkParams) -> Result:
    """Cut the documents. The output is `chunks.jsonl`, in the order of the documents."""
    spec = work.knowledge
    given = work.open_input(work.input("documents"), DOCUMENTS)
    tokens = Tokens.of(spec.embedder, work.scratch / "model", work.project_folder)
    cutter = Cutter(tokens, spec.chunk)
    read = count = empty = longest = total = 0
    with work.path(CHUNKS).open("w", encoding="ascii") as file, work.progress("cut", given.stat().st_size) as tick:
        for document in documents(given):
            made = cutter.cut(document)
            file.writelines(chunk.line() for chunk in made)
            read, count, empty = read + 1, count + len(made), empty + (not made)
            longest = max([longest, *(chunk.tokens for chunk in made)])
            total += sum(chunk.tokens for chunk in made)
            tick(sum(len(section.text) for section in document.sections))
    work.log.info("documents are cut", documents=read, chunks=count, without_text=empty, longest=longest)
    metrics = {"documents": read, "chunks": count, "without_text": empty, "longest": longest}
    return Result(metrics={**metrics, "tokens": total}, facts={"limit": cutter.limit})


@dataclass(frozen=True)
class _Piece:
    """A passage before it is one: its section, its context and its text."""

    section: Section
    context: str
    text: str

    @property
    def embedded(self) -> str:
        return f"{self.context}\n{self.text}" if self.context else self.text


class Cutter:
    """Cuts documents, one after the other, by one embedder's tokens."""

    def __init__(self, tokens: Tokens, wanted: Chunking) -> None:
        self.tokens, self.overlap = tokens, wanted.overlap
        self.limit = min(wanted.tokens, tokens.limit)
        self._splitters: dict[int, Any] = {}

    def cut(self, document: Document) -> list[Chunk]:
        """Return a document's chunks: none longer than the limit, and none empty."""
        sections = [section for section in document.sections if section.text.strip()]
        self.tokens.learn(text for s in sections for text in (s.text, *s.heading))
        self.tokens.learn([document.title, ARROW])
        pieces = [piece for section in sections for piece in self._section(document, section, self.limit)]
        lengths = self.tokens.counts([piece.embedded for piece in pieces])
        if max(lengths, default=0) > self.limit:
            pieces = [
                part for piece, n in zip(pieces, lengths, strict=True) for part in self._fitting(document, piece, n)
            ]
            lengths = self.tokens.counts([piece.embedded for piece in pieces])
        return list(_chunks(document, pieces, lengths))

    def _fitting(self, document: Document, piece: _Piece, length: int) -> Iterator[_Piece]:
        """Cut once more what the tokenizer finds longer than its words are together."""
        limit = self.limit
        parts, lengths = [piece], [length]
        while max(lengths) > self.limit and limit > self.tokens.fixed + 2:
            limit -= max(1, max(lengths) - self.limit)
            again = Section(piece.section.heading, piece.text, piece.section.page)
            parts = self._section(document, again, limit, overlap=0)
            lengths = self.tokens.counts([part.embedded for part in parts])
        yield from parts

    def _section(self, document: Document, section: Section, limit: int, overlap: int | None = None) -> list[_Piece]:
        context = self._context(document.title, section.heading, limit)
        budget = max(1, limit - self.tokens.fixed - self.tokens.estimate(context))
        texts = self._texts(section.text, budget, min(self.overlap if overlap is None else overlap, budget // 2))
        return [_Piece(section, context, text) for text in texts]

    def _context(self, title: str, heading: tuple[str, ...], limit: int) -> str:
        """Return title and headings in one line, shortened from the left to a share of the chunk."""
        names = list(dict.fromkeys(" ".join(name.split()) for name in (title, *heading)))
        most = int((limit - self.tokens.fixed) * CONTEXT_SHARE)
        names = [name for name in names if name]
        while len(names) > 1 and self.tokens.estimate(ARROW.join(names)) > most:
            names.pop(0)
        words = ARROW.join(names).split()
        while words and self.tokens.estimate(" ".join(words)) > most:
            words.pop(0)
        return " ".join(words)

    def _texts(self, text: str, budget: int, overlap: int) -> list[str]:
        """Return a section's passages of at most `budget` tokens; neighbours share up to `overlap`, whole sentences."""
        text = text.strip()
        if self.tokens.estimate(text) <= budget:
            return [text]
        spans = self._merged(text, list(self._spans(text, budget - overlap)), budget - overlap)
        first, *others = spans
        return [text[slice(*first)], *(text[self._earlier(text, a, overlap) : b] for a, b in others)]

    def _spans(self, text: str, budget: int) -> Iterator[tuple[int, int]]:
        """Yield where the splitter's pieces begin and end: each is a stretch of the text, in its order."""
        end = 0
        for piece in self._splitter(budget).split_text(text):
            start = text.index(piece, end)
            end = start + len(piece)
            yield start, end

    def _splitter(self, budget: int) -> Any:
        if budget not in self._splitters:
            from langchain_text_splitters import RecursiveCharacterTextSplitter

            # It takes a piece of just `chunk_size` for too long when it cuts, though not when it merges.
            self._splitters[budget] = RecursiveCharacterTextSplitter(
                separators=SEPARATORS,
                is_separator_regex=True,
                chunk_size=budget,
                chunk_overlap=0,
                length_function=self.tokens.estimate,
            )
        return self._splitters[budget]

    def _merged(self, text: str, spans: list[tuple[int, int]], budget: int) -> list[tuple[int, int]]:
        """Join neighbours that fit together: the splitter leaves the short ends of what it cut alone."""
        joined: list[tuple[int, int]] = []
        length = 0
        for start, end in spans:
            own = self.tokens.estimate(text[start:end])
            if joined and length + own <= budget:
                joined[-1], length = (joined[-1][0], end), length + own
            else:
                joined.append((start, end))
                length = own
        return joined

    def _earlier(self, text: str, start: int, overlap: int) -> int:
        """Return where a passage begins that takes up to `overlap` tokens of what stands before it."""
        # A token has at least one character, and no sentence that is worth repeating has words of a hundred.
        window = max(0, start - overlap * 12)
        for found in _BEGINS.finditer(text, window, start):
            if found.end() < start and self.tokens.estimate(text[found.end() : start]) <= overlap:
                return found.end()
        return start


def _chunks(document: Document, pieces: list[_Piece], lengths: list[int]) -> Iterator[Chunk]:
    seen: Counter[tuple[tuple[str, ...], str]] = Counter()
    for position, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
        heading = piece.section.heading
        yield Chunk(
            id=chunk_id(document.id, heading, piece.text, seen[heading, piece.text]),
            document=document.id,
            source=document.source,
            uri=document.uri,
            title=document.title,
            groups=document.groups,
            heading=heading,
            page=piece.section.page,
            text=piece.text,
            embedded=piece.embedded,
            tokens=length,
            position=position,
        )
        seen[heading, piece.text] += 1


def chunk_id(document: str, heading: tuple[str, ...], text: str, occurrence: int) -> str:
    """Return a chunk's id, a UUID: the same for the `occurrence`-th passage (from 0) of this text at this place."""
    return str(uuid.uuid5(NAMESPACE, json.dumps([document, heading, text, occurrence], ensure_ascii=True)))
