"""From a document's bytes to its title and sections. Pure: the same bytes, kind and bounds give the same reading.

Whatever stands in a document is data from outside: nothing of it is run, fetched or believed. `pool` carries this out
in processes of their own, which may hang, grow or die without taking the run along.
"""

from __future__ import annotations

from dataclasses import dataclass

from orrery.rag.reading import html, kinds, markdown, pdf, plain
from orrery.rag.reading.kinds import HTML, MARKDOWN, PDF, TEXT
from orrery.rag.reading.outline import Bounds, Reading, Unreadable
from orrery.rag.reading.titles import from_name

__all__ = ["HTML", "MARKDOWN", "PDF", "TEXT", "Bounds", "Reading", "Source", "Unreadable", "from_name", "kinds", "read"]

READERS = {MARKDOWN: markdown.read, HTML: html.read, PDF: pdf.read, TEXT: plain.read}
LIBRARIES = ("beautifulsoup4", "charset-normalizer", "lxml", "markdown-it-py", "pypdf")


@dataclass(frozen=True, slots=True)
class Source:
    """What is read: its bytes, one of the four kinds, and the charset that its server named, if any."""

    data: bytes
    kind: str
    charset: str | None = None


def read(source: Source, bounds: Bounds) -> Reading:
    """Read a document. Raises `Unreadable` for one that is broken, empty or beyond the bounds."""
    found = READERS[source.kind](source.data, source.charset, bounds)
    if not any(section.text for section in found.sections):
        raise Unreadable("there is no text in it" + (" (scanned pages?)" if source.kind == PDF else ""), skip=True)
    return found


def fingerprint_of(bounds: Bounds) -> str:
    """Return a digest of all that a reading depends on but the document: the code, its libraries and the bounds."""
    import importlib.metadata

    from orrery import fingerprint

    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    told = {"code": fingerprint.code(__name__), "libraries": versions, "bounds": [bounds.pages, bounds.characters]}
    return fingerprint.digest(told)[:32]
