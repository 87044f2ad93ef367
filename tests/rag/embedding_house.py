"""What the tests of `chunk` and `embed` share: documents put as if they had been collected, and a quick embedder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rag_house
import tiny_embedder

from orrery.contract import Result
from orrery.rag.records import Chunk, Document, Section
from orrery.store import File, Manifest, content_digest


def document(uri: str, *sections: Section | str, title: str = "A guide", source: str = "guides") -> Document:
    """Make a document; a string is a section without heading."""
    made = tuple(s if isinstance(s, Section) else Section((), s) for s in sections)
    id_ = hashlib.sha256(f"{source}\n{uri}".encode()).hexdigest()[:32]
    digest = hashlib.sha256(repr(made).encode()).hexdigest()
    return Document(id_, source, uri, title, "text/markdown", ("everyone",), digest, 1, made)


def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **spec: Any) -> rag_house.House:
    """Make a house whose embedder is the tiny one."""
    spec.setdefault("embedder", {"model": str(tiny_embedder.write(tmp_path / "tiny"))})
    return rag_house.make(tmp_path, monkeypatch, {}, **spec)


def collect(house: rag_house.House, documents: Sequence[Document], key: str = rag_house.DAY) -> Manifest:
    """Put documents as `collect` would, as the partition `key`."""
    data = "".join(d.line() for d in sorted(documents, key=lambda d: d.id)).encode()
    sha = hashlib.sha256(data).hexdigest()
    files = {"documents.jsonl": File(path="a1/documents.jsonl", size=len(data), sha256=sha)}
    folder = f"{rag_house.PROJECT}/collect/{sha[:32]}"
    house.store.put(f"{folder}/a1/documents.jsonl", data)
    made = Manifest(
        project=rag_house.PROJECT,
        verb="collect",
        key=key,
        address=sha[:32],
        digest=content_digest(files),
        files=files,
    )
    house.store.put_if_absent(made.path, made.model_dump_json().encode())
    house.store.publish(rag_house.PROJECT, "documents", key, made, "")
    return made


def embed(house: rag_house.House, documents: Sequence[Document], key: str = rag_house.DAY, **more: Any) -> Result:
    """Collect, cut and embed documents; return what `embed` did."""
    collect(house, documents, key)
    house.run("chunk", key, run=f"run-{key}")
    return house.run("embed", key, run=f"run-{key}", **more)


def chunks(house: rag_house.House, key: str = rag_house.DAY) -> list[Chunk]:
    return [Chunk.from_line(line) for line in house.read("chunks", "chunks.jsonl", key).splitlines()]


def vectors(house: rag_house.House, key: str = rag_house.DAY) -> Mapping[str, Any]:
    """Return each embedded text's vector."""
    manifest = house.manifest("vectors", key)
    path = house.store.local(manifest.uri("vectors.npy"), house.home)
    return dict(zip((c.embedded for c in chunks(house, key)), np.load(path), strict=True))
