from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orrery.errors import SpecError
from orrery.rag import questions
from orrery.rag.questions import Question, label, normal
from orrery.rag.records import Chunk


def written(tmp_path: Path, *lines: object) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


def asked(id_: str = "q1", quote: str = "the gate compares", uri: str = "gate.md", **more: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "question": "What does the gate do?",
        "answerable": True,
        "passages": [{"uri": uri, "quote": quote}],
        **more,
    }


def chunk(
    text: str,
    position: int = 0,
    uri: str = "docs/gate.md",
    document: str = "d1",
    groups: tuple[str, ...] = ("everyone",),
) -> Chunk:
    return Chunk(
        f"{document}-{position}",
        document,
        "guides",
        uri,
        "Gate",
        groups,
        (),
        None,
        text,
        text,
        len(text.split()),
        position,
    )


def test_a_file_is_read_with_its_empty_lines(tmp_path: Path) -> None:
    unanswerable = {"id": "u1", "question": "Who wrote it?", "answerable": False, "groups": ["team"]}
    found = questions.read(written(tmp_path, asked(), "", unanswerable, ""))
    assert [q.id for q in found] == ["q1", "u1"]
    assert found[0].passages[0].uri == "gate.md"
    assert found[0].reader == {"everyone"}
    assert found[1].reader == {"everyone", "team"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: this is no JSON"),
        ("[1]", "line 2: '[1]' is no JSON object"),
        (asked(passages=[]), "line 2: `passages` must say where"),
        (asked("q2", answerable="yes"), "line 2: answerable: 'yes'"),
        (asked("q2", passage=[]), "line 2: unknown field 'passage'\n  → did you mean 'passages'?"),
        (asked("q2", passages=[{"uri": "a.md", "text": "b"}]), "line 2: unknown field 'passages.0.text'"),
        (asked("q1"), "line 2: id 'q1' stands in line 1, too"),
        (asked("q 2"), "line 2: id: 'q 2'"),
        (asked("q2", groups=[]), "line 2: `groups` is empty"),
        (asked("q2", groups=["No one"]), "line 2: groups.0: 'No one'"),
        (asked("q2", answerable=False), "line 2: `passages` must be left out"),
        ({"id": "q2", "answerable": False}, "line 2: 'question' is missing"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path: Path, line: object, message: str) -> None:
    file = written(tmp_path, asked(), line)
    with pytest.raises(SpecError) as caught:
        questions.read(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_file_without_an_answerable_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no answerable question"):
        questions.read(written(tmp_path, {"id": "u1", "question": "Who wrote it?", "answerable": False}))
    with pytest.raises(SpecError, match="No such file"):
        questions.read(tmp_path / "nowhere.jsonl")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(SpecError, match="byte 8 is not UTF-8"):
        questions.read(file)


def labels(quote: str, *chunks: Chunk, uri: str = "gate.md", **more: Any) -> questions.Labels:
    return label([Question.model_validate(asked(quote=quote, uri=uri, **more))], chunks)


def test_a_quote_is_found_whatever_its_case_spaces_and_typography() -> None:
    found = labels("The  gate's\n`verdict`", chunk("Here THE gate’s verdict is told."), chunk("Nothing.", 1))
    assert found.relevant["q1"] == {"d1-0"}
    assert not found.lost


def test_all_chunks_that_hold_the_quote_are_relevant() -> None:
    found = labels("one sentence", chunk("one sentence, then"), chunk("more, and one sentence", 1))
    assert found.relevant["q1"] == {"d1-0", "d1-1"}


@pytest.mark.parametrize("uri", ["gate.md", "docs/gate.md", "guides/docs/gate.md"])
def test_a_document_is_named_by_its_address_or_its_end(uri: str) -> None:
    here = chunk("one sentence", uri="guides/docs/gate.md")
    other = chunk("one sentence", uri="guides/docs/navigate.md", document="d2")
    assert labels("one sentence", here, other, uri=uri).relevant["q1"] == {"d1-0"}


def test_of_a_quote_that_was_cut_the_larger_part_counts() -> None:
    quote = "the gate compares a candidate with the champion on rows of its future"
    parts = (chunk("before the gate compares a candidate with"), chunk("the champion on rows of its future after", 1))
    assert labels(quote, *parts).relevant["q1"] == {"d1-0"}
    parts = (chunk("before the gate compares"), chunk("a candidate with the champion on rows of its future after", 1))
    assert labels(quote, *parts).relevant["q1"] == {"d1-1"}
    overlapping = (
        chunk("the gate compares a candidate"),
        chunk("a candidate with the champion on rows of its future", 1),
    )
    assert labels(quote, *overlapping).relevant["q1"] == {"d1-1"}


def test_parts_that_are_no_neighbours_are_no_quote() -> None:
    quote = "the gate compares a candidate with the champion"
    apart = (chunk("the gate compares a candidate"), chunk("with the champion", 2))
    assert "relabel" in labels(quote, *apart).lost["q1"]
    strangers = (chunk("the gate compares a candidate"), chunk("with the champion", 1, document="d2"))
    assert not labels(quote, *strangers).relevant["q1"]
    gap = (chunk("the gate compares"), chunk("with the champion", 1))
    assert not labels(quote, *gap).relevant["q1"]


def test_a_question_whose_passage_is_gone_is_told() -> None:
    assert "there is no document gate.md" in labels("one sentence", chunk("one sentence", uri="other.md")).lost["q1"]
    assert "not in gate.md any more" in labels("one sentence", chunk("another")).lost["q1"]


def test_a_passage_counts_only_for_who_may_read_it() -> None:
    secret = chunk("one sentence", groups=("team",))
    found = labels("one sentence", secret)
    assert found.relevant["q1"] == frozenset()
    assert found.lost["q1"] == "its passage may be read by team, it is asked as everyone: name `groups`"
    assert labels("one sentence", secret, groups=["team"]).relevant["q1"] == {"d1-0"}


def test_spaces_of_all_kinds_are_one() -> None:
    assert normal("A\u00a0b\t\n c\u00ad") == "a b c"


def test_a_mistyped_field_is_told_before_the_one_that_is_missing_for_it(tmp_path: Path) -> None:
    wrong = {**asked(), "quesion": "What?"}
    del wrong["question"]
    with pytest.raises(SpecError, match="unknown field 'quesion'") as raised:
        questions.read(written(tmp_path, wrong))
    assert "question" in str(raised.value.hint)
