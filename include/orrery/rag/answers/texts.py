"""Text that came from outside, made harmless and shown in part: cleaning, sentences, excerpts, marks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

# Splits a text into the terms that retrieval compares: stems, without stop words.
Terms = Callable[[str], Sequence[str]]
Span = tuple[int, int]
EXCERPT = 900
# Joiners that scripts need; every other invisible character only hides something from the reader.
_KEPT = {"\n", "\t", "\u200c", "\u200d"}
_HIDDEN = {"Cc", "Cf", "Cs", "Co"}
# What chat templates take for the end of a message or the start of another: servers read these inside of content, too.
_TEMPLATE = re.compile(
    r"(?<=<)(?=\||/?s>|</?SYS>>|/?(?:start|end)_of_(?:turn|role|text)>|(?:bos|eos|unk|pad)>)"
    r"|(?<=\|)(?=>)|(?<=\[)(?=/?INST\])",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n+")
_WORD = re.compile(r"\w+(?:['’]\w+)?")


def clean(text: str) -> str:
    """Return text without control characters, invisible ones and such that turn the direction of writing."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii() and (text.isprintable() or all(c.isprintable() or c in _KEPT for c in text)):
        return text
    return "".join(c for c in text if c in _KEPT or unicodedata.category(c) not in _HIDDEN)


def inert(text: str) -> str:
    """Return cleaned text in which nothing reads as a chat template's marks: a space goes behind their first sign."""
    return _TEMPLATE.sub(" ", clean(text))


def heading_text(heading: str | Iterable[str]) -> str:
    """Return headings above a passage as one line."""
    parts = [heading] if isinstance(heading, str) else list(heading)
    return " › ".join(p for p in (one_line(part) for part in parts) if p)


def one_line(text: str) -> str:
    """Return cleaned text with all white space as single spaces."""
    return " ".join(clean(text).split())


def sentences(text: str) -> list[Span]:
    """Return where the sentences (or lines) of a text are, in order; what has no word in it is none."""
    found, start = [], 0
    for end in [*_SENTENCE_END.finditer(text), None]:
        stop = end.start() if end else len(text)
        if end and end.group().strip():
            stop += len(end.group().rstrip())  # a closing quote or bracket belongs to its sentence
        piece = text[start:stop]
        left, right = len(piece) - len(piece.lstrip()), len(piece.rstrip())
        if _WORD.search(piece):
            found.append((start + left, start + right))
        start = end.end() if end else stop
    return found


def marked(text: str, wanted: frozenset[str], terms: Terms) -> list[Span]:
    """Return the spans of the words whose terms are among `wanted`."""
    if not wanted:
        return []
    known: dict[str, bool] = {}
    spans: list[Span] = []
    for word in _WORD.finditer(text):
        low = word.group().lower()
        if low not in known:
            known[low] = not wanted.isdisjoint(terms(low))
        if known[low]:
            spans.append(word.span())
    return spans


def window(text: str, around: Span, most: int = EXCERPT) -> Span:
    """Return a part of at most `most` characters that holds (the start of) `around`, cut between words."""
    if len(text) <= most:
        return 0, len(text)
    start = max(0, min(around[0] - most // 4, len(text) - most))
    end = min(len(text), start + most)
    if start and (space := text.find(" ", start, min(start + 40, around[0]))) >= 0:
        start = space + 1
    if end < len(text) and (space := text.rfind(" ", max(start, end - 40), end)) > 0:
        end = space
    return start, end


def within(spans: Iterable[Span], part: Span) -> list[Span]:
    """Return spans relative to `part`, cut to it, merged where they touch, in order."""
    inside = sorted((max(a, part[0]) - part[0], min(b, part[1]) - part[0]) for a, b in spans)
    out: list[Span] = []
    for a, b in inside:
        if a >= b:
            continue
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return out
