"""Markdown, by way of HTML: so raw HTML in it is treated as HTML is, hidden parts and scripts included."""

from __future__ import annotations

import re
from typing import Any

from orrery.rag.reading import html
from orrery.rag.reading.outline import LONGEST_TITLE, Bounds, Reading, Unreadable, line
from orrery.rag.reading.plain import decode

DEEPEST = 100
_FRONT = re.compile(r"\A\s*---[ \t]*\n(.{0,65536}?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)


def read(data: bytes, charset: str | None, bounds: Bounds) -> Reading:
    """Return Markdown's sections; the title is the front matter's, else the first heading of level 1."""
    from markdown_it import MarkdownIt

    text, notes = decode(data, charset)
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    front, text = front_matter(text)
    parser = MarkdownIt("commonmark", {"html": True, "maxNesting": DEEPEST}).enable(["table", "strikethrough"])
    env: dict[str, Any] = {}
    tokens = parser.parse(text, env)
    # What lies deeper is left out by the parser, with all that follows, and it does not say so.
    if any(token.level >= DEEPEST - 2 for token in tokens):
        raise Unreadable("its lists or quotes are nested too deeply to be read whole")
    title, sections = html.outlined(parser.renderer.render(tokens, parser.options, env), bounds, whole=True)
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
