"""HTML: what a reader of the page would read. No script, style, navigation, template, comment or hidden element."""

from __future__ import annotations

import re
from typing import Any

from orrery.rag.reading.outline import LONGEST_TITLE, Bounds, Outline, Reading, Unreadable, line
from orrery.rag.reading.plain import decode
from orrery.rag.records import Section

HEADINGS = {f"h{n}": n for n in range(1, 7)}
DROPPED = {
    *("script", "style", "nav", "template", "noscript", "head", "iframe", "object", "embed", "svg", "math", "canvas"),
    *("audio", "video", "select", "button", "textarea", "datalist", "dialog", "frameset", "noframes"),
}
BLOCKS = {
    *("p", "div", "section", "article", "main", "header", "footer", "aside", "blockquote", "figure", "figcaption"),
    *("ul", "ol", "dl", "dt", "dd", "li", "table", "thead", "tbody", "tfoot", "caption", "tr", "pre", "form", "hr"),
    *("address", "details", "summary", "fieldset", "body", "html", "center", "hgroup", "legend", *HEADINGS),
}
# A list or a table stays one block, its items and rows a line each.
GROUPS = {"ul", "ol", "dl", "table"}
LISTS = {"ul", "ol"}
CELLS = {"td", "th"}
# A cell with one of these is a page's layout, not a table's cell.
NO_CELL = ("table", "ul", "ol", "dl", "pre", *HEADINGS)
CODE = {"code", "kbd", "samp", "tt"}
HIDDEN = re.compile(
    r"display\s*:\s*none|visibility\s*:\s*hidden|(?:font-size|opacity)\s*:\s*0(?:\.0+)?(?![.\d])", re.IGNORECASE
)
_PERMALINK = re.compile(r"\s*[¶#🔗§]+\s*$")
_SPACE = re.compile(r"[ \t\n\r\f\xa0]+")


def read(data: bytes, charset: str | None, bounds: Bounds) -> Reading:
    """Return a page's sections; of its <main> alone where it has exactly one. Raises `Unreadable`."""
    text, notes = decode(data, charset or _declared(data))
    title, sections = outlined(text, bounds)
    return Reading(title, sections, notes)


def _declared(data: bytes) -> str | None:
    """Return the charset that a page declares in its head; none for UTF-8, which shows by itself."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        from bs4.dammit import EncodingDetector

        return EncodingDetector.find_declared_encoding(data[:4096], is_html=True) or None
    return None


def outlined(text: str, bounds: Bounds, *, whole: bool = False) -> tuple[str, tuple[Section, ...]]:
    """Return title and sections of HTML. Raises `Unreadable` for one that is nested too deeply."""
    root = _parsed(text)
    if root is None:
        return "", ()
    mains = [] if whole else root.xpath("//main | //*[@role='main']")
    shown = len(mains) == 1 and not any(_hidden(e) for e in (mains[0], *mains[0].iterancestors()))
    walk = _Walk(Outline(bounds))
    walk.through(mains[0] if shown else root)
    titles = root.xpath("//head/title/text()") or root.xpath("//title[not(ancestor::svg)]/text()")
    return line(str(titles[0]) if titles else "", LONGEST_TITLE) or walk.outline.first, walk.outline.sections()


def _parsed(text: str) -> Any:
    from lxml import etree

    # Comments and processing instructions never reach the tree, and nothing is fetched.
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, no_network=True, remove_comments=True, remove_pis=True)
    try:
        root = etree.fromstring(text.encode("utf-8", "replace"), parser)
    except etree.XMLSyntaxError as e:
        if "empty" in str(e).lower():
            return None
        if "unknown error" in str(e):  # as libxml2 tells that there is no memory left
            raise MemoryError from None
        raise Unreadable(f"it is no HTML: {str(e)[:200]}") from None
    if any(entry.type_name == "ERR_RESOURCE_LIMIT" for entry in parser.error_log):
        raise Unreadable("its elements are nested too deeply to be read whole")
    return root


def _hidden(element: Any) -> bool:
    told = element.attrib
    if not told:
        return False
    return (
        "hidden" in told
        or told.get("aria-hidden", "").strip().lower() == "true"
        or told.get("role", "").strip().lower() == "navigation"
        or bool(HIDDEN.search(told.get("style", "")))
    )


def _left_out(tag: str, element: Any) -> bool:
    return (tag in DROPPED and not (tag == "dialog" and "open" in element.attrib)) or _hidden(element)


class _Walk:
    """Goes once through the tree, without recursion, and tells an outline what it sees."""

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self._words: list[str] = []  # of the paragraph, row or heading that is open
        self._rows: list[str] = []  # of the list or table that is open
        self._lists: list[tuple[str, int]] = []  # kind and number of the newest item, outermost first
        self._marker = ""  # what the next row begins with
        self._cells: list[bool] = []  # of each cell that is open, outermost first: is it a plain one
        self._groups = 0
        self._pre, self._language = 0, ""

    def through(self, root: Any) -> None:
        """Walk through all below `root`."""
        from lxml import etree

        walk = etree.iterwalk(root, events=("start", "end"))
        for event, element in walk:
            tag = element.tag if isinstance(element.tag, str) else ""
            if event == "start":
                if _left_out(tag, element):
                    walk.skip_subtree()
                    continue
                self._start(tag, element)
                self._text(element.text)
            else:
                if not _left_out(tag, element):
                    self._end(tag)
                if element is not root:
                    self._text(element.tail)
        self._flush()
        self._flush_rows()

    def _text(self, text: str | None) -> None:
        if text and not self._pre:
            text = _SPACE.sub(" ", text) if self._words else _SPACE.sub(" ", text).lstrip()
        if text:
            self._words.append(text)

    def _start(self, tag: str, element: Any) -> None:
        if self._pre:
            self._in_code(tag)
        elif tag == "br":
            self._words.append("\n")
        elif tag == "img":
            self._text(element.get("alt"))
        elif tag in CODE:
            self._words.append("`")
        elif tag in CELLS:
            self._cells.append(next(element.iterdescendants(*NO_CELL), None) is None)
            self._words.append(" | " if self._words else "")
        elif tag in BLOCKS:
            self._break()
            self._open(tag, element)

    def _open(self, tag: str, element: Any) -> None:
        if tag in GROUPS:
            self._groups += 1
            if tag in LISTS:
                start = element.get("start", "1")
                self._lists.append((tag, int(start) - 1 if re.fullmatch(r"\d{1,6}", start) else 0))
        elif tag == "li":
            kind, number = self._lists.pop() if self._lists else ("ul", 0)
            self._lists.append((kind, number + 1))
            indent = "  " * (len(self._lists) - 1)
            self._marker = f"{indent}{number + 1}. " if kind == "ol" else f"{indent}- "
        elif tag == "pre":
            self._pre, self._language = 1, _language(element)
        elif tag in HEADINGS:
            self._flush_rows()

    def _end(self, tag: str) -> None:
        if self._pre:
            self._pre -= tag == "pre"
            if self._pre == 0:
                code, self._words = "".join(self._words).strip("\n").rstrip(), []
                if code.strip():
                    self._row(f"```{self._language}\n{code}\n```")
        elif tag in CODE:
            self._words.append("`")
        elif tag in HEADINGS:
            text, self._words = "".join(self._words), []
            self.outline.heading(HEADINGS[tag], _PERMALINK.sub("", text))
        elif tag in CELLS:
            if self._cells and not self._cells.pop():
                self._flush()
        elif tag in BLOCKS:
            self._break()
            if tag in GROUPS:
                self._groups -= 1
                if tag in LISTS and self._lists:
                    self._lists.pop()
                if self._groups == 0:
                    self._flush_rows()

    def _in_code(self, tag: str) -> None:
        """Inside of a <pre> each block, such as a highlighter's line, begins on a line of its own."""
        self._pre += tag == "pre"
        if tag == "br" or (tag in BLOCKS and self._words and not self._words[-1].endswith("\n")):
            self._words.append("\n")

    def _break(self) -> None:
        """Begin a new paragraph; in a plain cell of a table, its row goes on."""
        if self._cells and self._cells[-1]:
            self._words.append(" ")
        else:
            self._flush()

    def _flush(self) -> None:
        """End the paragraph or row that is open."""
        text, self._words = "".join(self._words), []
        text = re.sub(r" {2,}", " ", "\n".join(part.strip() for part in text.split("\n"))).strip()
        if text.strip():
            self._row(text)

    def _row(self, text: str) -> None:
        """Add a row to the list or table that is open, a block where none is."""
        if self._groups == 0:
            self.outline.block(text)
            return
        indent = " " * len(self._marker) if self._marker else "  " * len(self._lists)
        marker, self._marker = self._marker or indent, ""
        self._rows.append(marker + text.replace("\n", "\n" + " " * len(marker)))

    def _flush_rows(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self.outline.block("\n".join(rows))


def _language(pre: Any) -> str:
    """Return a code block's language, as highlighters write it: class="language-bash"."""
    classes = " ".join([pre.get("class", ""), *(child.get("class", "") for child in pre[:1])])
    found = re.search(r"(?:^|\s)(?:language|lang|highlight)-([A-Za-z0-9+#-]{1,20})(?:\s|$)", classes)
    return found[1] if found else ""
