"""When not to answer: how well the passages that were found cover a question, as a calibrated probability. numpy only.

A small language model answers from any passage, and so does an excerpt. Whether one should is decided here, by
signals that cost a millisecond: cosines and ranks of what was found, and which words of the question the passages
hold, in the same letters or in ones that mean about the same (the embedder's own vectors of word pieces, which are
cheap to compare and know that "garbage" is near "bad" and that no word of the corpus is near "PagerDuty").

`calibrate` fits the weights on the labelled questions, in `evaluate`. What it saves:

    calibration.json    signals, weights, threshold, and what was measured; null when there were too few questions
    lexicon.npz         how many chunks hold each term, and vectors of word pieces
    tokenizer.json      the embedder's, which cuts words into pieces
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from orrery.errors import UserError
from orrery.rag.embedding.session import TOKENIZER, open_tokenizer
from orrery.rag.embedding.sparse import index, terms, words
from orrery.rag.embedding.stopwords import STOP_WORDS
from orrery.store import Manifest, Store

CALIBRATION, LEXICON = "calibration.json", "lexicon.npz"
Array: TypeAlias = npt.NDArray[np.float64]
Vectors: TypeAlias = npt.NDArray[np.float32]
# Cosine that two words need to say the same, about; below, they only come from the same world.
ALIKE = 0.5
# Words of one passage that are compared with the question's.
MOST_WORDS = 1000


class Passage(Protocol):
    """What is looked at of a passage that was found (`retrieval.Found`)."""

    @property
    def text(self) -> str:
        """The passage."""

    @property
    def title(self) -> str:
        """The document's title."""

    @property
    def heading(self) -> Sequence[str]:
        """Headings above it."""

    @property
    def cosine(self) -> float:
        """Of question and passage."""

    @property
    def bm25(self) -> float:
        """0 when it is no candidate of the sparse list."""

    @property
    def score(self) -> float:
        """What it was ranked by."""


class Lexicon:
    """How rare a term is in the corpus, and what a word is like."""

    def __init__(
        self,
        chunks: int,
        hashes: npt.NDArray[np.uint32],
        counts: npt.NDArray[np.uint32],
        language: str = "english",
        pieces: npt.NDArray[np.int8] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.chunks, self.hashes, self.counts, self.language = chunks, hashes, counts, language
        self.pieces, self.tokenizer = pieces, tokenizer
        self.stops = STOP_WORDS.get(language, frozenset())
        self.width = 1 if pieces is None else pieces.shape[1]
        # A corpus repeats its words.
        self._vector = lru_cache(1 << 16)(self._made)

    def frequency(self, term: str) -> int:
        """Return how many chunks hold a term."""
        key = np.uint32(index(term))
        at = int(np.searchsorted(self.hashes, key))
        return int(self.counts[at]) if at < len(self.hashes) and self.hashes[at] == key else 0

    def rarity(self, word: str) -> float:
        """Return the IDF of a word's rarest term, as BM25 counts it, as a share of that of an unknown one."""
        most = math.log(1 + (self.chunks + 0.5) / 0.5)
        rare = [math.log(1 + (self.chunks - df + 0.5) / (df + 0.5)) for df in map(self.frequency, self.terms(word))]
        return max(rare, default=0.0) / most

    def terms(self, word: str) -> list[str]:
        """Return a word's terms."""
        return terms(word, self.language)

    def telling(self, text: str) -> list[str]:
        """Return a text's words, each once and in their order, without those that say nothing by themselves."""
        return [w for w in dict.fromkeys(words(text)) if w not in self.stops and len(w) > 1]

    def vectors(self, many: Sequence[str]) -> Vectors:
        """Return the words' vectors (n, width), of length 1, or 0 for a word that nothing is known of."""
        return np.stack([self._vector(w) for w in many]) if many else np.zeros((0, self.width), np.float32)

    def _made(self, word: str) -> Vectors:
        if self.pieces is None or self.tokenizer is None:
            return np.zeros(self.width, np.float32)
        ids = [i for i in self.tokenizer.encode(word, add_special_tokens=False).ids if i < len(self.pieces)]
        if not ids:
            return np.zeros(self.width, np.float32)
        vector = self.pieces[ids].astype(np.float32).mean(axis=0)
        return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-9), np.float32)


def plain(language: str = "english") -> Lexicon:
    """Return a lexicon that knows nothing: every word is as rare as any, and like none but itself."""
    return Lexicon(1, np.empty(0, np.uint32), np.empty(0, np.uint32), language)


# -- signals -------------------------------------------------------------------------------------------


def signals(question: str, found: Sequence[Passage], lexicon: Lexicon | None = None) -> dict[str, float]:
    """Return what speaks for an answer in these passages, best first; each signal is larger when more does.

    cosine      of the best passage
    ahead       how far it lies above the mean of the next four
    bm25        of the best passage, as a share of what the question's terms could give at most
    score       of the first passage: from the ranks in both lists (RRF), or the reranker's, where there is one
    held        share of the question's words, by rarity, that one passage holds
    alike       the same, with words that mean about the same counted by their likeness
    together    likeness of the words to those of the first three passages together
    weakest     likeness of the two words that are matched worst by all the passages
    names       share of the question's names and numbers that the passages hold; 1 without any
    """
    lexicon = lexicon or plain()
    asked = lexicon.telling(question)
    if not found or not asked:
        return dict.fromkeys(SIGNALS, 0.0)
    rarity = np.array([lexicon.rarity(w) for w in asked])
    weights = rarity / rarity.sum() if rarity.sum() else np.full(len(asked), 1 / len(asked))
    same, alike = matches(asked, found, lexicon)
    cosines = sorted((p.cosine for p in found), reverse=True)
    best = np.maximum(same, alike)
    named = np.array([is_name(w) for w in cased(question, asked)])
    return {
        "cosine": float(cosines[0]),
        "ahead": float(cosines[0] - np.mean(cosines[1:5])) if len(cosines) > 1 else 0.0,
        "bm25": max(p.bm25 for p in found) / _most(rarity, lexicon),
        "score": float(found[0].score),
        "held": float((same @ weights).max()),
        "alike": float((best @ weights).max()),
        "together": float(best[:3].max(axis=0) @ weights),
        "weakest": float(np.sort(best.max(axis=0))[:2].mean()),
        "names": float(same.max(axis=0)[named].mean()) if named.any() else 1.0,
    }


SIGNALS = ("cosine", "ahead", "bm25", "score", "held", "alike", "together", "weakest", "names")


def matches(asked: Sequence[str], found: Sequence[Passage], lexicon: Lexicon) -> tuple[Array, Array]:
    """Return how each passage (row) matches each word asked for: 1 where it has one of its terms; and by likeness."""
    mine = [set(lexicon.terms(w)) for w in asked]
    vectors = lexicon.vectors(asked)
    same = np.zeros((len(found), len(asked)))
    alike = np.zeros((len(found), len(asked)))
    for row, passage in enumerate(found):
        told = lexicon.telling("\n".join([passage.title, *passage.heading, passage.text]))[:MOST_WORDS]
        held = {t for w in told for t in lexicon.terms(w)}
        same[row] = [not terms_ or bool(terms_ & held) for terms_ in mine]
        if told:
            alike[row] = np.clip((lexicon.vectors(told) @ vectors.T).max(axis=0), 0, 1)
    return same, alike


def _most(rarity: Array, lexicon: Lexicon) -> float:
    """Return the BM25 score of a passage that held each word without end: (k1 + 1) times the IDF."""
    return max(1e-9, 2.2 * float(rarity.sum()) * math.log(1 + (lexicon.chunks + 0.5) / 0.5))


def cased(question: str, asked: Sequence[str]) -> list[str]:
    """Return the words as the question writes them: the first word's own capital says nothing."""
    first = question.lstrip()[:1]
    given = question.lstrip()
    given = first.lower() + given[1:] if given[1:2].islower() else given
    found = []
    for word in asked:
        at = given.lower().find(word)
        found.append(given[at : at + len(word)] if at >= 0 else word)
    return found


def is_name(word: str) -> bool:
    """Tell whether a word names one thing: it has a capital, a digit, or marks inside, as `OOM`, `p99`, `min_rows`."""
    return not word.islower() or any(c.isdigit() or c in "._-" for c in word)


# -- the calibrated probability ------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """From signals to the probability that the passages hold the answer; below `threshold`, nothing is answered.

    A logistic regression on standardised signals. `measured` is what the evaluation says of it (see `calibrate`).
    """

    names: tuple[str, ...]
    center: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    threshold: float
    measured: Mapping[str, Any] = field(default_factory=dict)
    lexicon: Lexicon | None = field(default=None, compare=False, repr=False)

    def signals(self, question: str, found: Sequence[Passage]) -> dict[str, float]:
        """Return the signals of a question and its passages, by this corpus's lexicon."""
        return signals(question, found, self.lexicon)

    def score(self, told: Mapping[str, float]) -> float:
        """Return the probability that the passages hold the answer. Raises `KeyError` for a signal that is missing."""
        x = sum(
            w * (told[name] - c) / s
            for name, c, s, w in zip(self.names, self.center, self.scale, self.weights, strict=True)
        )
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, x + self.bias))))

    def abstains(self, told: Mapping[str, float]) -> bool:
        """Tell whether no answer should be tried."""
        return self.score(told) < self.threshold

    def to_json(self) -> str:
        """Return it for calibration.json; the lexicon has its own file."""
        told = asdict(Calibration(*[getattr(self, n) for n in _FIELDS]))
        del told["lexicon"]
        return json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, lexicon: Lexicon | None = None) -> Calibration:
        """Read what `to_json` wrote. Raises `UserError` when it is nothing that can be scored with."""
        try:
            told = json.loads(text)
            center, scale, weights = (tuple(map(float, told[n])) for n in ("center", "scale", "weights"))
            names = tuple(map(str, told["names"]))
            bias, threshold = float(told["bias"]), float(told["threshold"])
            made = cls(names, center, scale, weights, bias, threshold, dict(told["measured"]), lexicon)
            numbers = [*center, *scale, *weights, bias, threshold]
            if (
                {len(center), len(scale), len(weights)} != {len(names)}
                or not all(map(math.isfinite, numbers))
                or 0 in made.scale
            ):
                raise ValueError("its numbers do not fit together")
            if unknown := set(names) - set(SIGNALS):
                raise ValueError(f"unknown signals {', '.join(sorted(unknown))}")
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{CALIBRATION} is not one of this version: {type(e).__name__}: {e}", hint="run evaluate again"
            ) from None
        return made


_FIELDS = ("names", "center", "scale", "weights", "bias", "threshold", "measured")


def open_calibration(store: Store, evaluation: Manifest, scratch: Path) -> Calibration | None:
    """Return an evaluation's calibration with its lexicon; None when it has none. Raises `UserError` when damaged."""
    text = store.read(evaluation.uri(CALIBRATION))
    if text.strip() == b"null":
        return None
    tokenizer = None
    if TOKENIZER in evaluation.files:
        tokenizer = open_tokenizer(store.local(evaluation.uri(TOKENIZER), scratch))
    return Calibration.from_json(text, read_lexicon(store.local(evaluation.uri(LEXICON), scratch), tokenizer))


def read_lexicon(file: Path, tokenizer: Any = None) -> Lexicon:
    """Read lexicon.npz. Raises `UserError` when it is none."""
    try:
        with file.open("rb") as f, np.load(f, allow_pickle=False) as held:
            pieces = held.get("pieces")
            return Lexicon(
                int(held["chunks"]), held["hashes"], held["counts"], str(held["language"]), pieces, tokenizer
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{file} is no lexicon: {type(e).__name__}: {e}", hint="run evaluate again") from None


def write_lexicon(file: Path, lexicon: Lexicon) -> None:
    """Write lexicon.npz: the same bytes for the same lexicon."""
    held: dict[str, Any] = {"pieces": lexicon.pieces} if lexicon.pieces is not None else {}
    np.savez(
        file,
        chunks=np.int64(lexicon.chunks),
        hashes=lexicon.hashes,
        counts=lexicon.counts,
        language=np.str_(lexicon.language),
        **held,
    )
