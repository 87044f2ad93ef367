"""What the question service would answer from a generation, and how well that rests on what it cites.

By the spec's language model, asked of a bounded sample that the seed draws; where there is none, or it is away, by the
passages' own sentences, for all questions. Prompt, check and extraction are the service's (`answers`). What a model
says is told beside the figures and never judged by the gate: it is not the same twice, and support is counted by words
and likeness (`support`), not understood. The passages' own sentences rest on them by their nature, so less than all of
them tells of a fault in quoting, not of the documents.

Only what the service would show is measured. Where a model cites nothing, or says that the passages do not tell, the
service shows the passages' sentences instead: those answers are counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orrery.platform import LanguageModel
from orrery.rag import asking
from orrery.rag.answers import citations, extract
from orrery.rag.answers.prompt import Message, messages
from orrery.rag.answers.texts import Terms, clean, heading_text
from orrery.rag.retrieval import Found
from orrery.rag.spec import Answers
from orrery.rag.support import Embed, Support, support

MOST_ASKED = 40
MOST_CHARACTERS = 600
# More of one answer is not looked at: a babbling model must not cost minutes.
MOST_LOOKED_AT = 20_000
MODEL, EXTRACTS = "model", "extracts"
NOT_SHOWN = {"uncited": "cited nothing", "silent": "found no answer in the passages"}


@dataclass(frozen=True)
class Asked:
    """A question that would be answered, and the passages that an answer may rest on, best first."""

    id: str
    question: str
    found: Sequence[Found]


@dataclass(frozen=True)
class Answer:
    """What one question is answered. `why`: nothing of it would be shown (a key of `NOT_SHOWN`); else its support."""

    id: str
    text: str
    why: str | None = None
    support: Support | None = None

    def told(self) -> dict[str, Any]:
        """Return it for a report."""
        judged = self.support or Support(())
        bad = [(s.text, s.missing) for s in judged.sentences if not s.supported]
        return {
            "id": self.id,
            "answer": self.text[:MOST_CHARACTERS],
            "not_shown": self.why,
            "supported": _rounded(judged.supported),
            "precision": _rounded(judged.precision),
            "unsupported": [{"text": text[:MOST_CHARACTERS], "missing": list(missing)} for text, missing in bad],
        }


@dataclass(frozen=True)
class Answered:
    """All that was answered. `model`: who wrote, None for the passages' sentences; `trouble`: what befell it."""

    answers: tuple[Answer, ...]
    model: str | None
    trouble: str | None = None

    @property
    def looked_at(self) -> list[Answer]:
        """The answers that have a sentence to look at."""
        return [a for a in self.answers if a.support is not None and a.support.supported is not None]

    def metrics(self) -> dict[str, float | None]:
        """Return the means over the answers, and how many there were; None of none."""
        judged = [a.support for a in self.looked_at if a.support is not None]
        return {
            "sentence_support": _mean([s.supported for s in judged]),
            "citation_precision": _mean([s.precision for s in judged]),
            "answers": float(len(judged)),
        }

    def told(self) -> dict[str, Any]:
        """Return it for a report."""
        counts = Counter(a.why for a in self.answers if a.why is not None)
        return {
            "by": EXTRACTS if self.model is None else MODEL,
            "model": self.model,
            "asked": len(self.answers),
            **self.metrics(),
            "not_shown": {why: counts[why] for why in NOT_SHOWN},
            "trouble": self.trouble,
            "each": [a.told() for a in self.answers],
        }


def sentences(told: Mapping[str, Any]) -> list[str]:
    """Return a report's answers in words: one sentence, and one more when the model was not asked to the end."""
    who = "the passages' own sentences as answers" if told["model"] is None else f"answers of {told['model']}"
    apart = [f"{n} {NOT_SHOWN[why]}" for why, n in told["not_shown"].items() if n]
    beside = f"; not shown: {', '.join(apart)}" if apart else ""
    found = "no answer could be looked at"
    if told["sentence_support"] is not None:
        held = told["citation_precision"]
        cited = "" if held is None else f", {held:.0%} of the citations hold"
        found = (
            f"{told['sentence_support']:.0%} of the sentences are supported by what they cite{cited} "
            f"({told['answers']:.0f} questions)"
        )
    said = [f"{who}: {found}{beside}"]
    if told["trouble"]:
        said.append(f"the language model was not asked to the end: {told['trouble']}")
    return said


def answer(
    endpoint: LanguageModel | None,
    asked: Sequence[Asked],
    spec: Answers,
    *,
    tokens: Callable[[str], int],
    terms: Terms,
    embed: Embed,
    language: str,
    seed: int,
) -> Answered:
    """Answer questions as the service would, and look at what the answers rest on.

    `tokens` and `embed` are the generation's embedder's, `terms` its words'. Raises nothing that a model's server
    can cause.
    """
    trouble = None
    if endpoint is not None and asked:
        written = _written(endpoint, sample(asked, seed), spec, tokens, embed, language)
        if written.answers:
            return written
        trouble = written.trouble
    quoted = [(one, extract.answer(one.question, [f.text for f in one.found], terms)) for one in asked]
    made = [Answer(one.id, q.text, support=_support(q.text, one.found, embed, language)) for one, q in quoted]
    return Answered(tuple(made), None, trouble)


def sample(asked: Sequence[Asked], seed: int, most: int = MOST_ASKED) -> list[Asked]:
    """Return at most so many, drawn by the seed, in their order."""
    drawn = np.random.default_rng(seed).permutation(len(asked))[:most]
    return [asked[i] for i in sorted(drawn)]


def _written(
    endpoint: LanguageModel,
    asked: Sequence[Asked],
    spec: Answers,
    tokens: Callable[[str], int],
    embed: Embed,
    language: str,
) -> Answered:
    """Have the model write, with the prompt, the room and the time that it has in the service."""
    budget = endpoint.context - spec.max_tokens
    prompts: list[tuple[list[Message], int]] = [messages(q.question, q.found, budget, tokens) for q in asked]
    said = asking.ask(endpoint, [p for p, _ in prompts], spec.max_tokens, min(spec.timeout, endpoint.timeout))
    made = []
    for one, (_, shown), text in zip(asked, prompts, said.texts, strict=True):
        if text is None:
            continue
        checked = citations.read(text[:MOST_LOOKED_AT], shown)
        if checked.why is not None:
            made.append(Answer(one.id, checked.text, checked.why))
            continue
        found = _support(checked.covered, one.found[:shown], embed, language)
        made.append(Answer(one.id, checked.covered, support=found))
    return Answered(tuple(made), endpoint.model, said.trouble)


def _support(text: str, found: Sequence[Found], embed: Embed, language: str) -> Support:
    """Return what an answer rests on; nothing is embedded where the words alone support it."""
    # As a model is shown them: a title's words may be said, too.
    passages = [f"{heading_text([f.title, *f.heading])}\n{clean(f.text)}" for f in found]
    plain = support(text, passages, language=language)
    # Likeness cannot make good a missing citation, name or number.
    if all(s.supported or not s.cited or s.missing for s in plain.sentences):
        return plain
    return support(text, passages, embed, language)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
