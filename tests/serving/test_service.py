"""The service over real sockets: what it takes, gives and refuses; who may read what; what it logs; hostile input."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_house import PASSAGES, PROJECT, QUICK, SPEC, House, Passage, events_of, serving, wait_for

from orrery.errors import TryAgain
from orrery.serving.answering import unrelated
from orrery.serving.contract import Answer, Info
from orrery.serving.tokens import add

QUESTION = "When does the dome close in the wind?"
SECRET = PASSAGES[3]


@pytest.fixture(scope="module")
def running() -> Iterator[House]:
    with serving(settings=replace(QUICK, body_timeout=1.0, feedback_per_minute=1000)) as house:
        yield house


@pytest.fixture
def house(running: House) -> House:
    running.opener.asked.clear()
    return running


def test_an_answer_has_sources_highlights_and_its_generation(house: House) -> None:
    answer = house.ask(QUESTION)
    Answer.model_validate(answer)
    assert answer["answer"] == "The dome closes by itself when the wind is above 60 km/h. [1]"
    source = answer["sources"][0]
    assert (source["title"], source["uri"], source["heading"]) == ("Dome", "guides/dome.md", "Operations › Wind")
    (start, end), *_ = source["highlights"]
    assert source["excerpt"][start:end] == "The dome closes by itself when the wind is above 60 km/h."
    assert answer["generation"] == house.service.live.current.name  # type: ignore[union-attr]
    assert (answer["abstained"], answer["degraded"], answer["model"]) == (False, None, "none (extractive)")
    assert house.ask("At what temperature is the camera cooled?")["sources"][0]["page"] == 3


def test_top_k_and_filters_reach_the_search(house: House) -> None:
    house.ask(QUESTION, top_k=1, filters={"uri": ["guides/camera.md", "x"], "source": ["guides"]})
    question, groups, top_k, filters = house.opener.asked[-1]
    assert (question, groups, top_k) == (QUESTION, {"everyone"}, 6)  # abstention judges as many as usual
    assert len(house.ask("the camera and the dome", top_k=1)["sources"]) == 1
    house.ask(QUESTION, top_k=50, filters={"uri": ["guides/camera.md", "x"], "source": ["guides"]})
    assert house.opener.asked[-1][2] == 50
    assert filters == {"uri": ["guides/camera.md", "x"], "source": ["guides"]}
    house.ask(QUESTION)
    assert house.opener.asked[-1][2:] == (6, None)


def test_it_abstains_by_the_calibration_and_shows_the_nearest(house: House) -> None:
    answer = house.ask("Which opera plays when the choir, the ballet and the orchestra share a dome?")
    assert answer["abstained"]
    assert answer["sources"]
    assert "[1]" not in answer["answer"]
    assert house.ask("zzz")["sources"] == []


def test_without_a_calibration_what_shares_no_word_with_any_passage_is_not_answered() -> None:
    far, near = (replace(Passage("The dome is closed at dusk.", title="Dome"), cosine=c) for c in (0.1, 0.5))
    words: Callable[[str], list[str]] = lambda text: text.lower().replace(".", "").split()  # noqa: E731
    assert unrelated(frozenset({"mongolia", "capital"}), [far], words)
    assert unrelated(frozenset({"mongolia"}), [], words)
    assert not unrelated(frozenset({"mongolia", "dusk"}), [far], words)  # a word
    assert not unrelated(frozenset({"mongolia", "dome"}), [far], words)  # in the title
    assert not unrelated(frozenset({"sunset"}), [far, near], words)  # no word, but near in meaning


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({}, "question"),
        ({"question": ""}, "question"),
        ({"question": "  \n"}, "question"),
        ({"question": "x" * 2001}, "question"),
        ({"question": 7}, "question"),
        ({"question": None}, "question"),
        ({"question": "x", "top_k": 0}, "top_k"),
        ({"question": "x", "top_k": 51}, "top_k"),
        ({"question": "x", "top_k": "3"}, "top_k"),
        ({"question": "x", "top_k": True}, "top_k"),
        ({"question": "x", "groups": ["team"]}, "groups"),
        ({"question": "x", "filters": {"groups": ["team"]}}, "filters"),
        ({"question": "x", "filters": {"uri": []}}, "filters.uri"),
        ({"question": "x", "filters": {"uri": "x"}}, "filters.uri"),
        ({"question": "x", "filters": {"uri": ["x"] * 21}}, "filters.uri"),
        ({"question": "x", "filters": {"uri": ["x" * 501]}}, "filters.uri.0"),
        ({"question": "x", "filters": {"uri": [{"any": 1}]}}, "filters.uri.0"),
        ([], ""),
        ("x", ""),
    ],
)
def test_what_is_not_in_the_contract_is_refused_by_field(house: House, body: Any, problem: str) -> None:
    done = house.post(body)
    assert done.status_code == 422
    assert problem in [p["field"] for p in done.json()["detail"]]
    assert house.opener.asked == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 16_000,
        b'{"question": "x", "filters": ' + b'{"uri": ' * 1500 + b"1" + b"}" * 1501,
        b'{"question": "x", "question": "\\ud800"}',
        b'{"question": "x", "top_k": ' + b"9" * 5000 + b"}",
        b'{"question": "x", "top_k": NaN}',
    ],
)
def test_malformed_and_deep_json_is_told_so(house: House, raw: bytes) -> None:
    headers = {**house.headers(), "content-type": "application/json"}
    done = house.client.post(f"{house.url}/query", content=raw, headers=headers)
    assert done.status_code == 422, done.text
    assert len(done.content) < 2000
    assert house.opener.asked == []


def test_a_question_of_a_megabyte_is_refused_before_it_is_parsed(house: House) -> None:
    for size in (17_000, 1_000_000):
        assert house.post({"question": "x" * size}).status_code == 413
    headers = {**house.headers(), "content-type": "application/json"}
    chunks = (b"x" * 10_000 for _ in range(100))  # without a content-length
    assert house.client.post(f"{house.url}/query", content=chunks, headers=headers).status_code == 413
    assert house.ask(QUESTION)["sources"]


def test_a_body_without_end_ends_soon(house: House) -> None:
    with connected(house) as sock:
        head = f"POST /query HTTP/1.1\r\nhost: x\r\nauthorization: {house.headers()['authorization']}\r\n"
        sock.sendall(f"{head}content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        sent = 0
        with pytest.raises(OSError, match=r"."):
            while True:
                sent += sock.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                assert sent < 64 << 20
    # One that drips is told after `body_timeout`.
    with connected(house) as sock:
        sock.sendall(f"{head}content-type: application/json\r\ncontent-length: 100\r\n\r\n{{".encode())
        assert b" 408 " in sock.recv(4096).splitlines()[0]


def connected(house: House) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(house.url.rsplit(":", 1)[1])), timeout=10)


def test_floods_of_headers_are_cut_off(house: House) -> None:
    for flood in (b"x: " + b"y" * 100_000, b"\r\n".join(b"x%d: y" % n for n in range(100_000)), b"y" * 100_000):
        with connected(house) as sock:
            answer = b""
            try:
                sock.sendall(b"POST /query HTTP/1.1\r\nhost: x\r\n" + flood)
                answer = sock.recv(4096)
            except OSError:
                pass  # cut off while it still sent
            assert answer[:13] in (b"", b"HTTP/1.1 400 ")
    assert house.ask(QUESTION)["sources"]


def test_other_kinds_than_json_are_refused(house: House) -> None:
    # text/plain and forms are what a page of another site may send without being asked.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {**house.headers(), "content-type": kind}
        done = house.client.post(f"{house.url}/query", content=json.dumps({"question": "x"}), headers=headers)
        assert done.status_code == 415
    answer = house.client.options(
        f"{house.url}/query", headers={"origin": "http://evil", "access-control-request-method": "POST"}
    )
    assert "access-control-allow-origin" not in answer.headers


def test_who_has_no_valid_token_hears_nothing_more(house: House) -> None:
    good = house.token()
    old = add(house.tokens_file, "expired", [], date(2020, 1, 1))
    house.service.tokens._looked = 0.0  # type: ignore[union-attr]
    tries = [None, "", "Bearer", f"Basic {good}", f"Bearer {good}x", f"Bearer {good[:-1]}", good, f"Bearer {old}"]
    said = set()
    for path, method in (("/query", "POST"), ("/info", "GET"), ("/feedback", "POST"), (f"/sources/{SECRET.id}", "GET")):
        for tried in tries:
            headers = {} if tried is None else {"authorization": tried}
            done = house.client.request(method, house.url + path, headers=headers, content=b"{")
            assert done.status_code == 401
            assert done.headers["www-authenticate"].startswith("Bearer")
            said.add(done.json()["detail"])
    assert len(said) == 1
    assert house.opener.asked == []
    assert house.metric("orrery_serve_refused_total", status="401") >= len(tries)


def test_groups_come_from_the_token_alone(house: House) -> None:
    question = "Where is the key of the mirror cell?"
    assert [s["id"] for s in house.ask(question, ["team"])["sources"]][:1] == [SECRET.id]
    for groups, more in (((), {}), (["other"], {}), ((), {"filters": {"source": ["team"]}})):
        assert "safe" not in json.dumps(house.ask(question, groups, **more)).lower()
    assert house.get(f"/sources/{SECRET.id}", ["team"]).json()["text"] == SECRET.text
    hidden, unknown = house.get(f"/sources/{SECRET.id}"), house.get(f"/sources/{PASSAGES[0].id[:-1]}0")
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.json()["detail"] == unknown.json()["detail"]


GROUPS = ("everyone", "a", "b", "c")
CROWD = [
    Passage(f"The engine number {n} hums for {' and '.join(groups)}.", uri=f"guides/{n}.md", groups=groups)
    for n, groups in enumerate([("a",), ("b",), ("a", "b"), ("c",), ("everyone",), ("everyone", "c")])
]


@pytest.fixture(scope="module")
def crowd() -> Iterator[House]:
    with serving(passages=CROWD, abstain_below=None) as house:
        yield house


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.sets(st.sampled_from(GROUPS)),
    question=st.sampled_from(["Which engine hums?", "engine number 0", "a and b", "everyone"]),
    sources=st.none() | st.just({"source": ["guides"]}),
    stream=st.booleans(),
)
def test_no_passage_leaks_across_groups(
    crowd: House, groups: set[str], question: str, sources: dict[str, list[str]] | None, stream: bool
) -> None:
    mine = {p.id for p in CROWD if set(p.groups) & (groups | {"everyone"})}
    if stream:
        shown = {s["id"] for _, data in crowd.events(question, sorted(groups)) for s in data.get("sources", [])}
    else:
        shown = {s["id"] for s in crowd.ask(question, sorted(groups), filters=sources, top_k=50)["sources"]}
    assert shown <= mine
    for passage in CROWD:
        status = crowd.get(f"/sources/{passage.id}", sorted(groups)).status_code
        assert status == (200 if passage.id in mine else 404)


SOURCES = ("guides", "team", "late")
SHELVES = [
    Passage(f"The engine {n} of {source} hums.", uri=f"{source}/{n}.md", source=source, groups=groups)
    for source in (*SOURCES, "unknown")
    for n, groups in enumerate([("a",), ("b",), ("everyone",), ("a", "b", "everyone")])
]


@pytest.fixture(scope="module")
def shelves() -> Iterator[House]:
    with serving(passages=SHELVES, abstain_below=None) as house:
        yield house


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    declared=st.dictionaries(
        st.sampled_from(SOURCES), st.sets(st.sampled_from(GROUPS[:3]), min_size=1), min_size=1, max_size=3
    ),
    groups=st.sets(st.sampled_from(GROUPS[:3])),
    chosen=st.none() | st.sampled_from([*SOURCES, "unknown"]),
)
def test_what_the_spec_closes_is_closed_without_a_reindex(
    shelves: House, declared: dict[str, set[str]], groups: set[str], chosen: str | None
) -> None:
    told = {name: {"uri": name, "groups": sorted(readers)} for name, readers in declared.items()}
    shelves.declare({**SPEC, "sources": told})
    who = groups | {"everyone"}
    mine = {p.id for p in SHELVES if set(p.groups) & who and declared.get(p.source, set()) & who}
    wanted = {p.id for p in SHELVES if p.id in mine and chosen in (None, p.source)}
    filters = {"source": [chosen]} if chosen else None
    shown = {s["id"] for s in shelves.ask("engine hums", sorted(groups), top_k=50, filters=filters)["sources"]}
    assert shown == wanted
    for passage in SHELVES:
        status = shelves.get(f"/sources/{passage.id}", sorted(groups)).status_code
        assert status == (200 if passage.id in mine else 404)


def test_a_broken_spec_leaves_the_one_before_in_force_and_is_told() -> None:
    question = "Where is the key of the mirror cell?"
    with serving(abstain_below=None) as house:
        assert SECRET.id in {s["id"] for s in house.ask(question, ["team"])["sources"]}
        house.declare({**SPEC, "sources": {**SPEC["sources"], "team": {"uri": "team", "groups": ["few"]}}})
        assert SECRET.id not in {s["id"] for s in house.ask(question, ["team"])["sources"]}
        for broken in ("version: [", yaml.safe_dump({**SPEC, "sources": {}}), yaml.safe_dump({"kind": "model"})):
            house.declare(broken)
            told = house.get("/health/ready")
            assert (told.status_code, told.json()["status"]) == (200, "degraded")
            assert any("spec.yaml" in p for p in told.json()["problems"])
            assert house.get(f"/sources/{SECRET.id}", ["team"]).status_code == 404
        house.declare(SPEC)
        assert house.get(f"/sources/{SECRET.id}", ["team"]).status_code == 200
        assert house.get("/health/ready").json()["problems"] == []


def test_documents_come_out_cleaned(house: House) -> None:
    answer = house.ask("flat fields at dusk of each filter")
    source = answer["sources"][0]
    assert source["title"] == 'Flat "fields" <b>'  # text: whoever shows it escapes it
    whole = house.get(f"/sources/{source['id']}").json()
    for text in (source["excerpt"], whole["text"], answer["answer"]):
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_every_response_has_the_security_headers(house: House) -> None:
    for path in ("/info", "/health/live", "/nothing", "/openapi.json", "/metrics", "/sources/x"):
        for groups in ((), None):
            headers = house.get(path, groups).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["cache-control"] == "no-store"
            assert len(headers["x-request-id"]) == 32
            assert "server" not in headers


def test_openapi_describes_the_bodies_and_no_page_loads_scripts_from_elsewhere(house: House) -> None:
    told = house.get("/openapi.json", None).json()
    query = told["paths"]["/query"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(query["properties"]) == {"question", "top_k", "filters", "stream"}
    assert query["additionalProperties"] is False
    assert {"/query", "/feedback", "/info", "/sources/{id}", "/health/live", "/health/ready"} <= set(told["paths"])
    assert house.get("/docs").status_code == house.get("/redoc").status_code == 404


def test_info_says_what_is_answered_from(house: House) -> None:
    info = Info.model_validate(house.get("/info", ["team"]).json())
    assert (info.project, info.owner, info.version) == (PROJECT, "docs", "1")
    assert info.counts == {"passages": 4, "sources": 2}
    assert info.groups == ["everyone", "team"]
    assert "Without a thumb no question is stored" in info.feedback


def test_a_thumb_stores_the_question_and_nothing_else_does(house: House) -> None:
    folder = Path(house.store.root) / PROJECT / "feedback"
    answer = house.ask(QUESTION, ["team"])
    assert not folder.exists()
    thumb = {"query_id": answer["query_id"], "thumb": "up", "comment": "Good.\x00"}
    assert house.post(thumb, ["team"], "/feedback").json() == {"noted": True}
    assert house.post({**thumb, "thumb": "down"}, ["team"], "/feedback").status_code == 200
    first, second = sorted(folder.glob("*/*.jsonl"))
    entry = json.loads(first.read_text())
    assert entry["question"] == QUESTION
    assert (entry["thumb"], entry["comment"], entry["who"]) == ("up", "Good.", "t1")
    assert entry["passages"] == [s["id"] for s in answer["sources"]]
    assert entry["generation"] == answer["generation"]
    assert json.loads(second.read_text())["thumb"] == "down"
    # Not for what somebody else asked, not for what was never asked, and not without end.
    assert house.post(thumb, (), "/feedback").status_code == 404
    assert house.post({**thumb, "query_id": "0" * 32}, ["team"], "/feedback").status_code == 404
    codes = [house.post(thumb, ["team"], "/feedback").status_code for _ in range(6)]
    assert codes == [200, 200, 200, 429, 429, 429]
    for wrong in ({"thumb": "sideways"}, {"comment": "x" * 501}, {"query_id": "../x"}, {"question": "x"}):
        assert house.post({**thumb, **wrong}, ["team"], "/feedback").status_code == 422


def test_thumbs_are_rate_limited_by_token() -> None:
    with serving(settings=replace(QUICK, feedback_per_minute=2)) as house:
        thumb = {"query_id": "0" * 32, "thumb": "up"}
        done = [house.post(thumb, (), "/feedback") for _ in range(3)]
        assert [d.status_code for d in done] == [404, 404, 429]
        assert int(done[-1].headers["retry-after"]) > 0
        assert house.post(thumb, ["team"], "/feedback").status_code == 404


def test_logs_name_no_question_and_no_token(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    token = house.token(["team"])
    house.ask("a question about umbrellas", ["team"])
    house.get(f"/sources/{token}?token={token}", ["team"])
    house.get(f"/{token}", ["team"])
    house.post({"question": "umbrellas", "x": 1}, ["team"])
    house.opener.raises = ValueError("umbrellas in an error")
    bug = house.post({"question": "umbrellas"}, ["team"])
    house.opener.raises = None
    assert bug.status_code == 500
    assert "umbrellas" not in bug.text
    seen: list[str] = []
    wait_for(lambda: seen.extend(capsys.readouterr()) or "status=500" in "".join(seen))  # type: ignore[func-returns-value]
    text = "".join(seen)
    assert "umbrellas" not in text
    assert token not in text
    assert "kind=ValueError" in text
    assert bug.json()["request_id"] in text
    line = next(x for x in text.splitlines() if "route=/query" in x and "status=200" in x)
    assert "who=t1" in line
    assert "retrieve_ms=" in line


def test_questions_are_logged_where_the_spec_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(spec={"answers": {"log_questions": True}}) as house:
        house.ask("a question about umbrellas")
        assert house.get("/info").json()["logs_questions"] is True
    assert "a question about umbrellas" in capsys.readouterr().out


def test_an_index_that_does_not_answer_is_a_503(house: House) -> None:
    house.opener.raises = TryAgain("the server is away")
    done = house.post({"question": QUESTION})
    streamed = house.post({"question": QUESTION, "stream": True})
    house.opener.raises = None
    for one in (done, streamed):
        assert one.status_code == 503
        assert one.headers["retry-after"] == "5"
        assert "away" not in one.text


def test_streams_without_a_model_are_the_sources_and_the_answer(house: House) -> None:
    events = house.events(QUESTION)
    assert [name for name, _ in events] == ["sources", "done"]
    assert events[1][1]["answer"].endswith("[1]")


def test_without_tokens_everyone_on_loopback_reads_what_everyone_may() -> None:
    with serving(anonymous=True) as house:
        answer = house.client.post(f"{house.url}/query", json={"question": "Where is the key of the mirror cell?"})
        assert answer.status_code == 200
        assert "safe" not in answer.text.lower()
        assert house.opener.asked[-1][1] == {"everyone"}
        assert house.get("/info").json()["name"] == "anonymous"
        # A web page that lets its name point to this machine is not answered.
        for host, status in (
            ("evil.example", 421),
            ("localhost:1", 200),
            ("127.0.0.1", 200),
            ("[::1]:1", 200),
            ("", 421),
        ):
            port = int(house.url.rsplit(":", 1)[1])
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            asked.putrequest("GET", "/info", skip_host=True)
            asked.putheader("host", host)
            asked.endheaders()
            assert asked.getresponse().status == status, host
            asked.close()


def test_the_metrics_tell_stages_outcomes_and_what_answers(house: House) -> None:
    before = house.metric("orrery_serve_questions_total", outcome="answered")
    house.ask(QUESTION)
    assert house.metric("orrery_serve_questions_total", outcome="answered") == before + 1
    for stage in ("auth", "queue", "retrieve", "extract", "total"):
        assert house.metric("orrery_serve_stage_seconds_count", stage=stage) > 0, stage
    assert house.metric("orrery_serve_stage_seconds_count", stage="generate") == 0
    name = house.service.live.current.name  # type: ignore[union-attr]
    assert house.metric("orrery_serve_generation_info", generation=name, version="1") == 1
    assert house.metric("orrery_serve_passages") == 4
    assert house.metric("process_resident_memory_bytes") > 1e6
    assert QUESTION not in house.client.get(f"{house.url}/metrics").text


def test_events_are_read_line_by_line() -> None:
    assert list(events_of(iter(["event: a", 'data: {"x": 1}', "", ": comment"]))) == [("a", {"x": 1})]


def test_memory_of_answers_is_bounded(house: House) -> None:
    assert house.service.recent._most == 1000
    recent = replace(QUICK, remembered=3, remembered_for=1000.0)
    with serving(settings=recent) as other:
        ids = [other.ask(QUESTION)["query_id"] for _ in range(5)]
        assert len(other.service.recent) == 3
        codes = [other.post({"query_id": i, "thumb": "up"}, (), "/feedback").status_code for i in ids]
        assert codes == [404, 404, 200, 200, 200]


def test_a_store_that_is_away_loses_no_thumb_silently(house: House) -> None:
    answer = house.ask(QUESTION)
    outage = house.folder / "outage"
    outage.touch()
    os.environ["ORRERY_STORE_OUTAGE"] = str(outage)
    try:
        done = house.post({"query_id": answer["query_id"], "thumb": "up"}, (), "/feedback")
        assert done.status_code == 503
        wait_for(lambda: house.get("/health/live").json()["status"] == "degraded")
        assert house.get("/health/ready").status_code == 200
        assert house.metric("orrery_serve_store_problem") == 1
        assert house.ask(QUESTION)["sources"]
    finally:
        del os.environ["ORRERY_STORE_OUTAGE"]
    wait_for(lambda: house.get("/health/live").json()["status"] == "ok")
    assert time.monotonic() > 0
