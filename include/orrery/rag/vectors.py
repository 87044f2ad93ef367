"""Vectors that were computed before, by the sha256 of the text: `<project>/embedding-cache/<embedder>/<shard>`.

A shard is put whole and named by its content, so that a killed run leaves only whole ones and two runs at once add
to each other. What is damaged, or removed by another run meanwhile, is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from orrery.errors import OrreryError
from orrery.log import get
from orrery.rag.embedding.session import Rows, Vectors
from orrery.store import Store

Keys: TypeAlias = NDArray[np.uint8]  # (n, 32): sha256
KEY = 32
SUFFIX = ".vectors"
# A shard is put when it has so many rows, or after so many seconds: no more is lost with a killed run.
SHARD_ROWS, SHARD_S = 8192, 15.0
# Of more shards than this, fewer large ones are made, and what nobody has used for so many days is left out.
MANY, UNUSED_DAYS = 32, 30
LARGE_ROWS = 16_384


def key_of(text: str) -> bytes:
    """Return what a text's vector is kept under: the text as it is embedded, the embedder's prefix included."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class Shard:
    """Rows of one file: keys, since which day (ordinal) a look found them unused (0: used), and vectors."""

    name: str
    keys: Keys
    unused: NDArray[np.int32]
    vectors: Vectors


class Cache:
    """The vectors of one project by one embedder. Its owner adds to it, and flushes it at the end."""

    def __init__(self, store: Store, folder: str, dimensions: int, scratch: Path) -> None:
        self.store, self.folder, self.dimensions, self.scratch = store, folder, dimensions, scratch
        self._keys: list[Keys] = []
        self._vectors: list[Vectors] = []
        self._rows, self._since = 0, time.monotonic()

    def fill(self, keys: Keys, vectors: Vectors) -> NDArray[np.bool_]:
        """Copy what is known into `vectors` (n, d), row by row of `keys` (n, 32); return which rows were known.

        Of equal keys only the first row is looked at.
        """
        rows: dict[bytes, int] = {}
        for row, key in enumerate(_each(keys)):
            rows.setdefault(key, row)
        known = np.zeros(len(keys), np.bool_)
        for shard in self._shards():
            found = [(rows[key], i) for i, key in enumerate(_each(shard.keys)) if key in rows]
            if found:
                ours, theirs = np.array(found, np.int64).T
                vectors[ours], known[ours] = shard.vectors[theirs], True
        return known

    def add(self, keys: Keys, vectors: Vectors) -> None:
        """Keep new vectors; they are in the store after the next `flush`, which comes by itself from time to time."""
        self._keys.append(keys)
        self._vectors.append(vectors)
        self._rows += len(keys)
        if self._rows >= SHARD_ROWS or time.monotonic() - self._since >= SHARD_S:
            self.flush()

    def flush(self) -> None:
        """Put what was added since."""
        if self._rows:
            keys, vectors = np.concatenate(self._keys), np.concatenate(self._vectors)
            self._put(keys, np.zeros(len(keys), np.int32), vectors)
            self._keys, self._vectors, self._rows = [], [], 0
        self._since = time.monotonic()

    def tidy(self, used: Keys, today: int) -> bool:
        """Where there are many shards, make few: without what was unused at looks of `UNUSED_DAYS` or more apart.

        `used`: the keys of this run; `today`: its day's ordinal. The new ones are there before the old ones go. Tells
        whether it did so.
        """
        if len(self._names()) <= MANY:
            return False
        in_use, seen = set(_each(used)), set[bytes]()
        before: list[str] = []
        batch: list[Shard] = []
        made: set[str] = set()
        for shard in self._shards():
            before.append(shard.name)
            batch.append(_kept(shard, in_use, seen, today))
            if sum(len(s.keys) for s in batch) >= LARGE_ROWS:
                made.add(self._join(batch))
                batch = []
        if batch:
            made.add(self._join(batch))
        for name in set(before) - made:
            self.store.remove(f"{self.folder}/{name}")
        return True

    def _join(self, parts: list[Shard]) -> str:
        columns = ("keys", "unused", "vectors")
        return self._put(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))

    def _put(self, keys: Keys, unused: NDArray[np.int32], vectors: Vectors) -> str:
        file = io.BytesIO()
        for column in (keys, unused, np.asarray(vectors, np.float32)):
            np.save(file, column, allow_pickle=False)
        data = file.getvalue()
        name = hashlib.sha256(data).hexdigest()[:40] + SUFFIX
        self.store.put_if_absent(f"{self.folder}/{name}", data)
        return name

    def _names(self) -> list[str]:
        return [name for name in self.store.names(self.folder) if name.endswith(SUFFIX)]

    def _shards(self) -> Iterator[Shard]:
        """Yield the shards, mapped into memory; a damaged one is removed, one that another run has joined is left."""
        for name in self._names():
            try:
                path = self.store.local(f"{self.folder}/{name}", self.scratch)
                yield self._read(path, name)
            except FileNotFoundError:
                continue
            except ValueError as e:
                get().warning("vectors that were kept are damaged: they are computed again", shard=name, why=str(e))
                with contextlib.suppress(OrreryError):
                    self.store.remove(f"{self.folder}/{name}")

    def _read(self, path: Path, name: str) -> Shard:
        """Return a shard. Raises `ValueError` when its bytes are not those that it is named by, or of another shape."""
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest()[:40] + SUFFIX != name:
                raise ValueError("other bytes than it was put with")
            file.seek(0)
            keys, unused = (np.load(file, allow_pickle=False) for _ in range(2))
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if shape != (len(keys), self.dimensions) or dtype != np.float32:
                raise ValueError(f"vectors of shape {shape}, {dtype}")
            start = file.tell()
        return Shard(name, keys, unused, np.memmap(path, np.float32, "r", start, shape))


def _each(keys: Keys) -> Iterator[bytes]:
    data = keys.tobytes()
    return (data[at : at + KEY] for at in range(0, len(data), KEY))


def _kept(shard: Shard, in_use: set[bytes], seen: set[bytes], today: int) -> Shard:
    """Return a shard's rows that stay: each key once, not those that were found unused long ago and are unused now."""
    rows, unused = [], []
    for row, key in enumerate(_each(shard.keys)):
        since = 0 if key in in_use else int(shard.unused[row]) or today
        if key in seen or (since and today - since >= UNUSED_DAYS):
            continue
        seen.add(key)
        rows.append(row)
        unused.append(since)
    taken: Rows = np.array(rows, np.int64)
    return Shard(shard.name, shard.keys[taken], np.array(unused, np.int32), shard.vectors[taken])
