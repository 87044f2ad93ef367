"""What a document is called that has no title of its own."""

from __future__ import annotations

import re
from urllib.parse import unquote

from orrery.rag.reading.outline import LONGEST_TITLE, line

# Notion puts the page's id behind each name of an export: `Runbook 0123…cdef.md`.
_NOTION_ID = re.compile(r"[ _-]+[0-9a-f]{32}(?:_all)?$", re.IGNORECASE)


def from_name(name: str) -> str:
    """Return a title from a file's name, or from a page's address: without folder, ending and an id of Notion's."""
    last = unquote(name.rstrip("/").rsplit("/", 1)[-1])
    stem = re.sub(r"(?<=.)\.[A-Za-z0-9]{1,8}$", "", last)
    return line(_NOTION_ID.sub("", stem) or stem, LONGEST_TITLE) or "Untitled"
