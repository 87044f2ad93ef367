"""An answer without a language model: the sentences of the best passages that say most of the question's words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orrery.rag.answers.texts import Span, Terms, clean, one_line, sentences

PASSAGES, QUOTED = 3, 2
SHORTEST, LONGEST = 20, 400
# What a sentence of the next passage counts, and what it has from a neighbour that says more. Cosines of question and
# sentence found no more of the handbook's quotes than words do, and took longer than the search.
NEXT, NEIGHBOUR = 0.7, 0.3


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
    shared: frozenset[str]


def answer(question: str, texts: Sequence[str], terms: Terms) -> Extract:
    """Return the answer to a question by the sentences of passages as they were found, best first."""
    return extract([clean(text) for text in texts], frozenset(terms(question)), terms)


def extract(texts: Sequence[str], wanted: frozenset[str], terms: Terms) -> Extract:
    """Return one or two sentences of the first passages (cleaned `texts`, best first), cited, in their order."""
    found = [
        _Sentence(i, span, text, wanted.intersection(terms(text)))
        for i, whole in enumerate(texts[:PASSAGES])
        for span in sentences(whole)
        if len(text := _shown(whole[slice(*span)])) >= SHORTEST
    ]
    if not found:
        return Extract("", {})
    worth = _worth(found)
    ranked = sorted(range(len(found)), key=lambda n: (-worth[n], n))
    chosen = [ranked[0]]
    for n in ranked[1:]:
        if len(chosen) < QUOTED and found[n].shared and found[n].text not in {found[m].text for m in chosen}:
            chosen.append(n)
    quoted: dict[int, list[Span]] = {}
    for n in sorted(chosen):
        quoted.setdefault(found[n].passage, []).append(found[n].span)
    return Extract(" ".join(f"{found[n].text} [{found[n].passage + 1}]" for n in sorted(chosen)), quoted)


def _worth(found: Sequence[_Sentence]) -> list[float]:
    """Return what each sentence says of the question: the rarer a shared word among the sentences, the more."""
    seen = Counter(term for one in found for term in one.shared)
    rarity = {term: math.log(1 + len(found) / count) for term, count in seen.items()}
    own = [sum(rarity[term] for term in sorted(one.shared)) for one in found]
    worth = []
    for n, one in enumerate(found):
        beside = [own[m] for m in (n - 1, n + 1) if 0 <= m < len(found) and found[m].passage == one.passage]
        worth.append((own[n] + NEIGHBOUR * max(beside, default=0.0)) * NEXT**one.passage)
    return worth


def _shown(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1].rsplit(' ', 1)[0]}…"
