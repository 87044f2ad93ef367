"""Which of the four kinds a document is: by its content first, then by what its server or its name says."""

from __future__ import annotations

from orrery.rag.reading.outline import Unreadable

MARKDOWN, HTML, PDF, TEXT = "text/markdown", "text/html", "application/pdf", "text/plain"
ENDINGS: dict[str, str] = {
    **dict.fromkeys(("md", "markdown", "mdown", "mkd"), MARKDOWN),
    **dict.fromkeys(("html", "htm", "xhtml"), HTML),
    "pdf": PDF,
    **dict.fromkeys(("txt", "text", "rst", "adoc", "org", "csv", "tsv", "log"), TEXT),
}
DECLARED: dict[str, str] = {
    **dict.fromkeys(("text/markdown", "text/x-markdown"), MARKDOWN),
    **dict.fromkeys(("text/html", "application/xhtml+xml"), HTML),
    **dict.fromkeys(("application/pdf", "application/x-pdf"), PDF),
    **dict.fromkeys(("text/plain", "text/csv", "text/x-rst"), TEXT),
}
# How what is no text begins.
BINARY: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "an image, sound or film (RIFF)"),
    (b"PK\x03\x04", "a ZIP archive or an Office document"),
    (b"\xd0\xcf\x11\xe0", "an Office document of the old kind"),
    (b"\x1f\x8b", "compressed (gzip)"),
    (b"BZh", "compressed (bzip2)"),
    (b"\xfd7zXZ", "compressed (xz)"),
    (b"(\xb5/\xfd", "compressed (zstd)"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!\x1a", "a RAR archive"),
    (b"\x7fELF", "a program"),
    (b"%!PS", "PostScript"),
)
BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_TEXTUAL = bytes({9, 10, 12, 13, 27} | set(range(32, 256)))
HEAD = 8192
# A stray NUL is dropped; a tenth of control characters is no text.
MOST_CONTROL = 0.1
READ = "Markdown, HTML, PDF and plain text are"


def ending(name: str) -> str:
    """Return a file name's ending in small letters, without the dot; empty for none."""
    last = name.rsplit("/", 1)[-1]
    return last.rpartition(".")[2].lower() if "." in last.lstrip(".") else ""


def refused(name: str) -> str | None:
    """Return why a file of this name is not even opened, or None."""
    end = ending(name)
    return f"files of the type .{end[:20]} are not read ({READ})" if end and end not in ENDINGS else None


def of_file(name: str, data: bytes) -> str:
    """Return the kind of a file. Raises `Unreadable`."""
    return _of(data, ENDINGS.get(ending(name)), f"its name ends with .{ending(name)}")


def of_page(declared: str | None, data: bytes) -> str:
    """Return the kind of what a web server gave. Raises `Unreadable`."""
    if declared and declared not in DECLARED and declared != "application/octet-stream":
        raise Unreadable(f"its content type {declared[:60]!r} is not read ({READ})", skip=True)
    return _of(data, DECLARED.get(declared or ""), f"its server says {declared}")


def _of(data: bytes, said: str | None, who: str) -> str:
    head = data[:HEAD]
    if not head.strip():
        raise Unreadable("it is empty", skip=True)
    if b"%PDF-" in head[:1024]:
        return PDF
    for magic, what in BINARY:
        if head.startswith(magic):
            raise Unreadable(f"its content is {what}", skip=True)
    if said == PDF:
        raise Unreadable(f"it is no PDF, though {who}")
    if not head.startswith(BOMS) and len(head.translate(None, _TEXTUAL)) > MOST_CONTROL * len(head):
        raise Unreadable("its content is binary", skip=True)
    if said in (None, TEXT) and _looks_like_html(head):
        return HTML
    return said or TEXT


def _looks_like_html(head: bytes) -> bool:
    start = head.removeprefix(BOMS[0]).lstrip()[:200].lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))
