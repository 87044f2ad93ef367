"""Markdown, by way of HTML: so raw HTML in it is treated as HTML is, hidden parts and scripts included."""

from __future__ import annotations

import re
from typing import Any

from orrery.rag.reading import html
from orrery.rag.reading.outline import LONGEST_TITLE, Bounds, Reading, line
from orrery.rag.reading.plain import decode

_FRONT = re.compile(r"\A\s*---[ \t]*\n(.{0,65536}?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)


def read(data: bytes, charset: str | None, bounds: Bounds) -> Reading:
    """Return Markdown's sections; the title is the front matter's, else the first heading of level 1."""
    from markdown_it import MarkdownIt

    text, notes = decode(data, charset)
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    front, text = front_matter(text)
    parser = MarkdownIt("commonmark", {"html": True, "maxNesting": 100}).enable(["table", "strikethrough"])
    title, sections = html.outlined(parser.render(text), bounds, whole=True)
    return Reading(line(str(front.get("title") or ""), LONGEST_TITLE) or title, sections, notes)


def front_matter(text: str) -> tuple[dict[Any, Any], str]:
    """Return the YAML between the two lines `---` at the beginning, if it is a mapping, and the text after it."""
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    import yaml

    try:
        told = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, text
    return (told, text[found.end() :]) if isinstance(told, dict) else ({}, text)
