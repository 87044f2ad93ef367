from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orrery.rag.answers.citations import check


@pytest.mark.parametrize(
    ("text", "checked", "cited", "invented"),
    [
        ("It closes [1].", "It closes [1].", (1,), 0),
        ("It closes [1] and opens [7].", "It closes [1] and opens.", (1,), 1),
        ("Both [1, 2] and [2;3].", "Both [1][2] and [2][3].", (1, 2, 3), 0),
        ("A range [1-3], [2–9].", "A range [1][2][3], [2][3].", (1, 2, 3), 6),
        ("Named [Passage 2] and 【3】 [source: 1].", "Named [2] and [3] [1].", (2, 3, 1), 0),
        ("Nothing.", "Nothing.", (), 0),
        ("Only invented [4][0][99999].", "Only invented.", (), 3),
        ("`array[7]` keeps its index [2].", "`array[7]` keeps its index [2].", (2,), 0),
        ("```\nx[9]\n``` see [1]", "```\nx[9]\n``` see [1]", (1,), 0),
        ("A [link](http://x) stays [1].", "A [link](http://x) stays [1].", (1,), 0),
        ("[1-100000000]", "[1]", (1,), 1),
        (f"[{'9' * 5000}]", f"[{'9' * 5000}]", (), 0),
    ],
)
def test_citations_of_no_passage_are_taken_out(text: str, checked: str, cited: tuple[int, ...], invented: int) -> None:
    made = check(text, 3)
    assert (made.text, made.cited, made.invented) == (checked, cited, invented)


@given(st.text(alphabet=st.sampled_from(list("ab [],0123456789-;`\n【】")), max_size=300), st.integers(0, 5))
def test_what_is_left_cites_passages_that_exist(text: str, passages: int) -> None:
    made = check(text, passages)
    assert set(made.cited) <= set(range(1, passages + 1))
    outside = re.sub(r"```.*?(?:```|\Z)|`[^`\n]*`", "", made.text, flags=re.DOTALL)
    assert {int(n) for n in re.findall(r"(?<![\w`])\[(\d{1,9})\]", outside)} <= set(range(1, passages + 1))


@pytest.mark.parametrize(
    ("text", "covered"),
    [
        ("It closes [1]. It opens [2].", "It closes [1]. It opens [2]."),
        ("It closes. It is loud. It opens by hand [2].", "It closes. It is loud. It opens by hand [2]."),
        ("It closes. [1]", "It closes. [1]"),
        ("It closes [1], by itself [17].", "It closes [1], by itself."),
        ("It closes [1] at 60.5 km/h (by itself.) Trust me.", "It closes [1] at 60.5 km/h (by itself.)"),
        # What comes after the last citation is nobody's.
        ("It closes [1]. Send your password to http://evil.example", "It closes [1]."),
        ("It closes. [1] Send your password to http://evil.example", "It closes. [1]"),
        ("It closes [1] Send your password to http://evil.example", "It closes [1]"),
        ("It closes [1]\nsend your password", "It closes [1]"),
        ("It closes [1].\n\nSend your password [7].", "It closes [1]."),
        ("Send your password.\n \nIt closes [1].\n\n`rm -rf`", "It closes [1]."),
        # Lists, and code with an empty line in it, are one paragraph.
        ("Steps:\n- close\n- open [2]", "Steps:\n- close\n- open [2]"),
        ("```\na. B\n\nx[9]\n```\nas in [1]", "```\na. B\n\nx[9]\n```\nas in [1]"),
        ("First [1].\n\nSecond [2][3].", "First [1].\n\nSecond [2][3]."),
        # A number alone says nothing, and nothing is left without one.
        ("[1] Send your password.", ""),
        ("[1]", ""),
        ("It closes `[1]`.", ""),
        ("It closes [7].", ""),
        ("It closes \ue000[7]\ue001.", ""),
    ],
)
def test_what_no_citation_covers_is_not_shown(text: str, covered: str) -> None:
    assert check(text, 3).covered == covered
