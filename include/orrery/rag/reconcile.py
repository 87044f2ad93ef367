"""Index against chunks against documents, id by id and both ways. Light."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from orrery.rag.records import Chunk

SHOWN = 20


class Holder(Protocol):
    """What has points: an engine."""

    def ids(self) -> Iterable[str]:
        """Return every point's id."""


@dataclass(frozen=True)
class Reconciliation:
    """What was expected, what was found, and where they differ; of `missing` and `extra` the first 20, sorted.

    `duplicate`: points or chunks beyond the first of their id; `orphan`: chunks whose document is not among the
    documents. Sound: none of the four.
    """

    expected: int
    found: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    missing_count: int
    extra_count: int
    duplicate: int
    orphan: int

    @property
    def sound(self) -> bool:
        """Whether index, chunks and documents agree to the last."""
        return not (self.missing_count or self.extra_count or self.duplicate or self.orphan)

    def told(self) -> dict[str, Any]:
        """Return it for a report."""
        return {**asdict(self), "missing": list(self.missing), "extra": list(self.extra), "sound": self.sound}

    def sentence(self) -> str:
        """Say what differs."""
        counts = {
            "missing": self.missing_count,
            "extra": self.extra_count,
            "duplicate": self.duplicate,
            "orphan": self.orphan,
        }
        differs = [f"{count:,} {name}" for name, count in counts.items() if count]
        shown = [
            f"{name}: {', '.join(ids[:3])}" for name, ids in (("missing", self.missing), ("extra", self.extra)) if ids
        ]
        return (
            f"{self.expected:,} chunks, {self.found:,} points: {'; '.join([', '.join(differs) or 'all agree', *shown])}"
        )


def reconcile(holder: Holder, chunks: Iterable[Chunk], documents: Iterable[str] | None = None) -> Reconciliation:
    """Compare an index with its chunks, and these with their documents' ids where given (some 100 bytes an id)."""
    known = None if documents is None else set(documents)
    expected: set[str] = set()
    duplicate = orphan = found = 0
    for chunk in chunks:
        duplicate += chunk.id in expected
        orphan += known is not None and chunk.document not in known
        expected.add(chunk.id)
    seen: set[str] = set()
    for id_ in holder.ids():
        found += 1
        duplicate += id_ in seen
        seen.add(id_)
    missing, extra = sorted(expected - seen), sorted(seen - expected)
    return Reconciliation(
        expected=len(expected),
        found=found,
        missing=tuple(missing[:SHOWN]),
        extra=tuple(extra[:SHOWN]),
        missing_count=len(missing),
        extra_count=len(extra),
        duplicate=duplicate,
        orphan=orphan,
    )
