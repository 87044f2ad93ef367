"""Plain text, and how bytes become text."""

from __future__ import annotations

import codecs
import re

from orrery.rag.reading.outline import Bounds, Outline, Reading

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"))
_BOMS_16 = ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# Python has codecs that are no charsets (punycode, unicode_escape …), some of them slow on purpose-made bytes.
_CHARSET = re.compile(r"^(ascii|utf-(8|16|32)|iso(8859|2022)|cp\d|koi8|gb|big5|euc_|shift_jis|mac|latin|tis|ptcp)")
GUESSED_FROM = 1 << 16


def read(data: bytes, charset: str | None, bounds: Bounds) -> Reading:
    """Return plain text as one section without heading."""
    text, notes = decode(data, charset)
    outline = Outline(bounds)
    outline.block(text)
    return Reading("", outline.sections(), notes)


def decode(data: bytes, charset: str | None) -> tuple[str, tuple[str, ...]]:
    """Return bytes as text, and what to say about it: by its mark, as UTF-8, as declared, or by a guess.

    What is UTF-8 without a fault is UTF-8, whatever its server says.
    """
    nul = ("NUL bytes were left out",) if b"\0" in data else ()
    for mark, name in _BOMS + _BOMS_16:
        if data.startswith(mark):
            return _replacing(data[len(mark) :], name, () if "utf-8" not in name else nul)
    wide = known(charset)
    if wide and wide.startswith(("utf-16", "utf-32")):
        return _replacing(data, wide, ())
    data = data.replace(b"\0", b"")
    try:
        return data.decode("utf-8"), nul
    except UnicodeDecodeError:
        pass
    for found in (known(charset), _guess(data)):
        if found is None:
            continue
        try:
            return data.decode(found), (*nul, f"it is not UTF-8: read as {found}")
        except (UnicodeDecodeError, LookupError):
            continue
    return _replacing(data, "utf-8", nul)


def known(charset: str | None) -> str | None:
    """Return Python's name of a charset, or None for what is none."""
    try:
        name = codecs.lookup((charset or "").strip()[:40]).name
    except (LookupError, ValueError):
        return None
    return name if _CHARSET.match(name) else None


def _replacing(data: bytes, name: str, notes: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    text = data.decode(name, "replace")
    count = text.count("\ufffd")
    told = (f"{count:,} characters are not {name.removesuffix('-le').removesuffix('-be').upper()}: replaced",)
    return text, (*notes, *told) if count else notes


def _guess(data: bytes) -> str | None:
    from charset_normalizer import from_bytes

    best = from_bytes(data[:GUESSED_FROM]).best()
    return known(best.encoding) if best else None
