"""An answer without a language model: the sentences of the best passages that are most like the question."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orrery.serving.texts import Span, Terms, one_line, sentences

PASSAGES, COMPARED, QUOTED = 3, 3, 2
SHORTEST, LONGEST = 20, 400
# A comparison costs about 0.2 ms a token, so that only sentences about as good by their words are compared, by as much
# of them as the question itself has.
ABOUT, READ = 0.6, 120
# How far the second sentence may lie below the first, as cosine.
CLOSE = 0.1

Alike = Callable[[Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Extract:
    """An extractive answer, and which spans of which passages (by index) it quotes."""

    text: str
    quoted: dict[int, list[Span]]


@dataclass(frozen=True)
class _Sentence:
    passage: int
    span: Span
    text: str
    lexical: float


def extract(texts: Sequence[str], wanted: frozenset[str], terms: Terms, alike: Alike) -> Extract:
    """Return the best one or two sentences of the first passages (cleaned `texts`, best first), cited.

    They are told apart by the question's terms, the rare ones counting more; where that leaves several, by vector.
    """
    nearest = _nearest(texts[:PASSAGES], wanted, terms)
    if not nearest:
        return Extract("", {})
    scores = alike([s.text[:READ] for s in nearest]) if len(nearest) > 1 else [1.0]
    ranked = sorted(zip(scores, nearest, strict=True), key=lambda x: (-x[0], x[1].passage, x[1].span))
    chosen = [ranked[0][1]]
    for score, sentence in ranked[1:]:
        if len(chosen) < QUOTED and score >= ranked[0][0] - CLOSE and sentence.text not in {c.text for c in chosen}:
            chosen.append(sentence)
    chosen.sort(key=lambda s: (s.passage, s.span))
    quoted: dict[int, list[Span]] = {}
    for sentence in chosen:
        quoted.setdefault(sentence.passage, []).append(sentence.span)
    return Extract(" ".join(f"{s.text} [{s.passage + 1}]" for s in chosen), quoted)


def _nearest(texts: Sequence[str], wanted: frozenset[str], terms: Terms) -> list[_Sentence]:
    found = [
        (i, span, text, frozenset(terms(text)) & wanted)
        for i, whole in enumerate(texts)
        for span in sentences(whole)
        if len(text := _shown(whole[slice(*span)])) >= SHORTEST
    ]
    seen = Counter(term for *_, shared in found for term in shared)
    rarity = {term: math.log(1 + len(found) / n) for term, n in seen.items()}
    made = [_Sentence(i, span, text, sum(rarity[t] for t in shared)) for i, span, text, shared in found]
    best = sorted(made, key=lambda s: (-s.lexical, s.passage, s.span))[:COMPARED]
    return [s for s in best if s.lexical >= ABOUT * best[0].lexical]


def _shown(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1].rsplit(' ', 1)[0]}…"
