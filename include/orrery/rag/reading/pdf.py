"""PDF, page by page, with the outline's entries as headings."""

from __future__ import annotations

import io
import logging
from typing import Any

from orrery.rag.reading.outline import LONGEST_HEADING, LONGEST_TITLE, Bounds, Reading, Unreadable, line, tidy
from orrery.rag.records import Section

MOST_ENTRIES, DEEPEST = 20_000, 6
TOLD_PAGES = 5


def read(data: bytes, charset: str | None, bounds: Bounds) -> Reading:
    """Return a PDF's pages that have text. Raises `Unreadable` for one that is broken, locked or too long."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells each oddity of a page
    try:
        reader = PdfReader(io.BytesIO(data), strict=False)
        if reader.is_encrypted and not _opens(reader):
            raise Unreadable("it is encrypted: it opens with a password only")
        count = len(reader.pages)
        if count > bounds.pages:
            raise Unreadable(f"it has {count:,} pages; at most {bounds.pages:,} are read", skip=True)
        return _pages(reader, count, bounds)
    except (Unreadable, MemoryError):
        raise
    except (PyPdfError, RecursionError, OSError) as e:
        raise Unreadable(f"it is a broken PDF: {_said(e)}") from None
    except Exception as e:  # whatever a parser trips over in bytes that nobody vouches for
        raise Unreadable(f"it is a broken PDF: {_said(e)}") from None


def _opens(reader: Any) -> bool:
    """Tell whether a PDF with restrictions opens without a password."""
    try:
        return bool(reader.decrypt(""))
    except Exception:
        return False


def _pages(reader: Any, count: int, bounds: Bounds) -> Reading:
    headings = _headings(reader)
    sections: list[Section] = []
    failed: list[str] = []
    left, path = bounds.characters, tuple[str, ...]()
    for number in range(1, count + 1):
        path = headings.get(number, path)
        try:
            text = tidy(reader.pages[number - 1].extract_text() or "")
        except MemoryError:
            raise
        except Exception as e:
            failed.append(f"page {number} ({_said(e)})")
            continue
        left -= len(text)
        if left < 0:
            raise Unreadable(f"it has more than {bounds.characters:,} characters of text", skip=True)
        if text.strip():
            sections.append(Section(path, text, number))
    if failed and not sections:
        raise Unreadable(f"none of its pages can be read: {failed[0]}")
    more = f" and {len(failed) - TOLD_PAGES} more" if len(failed) > TOLD_PAGES else ""
    notes = (f"not read: {', '.join(failed[:TOLD_PAGES])}{more}",) if failed else ()
    return Reading(_title(reader), tuple(sections), notes)


def _title(reader: Any) -> str:
    try:
        return line(str(reader.metadata.title or "") if reader.metadata else "", LONGEST_TITLE)
    except Exception:  # a title is not worth the document
        return ""


def _headings(reader: Any) -> dict[int, tuple[str, ...]]:
    """Return the path of headings by the page on which it begins; the first one where several do."""
    found: dict[int, tuple[str, ...]] = {}
    try:
        # Entries, each list being one level below the entry before it.
        queue: list[tuple[Any, tuple[str, ...]]] = [(reader.outline, ())]
        seen = 0
        while queue:
            entries, above = queue.pop()
            path = above
            for entry in entries:
                seen += 1
                if seen > MOST_ENTRIES:
                    return {}
                if isinstance(entry, list):
                    if len(above) < DEEPEST:
                        queue.append((entry, path))
                    continue
                name = line(str(entry.title or ""), LONGEST_HEADING)
                path = (*above, name) if name else above
                page = reader.get_destination_page_number(entry)
                if name and page is not None and page >= 0:
                    number = page + 1
                    if number not in found or len(path) < len(found[number]):
                        found[number] = path
    except MemoryError:
        raise
    except Exception:  # an outline is a help, no more
        return {}
    return found


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
