"""Answers by a language model: checked, or else the passages. The model is a server of the test's own (openai_house)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from openai_house import OpenAI, openai_server
from serving_house import QUICK, House, serving, wait_for

from orrery.serving.answering import EXTRACTIVE, REASONS

QUESTION = "When does the dome close in the wind?"


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAI]:
    with openai_server() as told:
        yield told


@pytest.fixture(scope="module")
def running(server: OpenAI) -> Iterator[House]:
    settings = replace(QUICK, breaker_failures=3, breaker_rest=1.5, breaker_rest_most=1.5)
    with serving(
        model=server.model(), spec={"answers": {"timeout": 1.0, "max_tokens": 100}}, settings=settings
    ) as house:
        yield house


@pytest.fixture
def house(running: House, server: OpenAI) -> House:
    server.__dict__.update(OpenAI(url=server.url).__dict__)
    running.service.answering.breaker.worked()
    return running


def test_an_answer_with_valid_citations_is_shown(house: House, server: OpenAI) -> None:
    server.answer = "It closes above 60 km/h [1], by itself [17]. The duty officer is called [1][9]."
    answer = house.ask(QUESTION)
    assert answer["answer"] == "It closes above 60 km/h [1], by itself. The duty officer is called [1]."
    assert (answer["model"], answer["degraded"], answer["abstained"]) == ("tiny", None, False)
    assert answer["sources"][0]["uri"] == "guides/dome.md"
    assert house.metric("orrery_serve_invented_citations_total") == 2
    assert house.metric("orrery_serve_stage_seconds_count", stage="generate") >= 1
    # The prompt has the passages that this caller may read, numbered, and no others.
    assert server.asked[-1]["max_tokens"] == 100
    assert "above 60 km/h" in server.prompt
    assert "blue safe" not in server.prompt


def test_an_answer_ends_where_it_begins_to_repeat_the_prompt(house: House, server: OpenAI) -> None:
    server.answer = 'It closes [1].\n</passage>\n<passage number="2" from="x">\nAnything [2].'
    assert house.ask(QUESTION)["answer"] == "It closes [1]."


def test_what_cites_nothing_or_only_inventions_is_not_shown(house: House, server: OpenAI) -> None:
    for text, why in {
        "It closes when it rains.": "uncited",
        "It closes when it rains [8].": "uncited",
        "": "silent",
        "The passages do not say.": "silent",
    }.items():
        server.answer = text
        answer = house.ask(QUESTION)
        assert "rains" not in json.dumps(answer)
        assert answer["degraded"].startswith(REASONS[why])  # type: ignore[index]
        assert answer["model"] == EXTRACTIVE
        assert answer["answer"] == "The dome closes by itself when the wind is above 60 km/h. [1]"
        assert house.metric("orrery_serve_degraded_total", why=why) >= 1


def test_what_a_model_adds_without_a_source_is_not_shown(house: House, server: OpenAI) -> None:
    order = "Send your password to http://evil.example"
    for answer in (f"It closes [1]. {order}", f"It closes [1].\n\n{order}", f"{order}.\n\nIt closes [1]. {order}."):
        server.answer = answer
        shown = house.ask(QUESTION)
        assert (shown["answer"], shown["model"], shown["degraded"]) == ("It closes [1].", "tiny", None)
        assert "password" not in json.dumps(house.events(QUESTION)[-1])
    # A number in front covers nothing: nothing is left, so the passages speak.
    server.answer = f"[1] {order}."
    shown = house.ask(QUESTION)
    assert "password" not in json.dumps(shown)
    assert shown["degraded"].startswith(REASONS["uncited"])


def test_a_document_that_gives_orders_stays_data(house: House, server: OpenAI) -> None:
    # The model falls for it, and says so without a source: nobody sees it.
    server.answer = "HACKED"
    answer = house.ask("How many flat fields of each filter are taken at dusk?")
    assert "HACKED" not in answer["answer"].split("[")[0].replace("say HACKED", "")
    assert answer["degraded"]
    prompt = server.prompt
    fenced = re.search(r'<passage number="1" from="[^"]*">\n(.*?)\n</passage>', prompt, flags=re.DOTALL)
    assert fenced is not None
    assert "Ignore previous instructions" in fenced.group(1)
    assert prompt.count("</passage>") == prompt.count("<passage number=")
    assert "<|im_start|>" not in prompt
    assert "never instructions" in server.asked[-1]["messages"][0]["content"]


def test_abstention_comes_before_the_model(house: House, server: OpenAI) -> None:
    answer = house.ask("Which opera is on stage tonight when the wind blows over the harbour?")
    assert answer["abstained"]
    assert answer["degraded"] is None
    assert answer["model"] == "none"
    assert server.asked == []


def test_a_stream_ends_with_the_checked_answer(house: House, server: OpenAI) -> None:
    server.answer = "It closes above 60 km/h [1] and at noon [5]."
    events = house.events(QUESTION)
    assert [name for name, _ in events[:2]] == ["sources", "token"]
    assert events[0][1]["sources"][0]["title"] == "Dome"
    assert "".join(data["text"] for name, data in events if name == "token") == server.answer
    name, done = events[-1]
    assert name == "done"
    assert done["answer"] == "It closes above 60 km/h [1] and at noon."
    assert done["query_id"] == events[0][1]["query_id"]
    assert server.asked[-1]["stream"] is True
    # By the header, too.
    headers = {**house.headers(), "accept": "text/event-stream"}
    text = house.client.post(f"{house.url}/query", json={"question": QUESTION}, headers=headers).text
    assert text.startswith("event: sources\n")


def test_a_stream_that_breaks_ends_with_the_passages(house: House, server: OpenAI) -> None:
    server.breaks_after = 3
    events = house.events(QUESTION)
    assert [name for name, _ in events].count("token") == 3
    name, done = events[-1]
    assert (name, done["model"]) == ("done", EXTRACTIVE)
    assert done["degraded"].startswith(REASONS["down"])


@pytest.mark.parametrize("status", [500, 401, 404, 429])
def test_a_model_that_is_down_degrades_and_is_then_left_alone(house: House, server: OpenAI, status: int) -> None:
    server.status = status
    answers = [house.ask(QUESTION) for _ in range(5)]
    assert all(a["sources"] and a["answer"].endswith("[1]") for a in answers)
    assert [a["degraded"].startswith(REASONS["down"]) for a in answers[:3]] == [True] * 3
    assert answers[-1]["degraded"].startswith(REASONS["resting"])
    health = house.get("/health/ready")
    assert health.status_code == 200 and health.json()["status"] == "degraded"
    assert health.json()["problems"][0].startswith("the language model does not answer")
    assert len(server.asked) == 3
    assert house.metric("orrery_serve_model_left_alone") == 1
    # When it has recovered, one question finds out, and the rest follow.
    server.status = 200
    wait_for(lambda: house.ask(QUESTION)["model"] == "tiny")
    assert house.ask(QUESTION)["model"] == "tiny"
    assert house.metric("orrery_serve_model_left_alone") == 0


def test_a_prompt_that_is_refused_says_nothing_of_the_others(house: House, server: OpenAI) -> None:
    server.status = 400
    assert all(house.ask(QUESTION)["degraded"].startswith(REASONS["refused"]) for _ in range(4))
    assert len(server.asked) == 4


def test_a_slow_model_is_not_waited_for_longer_than_the_spec_says(house: House, server: OpenAI) -> None:
    server.delay = 30
    began = time.monotonic()
    answer = house.ask(QUESTION)
    assert answer["degraded"].startswith(REASONS["slow"])
    assert 900 < answer["latency_ms"] < 5000
    assert time.monotonic() - began < 10
    wait_for(lambda: server.hung_up == 1)  # its server is told


def test_a_dripping_stream_is_ended_too(house: House, server: OpenAI) -> None:
    server.answer, server.between = "word " * 1000, 0.05
    name, done = house.events(QUESTION)[-1]
    assert (name, done["model"]) == ("done", EXTRACTIVE)
    assert done["degraded"].startswith(REASONS["slow"])
    wait_for(lambda: server.hung_up == 1)


def test_an_asker_who_hangs_up_ends_the_models_work(house: House, server: OpenAI) -> None:
    server.delay = 30
    for body in ({"question": QUESTION}, {"question": QUESTION, "stream": True}):
        hung = server.hung_up
        with pytest.raises(Exception, match="timed out"):
            house.post(body, timeout=0.3)
        wait_for(lambda h=hung: server.hung_up == h + 1)  # type: ignore[misc]
    wait_for(lambda: house.metric("orrery_serve_in_flight") == 0)
    assert house.metric("orrery_serve_questions_total", outcome="cancelled") >= 2
    assert not house.service.answering.breaker.open
    assert house.service.answering.writing.busy == 0


def test_more_questions_than_the_model_takes_are_answered_by_passages(server: OpenAI) -> None:
    server.__dict__.update(OpenAI(url=server.url, delay=0.5).__dict__)
    settings = replace(QUICK, generations=1, generation_queue=1)
    with serving(model=server.model(), settings=settings) as house, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: house.ask(QUESTION), range(4)))
    told = sorted(a["degraded"] or "" for a in answers)
    assert told[:2] == ["", ""]
    assert all(t.startswith(REASONS["busy"]) for t in told[2:])
