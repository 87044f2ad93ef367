"""Sparse vectors: terms as people would look for them, BM25's weights, the same on every machine."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from orrery.rag.embedding.sparse import SparseModel, encode_query, fit, index, terms, words
from orrery.rag.embedding.stopwords import STOP_WORDS

TEXTS = [
    "The gate keeps a candidate that is worse.",
    "A champion is promoted by the gate, and the gate alone.",
    "Leases number the attempts; the highest number may commit.",
]


def row(made, number):
    indptr, indices, values = made
    part = slice(indptr[number], indptr[number + 1])
    return dict(zip(indices[part].tolist(), values[part].tolist(), strict=True))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Running runs, RUN!", ["run", "run", "run"]),
        ("set ORRERY_STORE now", ["set", "orrery_store", "orreri", "store"]),
        ("step.py and --min-rows", ["step.py", "step", "py", "min-rows", "min", "row"]),
        ("version 3.11", ["version", "3.11", "3", "11"]),
        ("don't", []),
        ("The end. Next one", ["end", "next", "one"]),
        ("ﬁle ４２", ["file", "42"]),
        ("__init__ ... -- _", ["init"]),
        ("", []),
    ],
)
def test_terms(text, found):
    assert terms(text) == found


def test_terms_of_other_languages():
    assert terms("Die Häuser der Stadt", "german") == ["haus", "stadt"]
    assert terms("The houses", "none") == ["the", "houses"]
    assert set(STOP_WORDS) == {"english", "german", "french", "spanish", "italian", "portuguese", "dutch"}
    assert all(terms(" ".join(stops), name) == [] for name, stops in STOP_WORDS.items())


def test_a_terms_index_never_changes():
    # What is in an index was put there by this number: another one would find nothing.
    assert (index("gate"), index("orrery_store"), index("überlauf")) == (799602346, 2691439433, 873916894)


def test_weights_are_those_of_bm25():
    model, made = fit(TEXTS)
    lengths = [len(terms(text)) for text in TEXTS]
    assert model.average == pytest.approx(sum(lengths) / 3)
    for number, text in enumerate(TEXTS):
        expected = {}
        for term, count in Counter(terms(text)).items():
            held = 1.2 * (1 - 0.75 + 0.75 * lengths[number] / model.average)
            expected[index(term)] = count * 2.2 / (count + held)
        found = row(made, number)
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[i], expected[i], rel_tol=1e-6) for i in found)


def test_rows_are_sorted_and_unique_as_qdrant_wants_them():
    draw = random.Random(1)
    vocabulary = [f"word{i}" for i in range(300)]
    _, (indptr, indices, values) = fit(" ".join(draw.choices(vocabulary, k=200)) for _ in range(20))
    assert (indptr.dtype, indices.dtype, values.dtype) == (np.int64, np.uint32, np.float32)
    assert indptr[0] == 0 and indptr[-1] == len(indices) == len(values)
    for start, end in itertools.pairwise(indptr):
        assert (np.diff(indices[start:end].astype(np.int64)) > 0).all()
    assert (values > 0).all()


def test_one_document_more_changes_only_the_average():
    model, _ = fit(TEXTS)
    again = SparseModel.of(model.told()).encode_documents(TEXTS[:1])
    assert row(again, 0) == row(fit(TEXTS)[1], 0)


def test_a_question_has_each_term_once():
    indices, values = encode_query("gate gate champion the")
    assert indices == sorted([index("gate"), index("champion")]) and values == [1.0, 1.0]
    assert encode_query("the of and") == ([], [])
    assert SparseModel("german").encode_query("Häuser") == ([index("haus")], [1.0])


def test_nothing_has_no_weights():
    model, (indptr, indices, values) = fit([])
    assert indptr.tolist() == [0] and len(indices) == len(values) == 0 and model.average == 1
    _, (indptr, *_) = fit(["", "the"])
    assert indptr.tolist() == [0, 0, 0]


def test_words_of_a_long_line_take_linear_time():
    text = "a." * 200_000 + "-" * 200_000
    assert len(words(text)) == 1
