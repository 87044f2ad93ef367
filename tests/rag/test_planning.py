"""How a knowledge base's steps are planned: what is done again and what is not, which inputs, which version."""

from __future__ import annotations

from pathlib import Path

import pytest
import rag_house
import tiny_embedder
from rag_house import DAY, House

from orrery import runner
from orrery.errors import RequestError, SpecError
from orrery.planners import planner_of
from orrery.rag.planning import KnowledgePlanner

PAGES = {"guides/a.md": "# Apples\n\nApples are red.\n", "guides/b.md": "# Pears\n\nPears are green.\n"}
LATER = "2026-01-06"


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    embedder = {"model": str(tiny_embedder.write(tmp_path / "tiny"))}
    only = {"guides": {"uri": "documents/guides"}}
    return rag_house.make(tmp_path, monkeypatch, PAGES, embedder=embedder, sources=only)


def built(house: House, key: str = DAY, run: str = "run-1") -> dict[str, str | None]:
    """Carry the chain up to the index; return why each step was skipped."""
    return {verb: result.skipped for verb, result in house.reindex(key, run=run, until="index").items()}


def test_the_planner_is_that_of_the_projects_kind(house: House) -> None:
    assert type(planner_of(rag_house.PROJECT)) is KnowledgePlanner
    plan = house.plan("collect")
    assert (plan.config.kind, plan.config.key, plan.config.address) == ("knowledge_base", DAY, None)
    assert plan.config.params["sources"]["guides"]["uri"] == "documents/guides"


def test_documents_in_the_project_folder_travel_with_it(house: House) -> None:
    before = house.plan("collect").config.bundle
    house.document("guides/a.md", "# Apples\n\nApples are sweet.\n")
    assert house.plan("collect").config.bundle != before


def test_nothing_is_done_twice_and_a_new_day_takes_over_what_is_unchanged(house: House) -> None:
    assert not any(built(house).values())
    again = built(house, run="run-2")
    assert all(again[verb] for verb in ("chunk", "embed", "index"))
    tomorrow = built(house, LATER, "run-3")
    assert all(tomorrow[verb] for verb in ("chunk", "embed", "index")), "a day chooses nothing"
    assert house.manifest("generation", LATER).path == house.manifest("generation").path
    assert house.read("vectors", "vectors.npy", LATER) == house.read("vectors", "vectors.npy")
    assert house.run("embed", LATER, run="run-4", force=True).metrics["embedded"] == 0


@pytest.mark.parametrize(
    ("field", "value", "again"),
    [
        ("chunk", {"tokens": 64, "overlap": 8}, {"chunk"}),
        ("retrieval", {"top_k": 3}, set()),
        ("alerts", {"stale": "48h"}, set()),
        ("description", "about fruit", set()),
    ],
)
def test_a_change_of_the_spec_repeats_the_steps_that_read_it(
    house: House, field: str, value: object, again: set[str]
) -> None:
    built(house)
    house.spec(**{field: value})
    done = {verb for verb in ("chunk", "embed", "index") if house.plan(verb).done is None}
    assert done == again


def test_a_step_whose_input_has_come_anew_says_which_to_run_first(house: House) -> None:
    built(house)
    house.document("guides/a.md", "# Apples\n\nApples are sweet.\n")
    house.run("collect", run="run-2")
    with pytest.raises(RequestError, match=r"chunks of .* was made from documents data that landed again"):
        house.plan("embed")


def test_documents_are_compared_with_those_before(house: House) -> None:
    assert house.plan("collect").config.params["before"] is None
    house.run("collect")
    assert house.plan("collect", LATER).config.params["before"] == house.manifest("documents").path
    assert house.plan("collect", "2026-01-01").config.params["before"] == house.manifest("documents").path
    house.document("guides/c.md", "# Plums\n\nPlums are blue.\n")
    house.run("collect", LATER, run="run-2")
    # A day chooses nothing: an earlier one must not bring back what was before.
    assert house.plan("collect").config.params["before"] == house.manifest("documents", LATER).path


def test_a_version_is_the_number_after_those_that_were_live_and_stays_a_generations(house: House) -> None:
    planner = house.planner()
    first, second = f"{rag_house.PROJECT}/index/{'a' * 32}/manifest.json", f"{rag_house.PROJECT}/index/{'b' * 32}/m"
    assert planner.version_of(first) == "1"
    planner.ledger.record(rag_house.PROJECT, "promotion", "x", "done", "t", {"version": "1", "model": first})
    assert (planner.version_of(first), planner.version_of(second)) == ("1", "2")


def test_what_it_has_on_a_server_is_looked_at_each_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    built(house)
    monkeypatch.setenv("ORRERY_QDRANT", "http://127.0.0.1:6333")
    monkeypatch.setenv("ORRERY_QDRANT_KEY", "hidden-key")
    plan = house.plan("index")
    assert plan.done is None and plan.config.address is None
    assert plan.environment["ORRERY_QDRANT_KEY"] == "hidden-key"
    assert "hidden-key" not in plan.config.model_dump_json()


def test_refusals(house: House) -> None:
    with pytest.raises(RequestError, match="unknown step 'train'"):
        house.plan("train")
    with pytest.raises(RequestError, match="has no documents for 2026-01-05"):
        house.plan("chunk")
    with pytest.raises(RequestError, match="is not a day"):
        house.plan("collect", "2026-01")
    with pytest.raises(RequestError, match="no live generation yet"):
        house.plan("evaluate", live=True)
    house.spec(judge="nobody")
    built(house)
    with pytest.raises(SpecError, match="'nobody' is not among `llms`"):
        house.plan("evaluate")
    house.spec(questions="nowhere.jsonl", judge=None)
    with pytest.raises(SpecError, match=r"nowhere\.jsonl"):
        house.plan("evaluate")


def test_a_failed_step_tells_how_to_repeat_it(house: House) -> None:
    house.document("guides/a.md", None)
    house.document("guides/b.md", None)
    with pytest.raises(runner.UserError, match="orrery reproduce notes"):
        house.run("collect")


def asked(name: str, number: int) -> dict[str, object]:
    return {
        "id": f"q{number}",
        "question": f"What colour are {name}?",
        "answerable": True,
        "passages": [{"uri": f"{name[0]}.md", "quote": f"{name.capitalize()} are"}],
    }


def test_a_generation_that_is_proven_later_is_told_to_services(house: House) -> None:
    """Nothing has changed but that there are questions now."""
    house.document("guides/a.md", "# Apples\n\nApples are red.\n")
    house.reindex()
    first = house.store.read_json(f"{rag_house.PROJECT}/live.json")
    assert first["proven"] is False
    house.questions(asked("apples", 1))
    again = house.reindex(run="run-2")
    now = house.store.read_json(f"{rag_house.PROJECT}/live.json")
    assert again["promote"].skipped is None and now["proven"] is True
    assert now["generation"] == first["generation"] and now["evaluation"] != first["evaluation"]
    assert house.planner().ledger.champions(rag_house.PROJECT) == ["1"], "it is no other champion"
    assert house.reindex(run="run-3")["promote"].skipped


def test_a_pointer_that_lags_behind_the_ledger_is_put_right(house: House) -> None:
    house.reindex()
    before = house.store.read(f"{rag_house.PROJECT}/live.json")
    house.document("guides/a.md", "# Apples\n\nApples are sweet.\n")
    house.reindex(run="run-2")
    house.store.put(f"{rag_house.PROJECT}/live.json", before)  # as a rollback that was torn off leaves it
    house.reindex(run="run-3")
    assert house.store.read_json(f"{rag_house.PROJECT}/live.json")["version"] == "2"
    house.store.remove(f"{rag_house.PROJECT}/live.json")
    house.reindex(run="run-4")
    assert house.store.read_json(f"{rag_house.PROJECT}/live.json")["version"] == "2"


def test_a_look_at_what_is_live_is_no_evaluation_of_a_candidate(house: House) -> None:
    house.reindex()
    house.document("guides/a.md", "# Apples\n\nApples are sweet.\n")
    house.reindex(run="run-2", until="evaluate")
    house.run("evaluate", run="run-3", live=True)
    house.run("gate", run="run-2")
    assert house.run("promote", run="run-2").facts["model_version"] == "2"
