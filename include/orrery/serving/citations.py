"""Checks what a model wrote against what was retrieved: citations of passages that it never saw are taken out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orrery.serving.texts import clean

# [2], [1, 3], [2-4], [Passage 2], 【2】: as models write them.
_CITATION = re.compile(
    r"[\[【]\s*(?:(?:passages?|sources?|quellen?)\s*:?\s*)?(#?\d{1,9}(?:\s*(?:[,;&]|and|-|–)\s*#?\d{1,9})*)\s*[\]】]",
    re.IGNORECASE,
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_RANGE = re.compile(r"(\d+)\s*[-–]\s*#?(\d+)")


@dataclass(frozen=True)
class Checked:
    """An answer whose citations all exist, written [n]; `cited` are their numbers, `invented` how many were not."""

    text: str
    cited: tuple[int, ...]
    invented: int


def check(text: str, passages: int) -> Checked:
    """Return the answer with its citations checked against passages 1 to `passages`; code in backticks stays as is."""
    cited: dict[int, None] = {}
    invented = 0

    def one(match: re.Match[str]) -> str:
        nonlocal invented
        numbers = list(dict.fromkeys(_numbers(match.group(1))))
        good = [n for n in numbers if 1 <= n <= passages]
        invented += len(numbers) - len(good)
        cited.update(dict.fromkeys(good))
        return "".join(f"[{n}]" for n in good)

    out, at = [], 0
    text = clean(text)
    for code in [*_CODE.finditer(text), None]:
        out.append(_CITATION.sub(one, text[at : code.start() if code else len(text)]))
        if code:
            out.append(code.group())
            at = code.end()
    tidy = re.sub(r"[ \t]+(?=[.,;:!?]|\n|$)", "", "".join(out))
    return Checked(re.sub(r"(?<=\S)[ \t]{2,}(?=\S)", " ", tidy).strip(), tuple(cited), invented)


def _numbers(text: str) -> list[int]:
    """Return the numbers of `1, 3-5`; a range is at most twenty long, or its ends alone."""
    found: list[int] = []
    for first, last in _RANGE.findall(text):
        low, high = int(first), int(last)
        found += range(low, high + 1) if 0 < high - low < 20 else [low, high]
    return found + [int(n) for n in re.findall(r"\d+", _RANGE.sub(" ", text))]
