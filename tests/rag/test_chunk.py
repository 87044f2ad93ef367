"""The verb chunk: passages that fit, with their headings, whose ids follow from what they say."""

from __future__ import annotations

import itertools
import random
import uuid
from functools import cache
from pathlib import Path

import embedding_house
import pytest
from embedding_house import document
from hypothesis import given, settings
from hypothesis import strategies as st

from orrery.errors import UserError
from orrery.rag.chunk import Cutter
from orrery.rag.embedding.tokens import Tokens
from orrery.rag.records import Chunk, Document, Section, chunks
from orrery.rag.spec import Chunking, Embedding

WORDS = [
    "the",
    "gate",
    "keeps",
    "a",
    "candidate",
    "that",
    "is",
    "worse",
    "than",
    "its",
    "champion",
    "and",
    "says",
    "why",
    "in",
    "the",
    "ledger",
]


@cache
def counter() -> Tokens:
    return Tokens.of(Embedding(), Path(), Path())


@pytest.fixture
def tokens():
    return counter()


def cut(tokens, made, *, limit=64, overlap=0):
    return Cutter(tokens, Chunking(tokens=limit, overlap=overlap)).cut(made)


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"Rule {i} says {' '.join(draw.choices(WORDS, k=8))}." for i in range(count)]


def test_a_short_section_is_one_chunk_with_title_and_headings(tokens):
    (made,) = cut(tokens, document("a.md", Section(("Guide", "Install"), "\nUse the package.\n", 3), title="Guide"))
    assert made.text == "Use the package."
    assert made.embedded == "Guide › Install\nUse the package."
    assert (made.heading, made.page, made.position) == (("Guide", "Install"), 3, 0)
    assert made.tokens == tokens.counts([made.embedded])[0]


def test_a_long_section_is_cut_at_sentences_and_nothing_is_lost(tokens):
    text = " ".join(sentences(40))
    made = cut(tokens, document("a.md", text))
    assert all(chunk.text.endswith(".") for chunk in made)
    assert " ".join(chunk.text for chunk in made) == text
    assert max(chunk.tokens for chunk in made) <= 64
    assert [chunk.position for chunk in made] == list(range(len(made)))


def test_chunks_are_filled(tokens):
    made = cut(tokens, document("a.md", "\n\n".join(sentences(60))), limit=100)
    # A sentence more would not have fitted.
    assert all(chunk.tokens > 100 - 20 for chunk in made[:-1])


def test_the_short_end_of_a_long_paragraph_is_joined_with_what_follows(tokens):
    paragraphs = [" ".join(sentences(5, seed)) for seed in range(8)]
    made = cut(tokens, document("a.md", "\n\n".join(paragraphs)), limit=80)
    assert not any(a.tokens + b.tokens < 70 for a, b in itertools.pairwise(made))


def test_neighbours_share_whole_sentences(tokens):
    made = cut(tokens, document("a.md", " ".join(sentences(40))), limit=80, overlap=30)
    for before, after in itertools.pairwise(made):
        shared = max(n for n in range(len(after.text)) if before.text.endswith(after.text[:n]))
        assert shared and after.text.startswith("Rule") and after.text[:shared].strip().endswith(".")
    assert max(chunk.tokens for chunk in made) <= 80


def test_rows_of_a_table_and_lines_of_code_stay_whole(tokens):
    rows = [f"| name{i} | {' '.join(WORDS[:6])} | {i} |" for i in range(30)]
    code = [f"    value_{i} = compute(value_{i - 1}, retries={i})" for i in range(30)]
    made = cut(tokens, document("a.md", "\n".join([*rows, "", "```", *code, "```"])), overlap=20)
    whole = {line.strip() for line in (*rows, *code, "```", "")}
    assert len(made) > 10
    assert {line.strip() for chunk in made for line in chunk.text.splitlines()} <= whole


def test_a_heading_path_that_is_too_long_is_shortened_from_the_left(tokens):
    heading = tuple(f"chapter {i} {' '.join(WORDS)}" for i in range(5))
    made = cut(tokens, document("a.md", Section(heading, " ".join(sentences(20)))))
    context = made[0].embedded.split("\n")[0]
    assert heading[-1].endswith(context) and len(context) > 20
    assert all(chunk.heading == heading and chunk.tokens <= 64 for chunk in made)


def test_no_word_however_long_makes_a_chunk_too_long(tokens):
    for text in ("A" * 20_000, "data:image/png;base64," + "iVBORw0KGgo" * 3000, "永" * 3000, "é" * 500, "a-" * 2000):
        made = cut(tokens, document("a.md", text))
        assert max(chunk.tokens for chunk in made) <= 64
        assert max(len(chunk.text) for chunk in made) < 1000
        assert "".join(chunk.text for chunk in made) == text


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=400), max_size=5),
    st.sampled_from((32, 48, 300)),
)
def test_whatever_the_text_no_chunk_is_over_the_limit_or_empty(texts, limit):
    made = cut(counter(), document("a.md", *texts, title=" ".join(texts)[:300]), limit=limit, overlap=10)
    assert all(0 < chunk.tokens <= min(limit, counter().limit) and chunk.text.strip() for chunk in made)
    assert len({chunk.id for chunk in made}) == len(made)
    assert all(counter().counts([chunk.embedded]) == [chunk.tokens] for chunk in made)


def test_the_embedders_own_limit_bounds_the_specs(tokens):
    made = cut(tokens, document("a.md", " ".join(sentences(300))), limit=2000)
    assert tokens.limit == 256 and 200 < max(chunk.tokens for chunk in made) <= 256


def test_an_insertion_above_renames_nothing(tokens):
    before = cut(tokens, document("a.md", Section(("Two",), "second"), Section(("Three",), "third")))
    after = cut(
        tokens, document("a.md", Section(("One",), "first"), Section(("Two",), "second"), Section(("Three",), "third"))
    )
    assert [c.id for c in after[1:]] == [c.id for c in before]


def test_the_same_passage_again_has_an_id_of_its_own(tokens):
    same = Section(("Note",), "back up first")
    made = cut(tokens, document("a.md", same, Section(("Else",), "back up first"), same))
    assert len({c.id for c in made}) == 3
    assert all(uuid.UUID(c.id).version == 5 for c in made)
    fewer = cut(tokens, document("a.md", same, same))
    assert [c.id for c in fewer] == [made[0].id, made[2].id]


def test_documents_go_through_the_verb_in_their_order(tmp_path, monkeypatch):
    house = embedding_house.make(tmp_path, monkeypatch, chunk={"tokens": 64, "overlap": 0})
    given = [document(f"{i}.md", " ".join(sentences(12, i)), title=f"Guide {i}") for i in range(5)]
    embedding_house.collect(house, [*given, document("empty.md", "\n \n")])
    done = house.run("chunk")
    made = embedding_house.chunks(house)
    assert done.metrics["documents"] == 6 and done.metrics["without_text"] == 1
    assert done.metrics["chunks"] == len(made)
    assert [c.document for c in made] == sorted(c.document for c in made)
    assert {c.title for c in made} == {f"Guide {i}" for i in range(5)}


def test_lines_come_back_as_they_were(tokens):
    made = document("a.md", Section(("A", "Ü"), 'ünïcode\n"quoted"\u2028 and', 2), title="T")
    assert Document.from_line(made.line()) == made
    (chunk,) = cut(tokens, made)
    assert Chunk.from_line(chunk.line().encode()) == chunk and chunk.line().isascii()


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "chunks.jsonl"
    path.write_text('{"id": "1"}\n')
    with pytest.raises(UserError, match="line 1 is no chunk of this version: KeyError"):
        list(chunks(path))
