"""Zero documents leak across access groups: whatever is asked, by whomever, in every mode, on both engines.

Every set of groups has passages, and each text is there once for every set: what may be read lies in the same place as
what may not. (The server's code runs on qdrant-client's local mode.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rag_points import DIMENSIONS, URL, Lasting, chunk, generation_of, points

from orrery.errors import OrreryError
from orrery.rag.engines import Condition, Search
from orrery.rag.engines.edge import EdgeEngine
from orrery.rag.engines.server import ServerEngine
from orrery.rag.generations import Generation
from orrery.rag.records import Chunk
from orrery.rag.retrieval import Found, Mode, allowed, read, retrieve
from orrery.rag.spec import reader

GROUPS = ("everyone", "team", "board", "legal")
SETS = [frozenset(some) for size in range(1, 5) for some in combinations(GROUPS, size)]
TEXTS = (
    "the budget of the team is spent in spring",
    "salaries of the board are secret",
    "a contract is signed by legal",
    "the store commits a manifest once",
)


def corpus() -> list[Chunk]:
    return [
        chunk(f"{text} {'-'.join(sorted(groups))}", f"{GROUPS[n % 2]}/{n}-{t}.md", groups=groups)
        for n, groups in enumerate(SETS)
        for t, text in enumerate(TEXTS)
    ]


CORPUS = {c.id: c for c in corpus()}


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Generation]]:
    made, client = list(CORPUS.values()), Lasting(":memory:")
    folder: Path = tmp_path_factory.mktemp("edge") / "shard"
    edge, served = (
        EdgeEngine.create(folder, DIMENSIONS, len(made)),
        ServerEngine.create(client, "notes-0", DIMENSIONS, URL),
    )
    for engine in (edge, served):
        engine.upsert(points(made))
    edge.seal()
    yield {"embedded": generation_of(edge, made), "server": generation_of(served, made)}
    edge.close()
    client.end()


class Longest:
    """A reranker that likes nothing better than what was found last."""

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        return [i / len(texts) for i in range(len(texts))]


words = st.sampled_from(sorted({w for text in TEXTS for w in text.split()} | set(GROUPS)))
questions = st.lists(words, min_size=1, max_size=6).map(" ".join)
asked = st.fixed_dictionaries(
    {
        "question": questions | st.text(max_size=20),
        "groups": st.frozensets(st.sampled_from([*GROUPS, "nobody", "*", "", "everyone' OR 1=1"]), max_size=4),
        "top_k": st.integers(1, 80),
        "candidates": st.integers(1, 80),
        "mode": st.sampled_from(["hybrid", "dense", "sparse"]),
        "mmr": st.none() | st.floats(0, 1),
        "reranker": st.none() | st.just(Longest()),
        "filters": st.none()
        | st.dictionaries(
            st.sampled_from(["source", "document", "uri"]),
            st.lists(st.sampled_from(sorted({c.source for c in CORPUS.values()} | set(list(CORPUS)[:3]))), max_size=3),
            max_size=2,
        ),
    }
)


def leaked(found: Sequence[Found], groups: frozenset[str]) -> list[Found]:
    """Return what should not have been found: by the corpus, not by what the engine says of it."""
    return [f for f in found if not groups & set(CORPUS[f.id].groups)]


@pytest.mark.parametrize("backend", ["embedded", "server"])
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(told=asked)
def test_nothing_leaks(generations: dict[str, Generation], backend: str, told: dict) -> None:
    found = retrieve(generations[backend], **told)
    assert leaked(found, told["groups"]) == []
    for key, values in (told["filters"] or {}).items():
        assert all(getattr(CORPUS[f.id], key) in values for f in found)
    assert len({f.id for f in found}) == len(found) <= told["top_k"]


@pytest.mark.parametrize("backend", ["embedded", "server"])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.frozensets(st.sampled_from(GROUPS), max_size=4),
    question=questions,
    mode=st.sampled_from(["hybrid", "dense"]),
)
def test_all_that_may_be_read_is_found(
    generations: dict[str, Generation], backend: str, groups: frozenset[str], question: str, mode: Mode
) -> None:
    found = retrieve(generations[backend], question, groups=groups, top_k=100, candidates=100, mode=mode)
    assert {f.id for f in found} == {c.id for c in CORPUS.values() if groups & set(c.groups)}


@pytest.mark.parametrize("backend", ["embedded", "server"])
def test_one_passage_by_its_id(generations: dict[str, Generation], backend: str) -> None:
    for one in CORPUS.values():
        for groups in (frozenset(), frozenset({"everyone"}), frozenset({"board", "legal"})):
            found = read(generations[backend], one.id, groups=groups)
            assert (found is not None) == bool(groups & set(one.groups))
            assert found is None or found.text == one.text
    assert read(generations[backend], "00000000-0000-0000-0000-000000000000", groups=frozenset(GROUPS)) is None


def test_everyone_is_a_group_like_others() -> None:
    assert allowed(frozenset()) == Condition("groups", ())
    assert allowed(frozenset({"team"})) == Condition("groups", ("team",))
    assert reader([]) == {"everyone"}
    assert reader(["team"]) == {"everyone", "team"}


def test_an_engine_cannot_be_searched_without_groups() -> None:
    vector = points([next(iter(CORPUS.values()))])[0].dense
    with pytest.raises(OrreryError, match="without the groups"):
        Search((), vector, ([], []))  # type: ignore[arg-type]
