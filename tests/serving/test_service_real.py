"""The service on real generations: collected, cut, embedded, indexed and promoted by the steps; only the embedder is a tiny one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_house import PROJECT, QUICK, SPEC, House, serving, wait_for
from test_serving_opening import evaluation

from orrery.errors import UserError
from orrery.rag.spec import KnowledgeBaseSpec
from orrery.serving.opening import NO_EFFECT, RagOpener
from orrery.store import Store

ROOT = Path(__file__).resolve().parents[2]
RAG = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs")) / "rag" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not RAG.exists(), reason="the environment rag, which makes the generations, is not there"
)
WIND = "When does the dome close in the wind?"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reindexed")
    argv = [str(RAG), str(Path(__file__).with_name("reindexed.py")), str(folder)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("ORRERY_")}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.fixture
def house(made: dict[str, Any], tmp_path: Path) -> Iterator[House]:
    shutil.copytree(made["store"].removeprefix("file://"), tmp_path / "store")
    (tmp_path / "store" / PROJECT / "live.json").unlink()
    opener = RagOpener(KnowledgeBaseSpec.model_validate(SPEC), None, 1)
    with serving(tmp_path, passages=None, opener=opener, settings=QUICK) as house:
        point(house, made, 0)
        house.wait_live()
        yield house


def test_a_relative_reranker_is_looked_for_in_the_project_folder(made: dict[str, Any], tmp_path: Path) -> None:
    spec = KnowledgeBaseSpec.model_validate({**SPEC, "retrieval": {"reranker": "models/c"}})
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'project' / 'models' / 'c' / 'model.onnx'} is not")):
        RagOpener(spec, None, 1, tmp_path / "project").asking(Store(made["store"]), None, tmp_path)


def point(house: House, made: dict[str, Any], number: int) -> str:
    house.store.put(f"{PROJECT}/live.json", json.dumps(made["live"][number]).encode())
    return str(made["live"][number]["generation"].split("/")[2])


def test_a_real_generation_answers_with_the_passage_and_switches(house: House, made: dict[str, Any]) -> None:
    first = house.ask(WIND)
    assert first["sources"][0]["title"] == "Dome"
    assert first["answer"] == "The dome closes by itself when the wind is above 60 km/h. [1]"
    assert {"embed", "retrieve"} <= set(stages(house))
    whole = house.get(f"/sources/{first['sources'][0]['id']}").json()
    assert "above 60 km/h" in whole["text"]
    house.wait_live(point(house, made, 1))
    second = house.ask(WIND)
    assert second["answer"] == "The dome closes by itself when the wind is above 55 km/h. [1]"
    assert second["generation"] != first["generation"]
    assert house.ask("Is a comet near?")["sources"][0]["title"] == "New"
    # The old one's files are gone.
    wait_for(lambda: len([p for p in (house.folder / "scratch").iterdir() if p.name.startswith("generation-")]) == 1)
    info = house.get("/info").json()
    assert info["counts"]["passages"] == 5
    assert info["embedder"].startswith("tiny-")


def stages(house: House) -> list[str]:
    text = house.client.get(f"{house.url}/metrics").text
    names = ("auth", "queue", "embed", "retrieve", "rerank", "extract", "generate", "total")
    return [n for n in names if f'orrery_serve_stage_seconds_count{{stage="{n}"}} 0.0' not in text]


def test_groups_are_enforced_inside_of_the_index(house: House) -> None:
    question = "Where is the key of the mirror cell?"
    mine = house.ask(question, ["team"])["sources"][0]
    assert mine["uri"].endswith("team/safe.md")
    assert not any("safe" in s["uri"] for s in house.ask(question, top_k=50)["sources"])
    assert house.ask(question, filters={"source": ["team"]})["sources"] == []
    assert house.get(f"/sources/{mine['id']}", ["team"]).status_code == 200
    for groups in ((), ["other"]):
        assert house.get(f"/sources/{mine['id']}", groups).status_code == 404
    assert house.get(f"/sources/{uuid.uuid4()}").status_code == 404
    assert house.get(f"/sources/{'x' * 36}").status_code == 404


def test_sources_that_the_spec_closes_are_closed_inside_of_the_index(house: House) -> None:
    question = "Where is the key of the mirror cell?"
    mine = house.ask(question, ["team"])["sources"][0]
    for sources in (
        {**SPEC["sources"], "team": {"uri": "team", "groups": ["few"]}},
        {"guides": SPEC["sources"]["guides"]},
        {"other": {"uri": "other"}},
    ):
        house.declare({**SPEC, "sources": sources})
        for filters in (None, {"source": ["team"]}, {"source": ["guides", "team"]}):
            told = house.ask(question, ["team"], filters=filters, top_k=50)
            assert not any("safe" in s["uri"] for s in told["sources"])
        assert house.get(f"/sources/{mine['id']}", ["team"]).status_code == 404
    assert told["sources"] == []  # no source of the generation is known any more
    house.declare(SPEC)
    assert house.get(f"/sources/{mine['id']}", ["team"]).status_code == 200


def test_another_evaluation_changes_how_the_same_generation_is_asked(house: House, made: dict[str, Any]) -> None:
    assert len(house.ask(WIND)["sources"]) > 1
    live = made["live"][0]
    evaluated = evaluation(house.store, {"retrieval": {"top_k": 1}}, b"null\n")
    house.store.put(f"{PROJECT}/live.json", json.dumps({**live, "version": 7, "evaluation": evaluated}).encode())
    wait_for(lambda: house.get("/info").json()["version"] == "7")
    assert len(house.ask(WIND)["sources"]) == 1
    assert house.get("/info").json()["top_k"] == 1


def test_what_is_not_as_declared_stands_in_health(house: House, made: dict[str, Any]) -> None:
    house.opener._spec = KnowledgeBaseSpec.model_validate({**SPEC, "answers": {"abstain": 0.2}})
    evaluated = evaluation(house.store, {}, b"null\n")
    told = {**made["live"][0], "version": 7, "evaluation": evaluated}
    house.store.put(f"{PROJECT}/live.json", json.dumps(told).encode())
    wait_for(lambda: house.get("/health/ready").json()["problems"] == [NO_EFFECT])
    assert house.get("/health/ready").status_code == 200


def test_filters_reach_the_index(house: House) -> None:
    uri = house.ask("cooling of the camera")["sources"][0]["uri"]
    found = house.ask(WIND, filters={"uri": [uri], "source": ["guides"]}, top_k=50)["sources"]
    assert {s["uri"] for s in found} == {uri}


@pytest.mark.parametrize("file", ["shard", "generation.json", "manifest.json", "points of another"])
def test_a_damaged_index_is_refused_and_the_old_one_answers(house: House, made: dict[str, Any], file: str) -> None:
    folder = Path(house.store.root) / made["live"][1]["generation"].rsplit("/", 1)[0]
    damaged = next(p for p in folder.rglob("*") if p.is_file() and p.name.startswith(file.split(" ", maxsplit=1)[0]))
    data = damaged.read_bytes()
    damaged.write_bytes(data[: len(data) // 2] if file != "points of another" else data)
    old = house.ask(WIND)["generation"]
    if file == "points of another":  # all files are whole, but not those that the pointer means
        house.point(made["live"][1]["generation"], made["live"][0]["digest"])
    else:
        point(house, made, 1)
    wait_for(lambda: house.service.live.refusal is not None)
    assert house.ask(WIND)["generation"] == old
    assert house.get("/health/ready").json()["status"] == "degraded"
    damaged.write_bytes(data)
    house.wait_live(point(house, made, 1))
