"""Sparse vectors: BM25's weights of a passage's terms. The terms' rarity (IDF) is Qdrant's modifier, at query time.

A term is a word's stem; identifiers (`ORRERY_STORE`, `min-rows`, `step.py`) count whole and by their parts. Its index
is 32 bits of its hash: of a hundred thousand terms about one pair shares an index, and then counts as one word.
"""

from __future__ import annotations

import hashlib
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from orrery.rag.embedding.stopwords import STOP_WORDS

# How soon a repeated term says nothing new, and how much long passages are held back: Robertson's usual values.
K1, B = 1.2, 0.75
Csr: TypeAlias = tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]
_WORDS = re.compile(r"\w+(?:[.-]+\w+)*")
_JOINTS = re.compile(r"[._-]+")
_KEPT = 1 << 20  # words whose terms are remembered; a service meets new ones for ever


class _Terms:
    """From words to terms of one language, remembered: a corpus repeats its words."""

    def __init__(self, language: str) -> None:
        self.stops = STOP_WORDS.get(language, frozenset())
        self._known: dict[str, tuple[str, ...]] = {}
        self._numbers: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()  # a stemmer must not be used by two threads at once
        self._stem = _stemmer(language)

    def of(self, word: str) -> tuple[str, ...]:
        """Return a lower-cased word's terms."""
        found = self._known.get(word)
        if found is None:
            with self._lock:
                if len(self._known) >= _KEPT:
                    self._known.clear()
                found = self._known[word] = tuple(self._made(word))
        return found

    def numbers(self, word: str) -> tuple[int, ...]:
        """Return the indices of a word's terms."""
        found = self._numbers.get(word)
        if found is None:
            if len(self._numbers) >= _KEPT:
                self._numbers.clear()
            found = self._numbers[word] = tuple(map(index, self.of(word)))
        return found

    def _made(self, word: str) -> Iterable[str]:
        parts = [part for part in _JOINTS.split(word) if part]
        if len(parts) > 1:
            yield word
        for part in parts:
            if part not in self.stops:
                yield self._stem(part)


def _stemmer(language: str) -> Any:
    if language == "none":
        return str
    import Stemmer

    return Stemmer.Stemmer(language).stemWord


_LANGUAGES: dict[str, _Terms] = {}


def _terms_of(language: str) -> _Terms:
    if language not in _LANGUAGES:
        _LANGUAGES[language] = _Terms(language)
    return _LANGUAGES[language]


def words(text: str) -> list[str]:
    """Return a text's words, lower-cased; full-width letters, ligatures and the like in their plain form."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return _WORDS.findall(plain.lower())


def terms(text: str, language: str = "english") -> list[str]:
    """Return a text's terms in their order."""
    of = _terms_of(language).of
    return [term for word in words(text) for term in of(word)]


def index(term: str) -> int:
    """Return a term's index, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2s(term.encode(), digest_size=4).digest(), "little")


@dataclass(frozen=True)
class SparseModel:
    """What BM25 needs to know: of the language, and of the corpus its average length in terms."""

    language: str = "english"
    k1: float = K1
    b: float = B
    average: float = 1.0

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> SparseModel:
        """Read what `told` returned."""
        return cls(str(told["language"]), float(told["k1"]), float(told["b"]), float(told["average"]))

    def encode_documents(self, texts: Iterable[str]) -> Csr:
        """Return the passages' term weights, row by row: (indptr, indices, values). See `fit`."""
        return _weights(_counted(texts, self.language), self)

    def encode_query(self, text: str) -> tuple[list[int], list[float]]:
        """Return a question's terms, each once and with weight 1: (indices, values)."""
        return encode_query(text, self.language)


def fit(texts: Iterable[str], language: str = "english") -> tuple[SparseModel, Csr]:
    """Return the model of a corpus, and its passages' weights; the texts are read once, and not kept."""
    counted = _counted(texts, language)
    lengths = counted[3]
    model = SparseModel(language, average=max(1.0, float(lengths.mean())) if len(lengths) else 1.0)
    return model, _weights(counted, model)


def encode_query(text: str, language: str = "english") -> tuple[list[int], list[float]]:
    """Return a question's terms, each once and with weight 1: (indices, values)."""
    numbers = _terms_of(language).numbers
    found = sorted({number for word in words(text) for number in numbers(word)})
    return found, [1.0] * len(found)


_Counts: TypeAlias = tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32], NDArray[np.float64]]


def _counted(texts: Iterable[str], language: str) -> _Counts:
    """Return where each passage's terms begin, their indices (ascending), how often each comes, and the lengths."""
    from array import array

    numbers = _terms_of(language).numbers
    starts, found, counts, lengths = array("q", [0]), array("I"), array("f"), array("d")
    for text in texts:
        counted: Counter[int] = Counter()
        for word, times in Counter(words(text)).items():
            for number in numbers(word):
                counted[number] += times
        ordered = sorted(counted)
        found.extend(ordered)
        counts.extend([counted[number] for number in ordered])
        starts.append(len(found))
        lengths.append(sum(counted.values()))
    return (
        np.frombuffer(starts, np.int64),
        np.frombuffer(found, np.uint32) if found else np.empty(0, np.uint32),
        np.frombuffer(counts, np.float32) if counts else np.empty(0, np.float32),
        np.frombuffer(lengths, np.float64) if lengths else np.empty(0, np.float64),
    )


def _weights(counted: _Counts, model: SparseModel) -> Csr:
    """BM25 without the IDF: how much a term says of a passage, by its count and the passage's length."""
    starts, indices, counts, lengths = counted
    held_back = model.k1 * (1 - model.b + model.b * lengths / model.average)
    each = np.repeat(held_back, np.diff(starts)).astype(np.float32)
    values: NDArray[np.float32] = counts * np.float32(model.k1 + 1) / (counts + each)
    return starts, indices, values.astype(np.float32)
