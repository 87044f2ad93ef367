"""Texts to vectors by an exported embedder: onnxruntime, tokenizers and numpy alone, in the steps and in the service.

The folder of an embedder holds `model.onnx` (token ids and their mask in, normalised vectors out: pooling is part of
the graph), `tokenizer.json` and `embedder.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from orrery.errors import UserError
from orrery.store import Store

Vectors: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]  # positions, or token ids
MODEL, TOKENIZER, FACTS = "model.onnx", "tokenizer.json", "embedder.json"
FOLDER = "_embedders"
# Padded tokens of one batch: what it works on stays in the processor's cache; 4,096 take a third longer.
BATCH_TOKENS = 512
# Tokens that one thread takes on at a time: read, tokenized, and run batch by batch.
GROUP_TOKENS = 16_384
# Texts that are tokenized at a time: what the tokenizer makes of a text is a hundred times its ids.
TOKENIZED = 2048


@dataclass(frozen=True)
class Facts:
    """What `embedder.json` says: everything that makes a vector what it is.

    `limit`: the longest text, in tokens with the special ones; `inputs`: the graph's, by the tokenizer's names.
    """

    id: str
    name: str
    precision: str
    dimensions: int
    limit: int
    pooling: str
    inputs: tuple[str, ...]
    output: str = "vectors"
    pad: int = 0
    query_prefix: str = ""
    document_prefix: str = ""

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "inputs": list(self.inputs)}

    @classmethod
    def read(cls, file: Path) -> Facts:
        """Read `embedder.json`; fields that this version does not know are left. Raises `UserError` when it is none."""
        try:
            told = json.loads(file.read_bytes())
            known = {name: told[name] for name in cls.__dataclass_fields__ if name in told}
            return cls(**{**known, "inputs": tuple(known["inputs"])})
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{file} does not describe an embedder: {type(e).__name__}: {e}",
                hint=f"an exported embedder is a folder with {MODEL}, {TOKENIZER} and {FACTS}",
            ) from None


class Embedder:
    """Makes vectors. Safe to use from several threads at once."""

    _batch_tokens = BATCH_TOKENS

    def __init__(self, facts: Facts, tokenizer: Any, session: Any, workers: int) -> None:
        self.facts, self.tokenizer, self._session, self._workers = facts, tokenizer, session, workers
        self._cutting = type(tokenizer).from_str(tokenizer.to_str())
        self._cutting.enable_truncation(facts.limit)

    @classmethod
    def open(cls, folder: Path, threads: int = 0) -> Embedder:
        """Open an exported embedder with so many threads; 0: one for each core that this process may use.

        Raises `UserError` when a file is missing or damaged.
        """
        facts = Facts.read(folder / FACTS)
        threads = threads or cores()
        return cls(facts, open_tokenizer(folder / TOKENIZER), _session(folder / MODEL), threads)

    @property
    def id(self) -> str:
        """Its name in the store: from the weights, the recipe of the graph and the precision."""
        return self.facts.id

    @property
    def dimensions(self) -> int:
        """How long a vector is."""
        return self.facts.dimensions

    @property
    def limit(self) -> int:
        """How many tokens a text may have, special ones and the prefix included; what is beyond is not read."""
        return self.facts.limit

    def count(self, text: str, *, query: bool = False) -> int:
        """Return a text's length in tokens, special ones and the prefix included."""
        return len(self.tokenizer.encode(self._prefix(query) + text).ids)

    def embed(
        self, texts: Sequence[str], *, query: bool = False, on_batch: Callable[[int], object] | None = None
    ) -> Vectors:
        """Return the texts' vectors (n, d), float32 and of length 1, in the order given.

        `on_batch` is called with the number of texts of each group that is done. A text over the limit is cut there.
        """
        ids = self.cut([self._prefix(query) + text for text in texts])
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        for rows, made in self._each([len(i) for i in ids], lambda rows: [ids[row] for row in rows]):
            vectors[rows] = made
            if on_batch:
                on_batch(len(rows))
        return vectors

    def stream(self, lengths: Sequence[int], texts: Callable[[Rows], Sequence[str]]) -> Iterator[tuple[Rows, Vectors]]:
        """Yield positions and vectors of passages, group by group, longest first: for more than memory should hold.

        `lengths` are theirs in tokens; `texts` returns those at some positions, and is called in several threads.
        """

        def ids(rows: Rows) -> list[Rows]:
            return self.cut([self.facts.document_prefix + text for text in texts(rows)])

        yield from self._each(lengths, ids)

    def _each(self, lengths: Sequence[int], ids: Callable[[Rows], list[Rows]]) -> Iterator[tuple[Rows, Vectors]]:
        """Yield each group's positions and vectors, longest texts first.

        One thread a group: it waits for nobody, where several threads of one batch wait at each operator.
        """

        def run(rows: Rows) -> tuple[Rows, Vectors]:
            return rows, self._group(ids(rows))

        # Several for each thread, so that all end together; of a large job many, so that what is done is kept soon.
        share = int(sum(lengths)) // (4 * self._workers)
        groups = list(batched(lengths, max(self._batch_tokens, min(GROUP_TOKENS, share))))
        if self._workers == 1 or len(groups) < 2:
            yield from map(run, groups)
            return
        pool = ThreadPoolExecutor(min(self._workers, len(groups)), "embed")
        try:
            yield from pool.map(run, groups)
        finally:  # also when the caller was stopped: what has not begun is not waited for
            pool.shutdown(cancel_futures=True)

    def _group(self, ids: list[Rows]) -> Vectors:
        made = np.empty((len(ids), self.dimensions), np.float32)
        for rows in batched([len(i) for i in ids], self._batch_tokens):
            made[rows] = self._run([ids[row] for row in rows])
        return made

    def _prefix(self, query: bool) -> str:
        return self.facts.query_prefix if query else self.facts.document_prefix

    def cut(self, texts: Sequence[str]) -> list[Rows]:
        """Return the token ids of each text (its prefix included), special ones as well, at most `limit` of them."""
        found: list[Rows] = []
        for start in range(0, len(texts), TOKENIZED):
            some = self._cutting.encode_batch_fast(list(texts[start : start + TOKENIZED]))
            found += [np.array(e.ids, np.int64) for e in some]
        return found

    def _run(self, ids: list[Rows]) -> Vectors:
        tokens, mask = self._padded(ids)
        known = {"input_ids": tokens, "attention_mask": mask}
        feed = {name: known[name] if name in known else np.zeros_like(tokens) for name in self.facts.inputs}
        return np.asarray(self._session.run([self.facts.output], feed)[0], np.float32)

    def _padded(self, ids: list[Rows]) -> tuple[Rows, Rows]:
        width = max(len(i) for i in ids)
        tokens = np.full((len(ids), width), self.facts.pad, np.int64)
        mask = np.zeros((len(ids), width), np.int64)
        for row, some in enumerate(ids):
            tokens[row, : len(some)], mask[row, : len(some)] = some, 1
        return tokens, mask


def batched(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> Iterator[Rows]:
    """Yield the positions of texts of similar length, longest first, at most so many padded tokens at a time."""
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def open_tokenizer(file: Path) -> Any:
    """Open a tokenizer.json; what it says of cutting and padding is left out, that is the embedder's own affair."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises nothing narrower
        raise UserError(f"{file} is no tokenizer: {e}", hint="a tokenizer.json of Hugging Face's tokenizers") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def cores() -> int:
    """Return how many cores this process may use: its affinity, bounded by its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no quota ("max"), or no such file
        return count


def _session(file: Path) -> Any:
    # Set before onnxruntime is imported: it uploads usage events otherwise.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Patterns of memory are kept for each shape, and no two batches have the same.
    options.enable_mem_pattern = False
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's own tree, which is not part of its public names
        raise UserError(f"{file} is no model that onnxruntime {ort.__version__} reads: {e}") from None


def store_folder(store: Store, embedder: str, scratch: Path) -> Path:
    """Return a local folder with an embedder of the store, fetched once. Raises `UserError` when it is not there."""
    target = scratch / FOLDER / embedder
    for name in (MODEL, TOKENIZER, FACTS):
        if (target / name).exists():
            continue
        try:
            local = store.local(f"{FOLDER}/{embedder}/{name}", scratch / "fetched")
        except FileNotFoundError:
            raise UserError(
                f"the embedder {embedder} is not in the store ({store.uri}/{FOLDER}/{embedder}/{name})",
                hint="the verb `embed` puts it there: run it again",
            ) from None
        if store.is_local:
            return local.parent
        target.mkdir(parents=True, exist_ok=True)
        os.replace(local, target / name)
    return target
