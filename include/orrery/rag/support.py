"""How well an answer rests on what it cites, without a judge. numpy only: for the service, and for `evaluate`.

A sentence is supported when a passage that it cites holds most of its telling words, or when one of the passage's
sentences means nearly the same: cosine `SAME`, or `CLOSE` with at least `SOME` of the words. Numbers and names must
stand in the passage all the same: "after 3 attempts" is no support for "after 5 attempts", whatever the cosine. The
bounds were set by what the signals mean, not fitted to answers; they are a smoke alarm, not a proof.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orrery.rag.abstention import is_name
from orrery.rag.embedding.sparse import terms, words
from orrery.rag.embedding.stopwords import STOP_WORDS

Embed = Callable[[Sequence[str]], Any]  # texts to vectors of length 1 (n, d)
MOST, SOME = 0.7, 0.3
SAME, CLOSE = 0.8, 0.6
# Not from within a run of spaces: that would look through the whole run again at each of them.
_CITATION = re.compile(r"(?<!\s)\s*\[(\d{1,3})\]")
# A sentence's sign and what closes it: both belong to it.
_ENDS = re.compile(r"([.!?…][\"'”’»)\]]*)\s+")
# Citations behind the sign that ends their sentence, and what closes it.
_BEHIND = re.compile(r"([.!?…][\"'”’»)]*)((?:\s*\[\d{1,3}\])+)")
# As the service reads them: a capital behind a citation begins a sentence, though none was ended.
_NEXT = re.compile(r"(\[\d{1,3}\])[ \t]+(?=(\S))")


@dataclass(frozen=True)
class Sentence:
    """One sentence of an answer: what it cites (numbers from 1), and how well that supports it.

    `covered`: share of its telling words in the best passage cited; `cosine`: with that passage's closest sentence,
    0 without an embedder; `missing`: names and numbers that no passage cited holds.
    """

    text: str
    cited: tuple[int, ...]
    covered: float
    cosine: float
    missing: tuple[str, ...]

    @property
    def supported(self) -> bool:
        """Whether what it cites supports it; a sentence without a citation is not."""
        if not self.cited or self.missing:
            return False
        return self.covered >= MOST or self.cosine >= SAME or (self.cosine >= CLOSE and self.covered >= SOME)


@dataclass(frozen=True)
class Support:
    """How well an answer rests on its passages."""

    sentences: tuple[Sentence, ...]

    @property
    def supported(self) -> float | None:
        """Share of the sentences that are supported; None of an answer without sentences."""
        return sum(s.supported for s in self.sentences) / len(self.sentences) if self.sentences else None

    @property
    def precision(self) -> float | None:
        """Share of the citations whose sentence is supported by what it cites; None without citations."""
        cited = [s.supported for s in self.sentences for _ in s.cited]
        return sum(cited) / len(cited) if cited else None


def support(answer: str, passages: Sequence[str], embed: Embed | None = None, language: str = "english") -> Support:
    """Return how well each sentence of an answer is supported by the passages that it cites as [1], [2], …"""
    said = split(answer)
    close = _cosines(said, passages, embed) if embed else {}
    return Support(tuple(_judge(i, text, cited, passages, close, language) for i, (text, cited) in enumerate(said)))


def split(answer: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return an answer's sentences without their citations, and what each cites.

    A citation after the full stop belongs to the sentence before it.
    """
    moved = _BEHIND.sub(r"\2\1", answer)
    parted = _NEXT.sub(lambda m: f"{m[1]}\n" if m[2].isupper() else m[0], moved)
    found = []
    for sentence in _parts(parted):
        cited = tuple(dict.fromkeys(int(n) for n in _CITATION.findall(sentence)))
        text = _CITATION.sub("", sentence).strip()
        if words(text):
            found.append((text, cited))
    return found


def _parts(text: str) -> list[str]:
    """Return a text's sentences and lines, in order; some are empty."""
    return _ENDS.sub(r"\1\n", text).split("\n")


def _judge(
    number: int,
    text: str,
    cited: tuple[int, ...],
    passages: Sequence[str],
    close: dict[tuple[int, int], float],
    language: str,
) -> Sentence:
    stops = STOP_WORDS.get(language, frozenset())
    telling = [w for w in dict.fromkeys(words(text)) if w not in stops]
    known = [n for n in cited if 1 <= n <= len(passages)]
    held = {n: set(terms(passages[n - 1], language)) for n in known}
    best = max((_share(telling, held[n], language) for n in known), default=0.0)
    together = set().union(*held.values()) if held else set()
    # The first word's capital is the sentence's own.
    named = [w for w in re.findall(r"\w+(?:[.-]+\w+)*", text)[1:] if is_name(w)]
    missing = [w for w in dict.fromkeys(named) if not set(terms(w, language)) <= together]
    cosine = max((close.get((number, n), 0.0) for n in known), default=0.0)
    return Sentence(text, tuple(known), best, cosine, tuple(missing))


def _share(telling: Sequence[str], held: set[str], language: str) -> float:
    if not telling:
        return 0.0
    return sum(bool(set(terms(w, language)) & held) for w in telling) / len(telling)


def _cosines(
    said: Sequence[tuple[str, tuple[int, ...]]], passages: Sequence[str], embed: Embed
) -> dict[tuple[int, int], float]:
    """Return the cosine of each sentence with the closest one of each passage that it cites; all are embedded once."""
    pairs = [(i, n) for i, (_, cited) in enumerate(said) for n in cited if 1 <= n <= len(passages)]
    if not pairs:
        return {}
    parts = {n: [p for p in _parts(passages[n - 1]) if p.strip()] for n in {n for _, n in pairs}}
    texts = [text for text, _ in said] + [part for some in parts.values() for part in some]
    vectors = np.asarray(embed(texts), np.float32)
    starts, at = {}, len(said)
    for n, some in parts.items():
        starts[n] = at
        at += len(some)
    return {
        (i, n): float((vectors[starts[n] : starts[n] + len(parts[n])] @ vectors[i]).max()) for i, n in pairs if parts[n]
    }
