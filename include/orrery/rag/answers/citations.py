"""Checks what a model wrote against what was retrieved: citations of passages that it never saw are taken out.

Then what no citation covers is left out. A citation covers its own sentence and those before it in its paragraph; a
paragraph ends with an empty line. So a paragraph is kept up to the end of the sentence that holds its last citation,
and one without a citation is not kept. A citation stands behind what it covers: a full stop before it, or a capital
behind it, and its sentence has ended.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from orrery.rag.answers.prompt import SILENCE, unfenced
from orrery.rag.answers.texts import clean

# [2], [1, 3], [2-4], [Passage 2], 【2】: as models write them.
_CITATION = re.compile(
    r"[\[【]\s*(?:(?:passages?|sources?|quellen?)\s*:?\s*)?(#?\d{1,9}(?:\s*(?:[,;&]|and|-|–)\s*#?\d{1,9})*)\s*[\]】]",
    re.IGNORECASE,
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_RANGE = re.compile(r"(\d+)\s*[-–]\s*#?(\d+)")
# While text is looked at: around citations that are good, and around the number of a piece of code. Characters of
# private use, which `clean` has taken out of whatever came in.
_OPEN, _CLOSE, _CODE_OPEN, _CODE_CLOSE = "\ue000", "\ue001", "\ue002", "\ue003"
_GOOD = re.compile(f"{_OPEN}[^{_CLOSE}]*{_CLOSE}")
_HELD = re.compile(f"{_CODE_OPEN}(\\d+){_CODE_CLOSE}")
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
# Where the sentence of a citation ends: at its sign and what closes it, or with the line.
_STOP = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|(?=\n)|$")
_ENDED = re.compile(r"[.!?…][\"'”’)\]]*\s*$|\n\s*$")


@dataclass(frozen=True)
class Checked:
    """An answer whose citations all exist, written [n]; `cited` are their numbers, `invented` how many were not.

    `covered` is what of `text` may be shown: what a citation covers.
    """

    text: str
    cited: tuple[int, ...]
    invented: int
    covered: str

    @property
    def why(self) -> Literal["silent", "uncited"] | None:
        """Why nothing of it may be shown: it says that the passages hold no answer, or cites none of them."""
        if self.covered:
            return None
        return "silent" if not self.text or SILENCE.lower() in self.text.lower() else "uncited"


def read(written: str, passages: int) -> Checked:
    """Return what a model wrote, up to where it repeats its prompt, checked against the passages that it was shown."""
    return check(unfenced(written), passages)


def check(text: str, passages: int) -> Checked:
    """Return the answer with its citations checked against passages 1 to `passages`; code in backticks stays as is."""
    cited: dict[int, None] = {}
    invented = 0
    code: list[str] = []

    def one(match: re.Match[str]) -> str:
        nonlocal invented
        numbers = list(dict.fromkeys(_numbers(match.group(1))))
        good = [n for n in numbers if 1 <= n <= passages]
        invented += len(numbers) - len(good)
        cited.update(dict.fromkeys(good))
        return f"{_OPEN}{''.join(f'[{n}]' for n in good)}{_CLOSE}" if good else ""

    def hold(match: re.Match[str]) -> str:
        code.append(match.group())
        return f"{_CODE_OPEN}{len(code) - 1}{_CODE_CLOSE}"

    def plain(marked: str) -> str:
        bare = marked.replace(_OPEN, "").replace(_CLOSE, "")
        return _HELD.sub(lambda held: code[int(held.group(1))], bare).strip()

    marked = _CITATION.sub(one, _CODE.sub(hold, clean(text)))
    marked = re.sub(r"[ \t]+(?=[.,;:!?]|\n|$)", "", marked)
    marked = re.sub(r"(?<=\S)[ \t]{2,}(?=\S)", " ", marked)
    kept = [part for part in map(_covered, _PARAGRAPH.split(marked)) if part]
    return Checked(plain(marked), tuple(cited), invented, plain("\n\n".join(kept)))


def _covered(paragraph: str) -> str:
    """Return a paragraph up to the end of its last citation's sentence; nothing when no word is cited."""
    citations = list(_GOOD.finditer(paragraph))
    if not citations or not re.search(r"\w", _GOOD.sub("", paragraph[: citations[-1].start()])):
        return ""
    end = citations[-1].end()
    before, behind = _GOOD.sub("", paragraph[:end]), paragraph[end:]
    if _ENDED.search(before) or behind.lstrip()[:1].isupper():
        return paragraph[:end] + behind[: len(behind) - len(behind.lstrip(".!?…"))]
    stop = _STOP.search(behind)
    return paragraph[:end] + (behind[: stop.end()] if stop else behind)


def _numbers(text: str) -> list[int]:
    """Return the numbers of `1, 3-5`; a range is at most twenty long, or its ends alone."""
    found: list[int] = []
    for first, last in _RANGE.findall(text):
        low, high = int(first), int(last)
        found += range(low, high + 1) if 0 < high - low < 20 else [low, high]
    return found + [int(n) for n in re.findall(r"\d+", _RANGE.sub(" ", text))]
