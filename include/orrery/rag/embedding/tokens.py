"""Lengths of texts in an embedder's tokens, from its tokenizer alone: cheap enough to be asked of every split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orrery.rag.embedding import source as sources
from orrery.rag.embedding.session import TOKENIZER, Facts, open_tokenizer
from orrery.rag.spec import Embedding

_KEPT = 500_000
# No word has so many characters: what is longer (a key, an image in base64) counts by its length, since tokenizers
# take it for one unknown word and a passage would have no end.
WORD, PER_TOKEN = 100, 4


class Tokens:
    """Counts tokens. `estimate` adds up words, each of which is tokenized once; `counts` asks the tokenizer itself."""

    def __init__(self, tokenizer: Any, limit: int, prefix: str = "") -> None:
        self._tokenizer, self.limit, self._prefix = tokenizer, limit, prefix
        self._words: dict[str, int] = {}
        # Special tokens and the embedder's own prefix, which every text has.
        self.fixed = len(tokenizer.encode(prefix).ids)

    @classmethod
    def of(cls, wanted: Embedding, scratch: Path, folder: Path) -> Tokens:
        """Return the counter of a spec's embedder; `folder` is the project's. Its weights are not fetched.

        Raises `SpecError` or `UserError` for an embedder that cannot be used.
        """
        origin = sources.source(wanted, scratch, folder)
        tokenizer = open_tokenizer(origin.need(TOKENIZER))
        ready = origin.exported
        if ready is None:
            return cls(tokenizer, sources.limit_of(origin), wanted.document_prefix)
        facts = Facts.read(ready)
        return cls(tokenizer, facts.limit, wanted.document_prefix or facts.document_prefix)

    def learn(self, texts: Iterable[str]) -> None:
        """Tokenize the words of these texts that are not known yet, all at once."""
        if len(self._words) > _KEPT:
            self._words.clear()
        unknown = {word for text in texts for word in text.split()} - self._words.keys()
        if unknown:
            ordered = list(unknown)
            encoded = self._tokenizer.encode_batch_fast(ordered, add_special_tokens=False)
            for word, encoding in zip(ordered, encoded, strict=True):
                self._words[word] = _at_least(word, len(encoding.ids))

    def estimate(self, text: str) -> int:
        """Return the sum of the words' lengths, without what is `fixed`; most tokenizers find exactly as many."""
        words = self._words
        if (one := words.get(text.strip())) is not None:  # what is cut at words is asked of word by word
            return one
        total = 0
        for word in text.split():
            found = words.get(word)
            if found is None:  # a piece of a word that was cut
                found = _at_least(word, len(self._tokenizer.encode(word, add_special_tokens=False).ids))
                words[word] = found
            total += found
        return total

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Return the texts' exact lengths, special tokens and the prefix included."""
        encoded = self._tokenizer.encode_batch_fast([self._prefix + text for text in texts])
        return [len(encoding.ids) for encoding in encoded]


def _at_least(word: str, tokens: int) -> int:
    return tokens if len(word) <= WORD else max(tokens, len(word) // PER_TOKEN)
