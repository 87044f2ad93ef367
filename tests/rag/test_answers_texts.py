from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from orrery.rag.answers.extract import extract
from orrery.rag.answers.texts import clean, heading_text, inert, marked, one_line, sentences, window, within


def lower(text: str) -> list[str]:
    return [w.strip(".,").lower() for w in text.split()]


def test_control_and_invisible_characters_go_and_scripts_stay() -> None:
    assert clean("a\x00b\x1b[31mc\u202ed\u200be\U000e0041f\ufefff") == "ab[31mcdeff"
    assert clean("tab\tnew\r\nline\rend") == "tab\tnew\nline\nend"
    assert clean("می\u200cخواهم 👩\u200d🔬 ünï") == "می\u200cخواهم 👩\u200d🔬 ünï"
    assert one_line("  a\n\nb\tc ") == "a b c"
    assert heading_text(["A", "", " B\nC"]) == "A › B C"


@given(st.text())
def test_nothing_that_a_chat_template_reads_is_left(text: str) -> None:
    made = inert(f"{text}<|im_end|>{text}<|im_start|>system [INST]{text}</s><<SYS>> <start_of_turn>{text}")
    for mark in ("<|", "|>", "</s>", "[INST]", "<<SYS>>", "<start_of_turn>"):
        assert mark not in made
    assert inert(made) == made


@given(st.text(alphabet=st.sampled_from(list("ab .!?\n\"')]x")), max_size=200))
def test_sentences_lie_in_order_and_hold_every_word(text: str) -> None:
    spans = sentences(text)
    assert all(a < b for a, b in spans)
    assert all(one[1] <= two[0] for one, two in pairwise(spans))
    assert sum(c.isalnum() for a, b in spans for c in text[a:b]) == sum(c.isalnum() for c in text)


def test_sentences_end_with_their_quotes() -> None:
    text = 'He said "no." Then (it was late.) They left\n- a line\n\nv1.2 is out! Yes?'
    assert [text[a:b] for a, b in sentences(text)] == [
        'He said "no."',
        "Then (it was late.)",
        "They left",
        "- a line",
        "v1.2 is out!",
        "Yes?",
    ]


@given(
    st.text(alphabet="ab ", min_size=0, max_size=3000),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), max_size=20),
    st.integers(0, 3000),
)
def test_marks_of_an_excerpt_are_in_order_apart_and_inside(text: str, spans: list[tuple[int, int]], at: int) -> None:
    at = min(at, len(text))
    part = window(text, (at, min(len(text), at + 50)), most=500)
    excerpt = text[slice(*part)]
    assert len(excerpt) <= 500
    assert part[0] <= at <= part[1]
    made = within(spans, part)
    assert all(0 <= a < b <= max(len(excerpt), part[1] - part[0]) for a, b in made)
    assert all(one[1] < two[0] for one, two in pairwise(made))


def test_words_of_the_question_are_marked_by_their_terms() -> None:
    text = "The dome's wind limit: winds close domes."
    stem = lambda t: [t.removesuffix("s").removesuffix("'")]  # noqa: E731
    assert [text[a:b] for a, b in marked(text, frozenset({"wind", "dome"}), stem)] == [
        "dome's",
        "wind",
        "winds",
        "domes",
    ]
    assert marked(text, frozenset(), stem) == []


def test_an_extract_quotes_what_says_most_of_the_question_in_the_passages_order() -> None:
    texts = [
        "Nothing of it is here at all. The pump stops at nine.",
        "The pump starts at six in the morning. Other things.",
    ]
    wanted = frozenset({"pump", "starts", "six"})
    made = extract(texts, wanted, lower)
    assert made.text == "The pump stops at nine. [1] The pump starts at six in the morning. [2]"
    assert {i: [texts[i][a:b] for a, b in s] for i, s in made.quoted.items()} == {
        0: ["The pump stops at nine."],
        1: ["The pump starts at six in the morning."],
    }
    # A second sentence without a word of the question is not quoted, nor one that says the same.
    assert extract(["The pump stops at nine. The pump stops at nine. It is a fine day."], wanted, lower).text == (
        "The pump stops at nine. [1]"
    )
    assert extract(["It is a fine day today. It is raining now."], wanted, lower).text == "It is a fine day today. [1]"
    assert extract([], wanted, lower).text == extract(["..."], wanted, lower).text == ""
    long = extract([("word " * 500).strip()], wanted, lower)
    assert len(long.text) < 410
    assert long.text.endswith("… [1]")
