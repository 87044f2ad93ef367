"""Too much, too slow, gone away, told to stop: the service refuses at once, frees what it held, and ends in order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from serving_house import QUICK, House, Passage, serving, wait_for

QUESTION = "When does the dome close in the wind?"


def ask_all(house: House, count: int) -> Counter[int]:
    headers = house.headers()

    def one(_: int) -> httpx.Response:
        return httpx.post(f"{house.url}/query", json={"question": QUESTION}, headers=headers, timeout=20)

    with ThreadPoolExecutor(count) as pool:
        done = list(pool.map(one, range(count)))
    assert all(d.headers["retry-after"] for d in done if d.status_code == 503)
    return Counter(d.status_code for d in done)


def test_more_than_the_queue_holds_is_refused_at_once_and_the_rest_is_answered() -> None:
    with serving(settings=replace(QUICK, searches=1, search_queue=3)) as house:
        house.opener.hold = threading.Event()
        release = threading.Thread(
            target=lambda: (
                wait_for(lambda: house.metric("orrery_serve_refused_total", status="503") == 16),
                house.opener.hold.set(),
            )
        )
        release.start()
        assert ask_all(house, 20) == {200: 4, 503: 16}
        release.join()
        assert ask_all(house, 4) == {200: 4}
        assert house.metric("orrery_serve_refused_total", status="503") == 16
        assert house.metric("orrery_serve_in_flight") == 0
        assert house.metric("orrery_serve_queued", what="search") == 0


def test_a_search_that_hangs_is_given_up_and_its_place_stays_taken_until_it_ends() -> None:
    with serving(settings=replace(QUICK, searches=1, search_queue=0, search_timeout=0.6)) as house:
        house.opener.hold = threading.Event()
        assert house.post({"question": QUESTION}).status_code == 503
        refused = house.post({"question": QUESTION})
        assert refused.status_code == 503
        assert "too many" in refused.json()["detail"]
        house.opener.hold.set()
        wait_for(lambda: house.service.answering.searching.busy == 0)
        assert house.post({"question": QUESTION}).status_code == 200


def test_who_hangs_up_while_waiting_is_never_searched_for() -> None:
    with serving(settings=replace(QUICK, searches=1, search_queue=5, search_wait=10.0)) as house:
        house.opener.hold = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(house.ask, QUESTION)
            wait_for(lambda: house.opener.at_work == 1)
            for body in ({"question": "gone"}, {"question": "gone", "stream": True}):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{house.url}/query", json=body, headers=house.headers(), timeout=0.2)
            wait_for(lambda: house.service.answering.searching.waiting == 0)
            house.opener.hold.set()
            assert first.result(10)["sources"]
        wait_for(lambda: house.metric("orrery_serve_in_flight") == 0)
        assert [question for question, *_ in house.opener.asked] == [QUESTION]
        assert house.metric("orrery_serve_questions_total", outcome="cancelled") == 2
        assert house.service.live.current.opened.holders == 1  # type: ignore[union-attr]


def test_connections_that_say_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orrery.serving.server._Protocol.header_timeout", 0.2)
    with serving() as house:
        port = int(house.url.rsplit(":", 1)[1])
        for said in (b"", b"POST /query HTTP/1.1\r\nhost: x\r\nx-slow: "):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                sock.sendall(said)
                assert sock.recv(10) == b""
        assert house.ask(QUESTION)["sources"]


def test_connections_that_begin_another_request_and_stop_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orrery.serving.server._Protocol.header_timeout", 0.3)
    whole = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    unread = b"POST /query HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"  # answered before its body has come
    with serving() as house:
        port = int(house.url.rsplit(":", 1)[1])
        for first, status in ((whole, b" 200 "), (unread, b" 401 ")):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                sock.sendall(first)
                assert status in sock.recv(65536).splitlines()[0]
                # Bytes that drip do not put it off.
                with suppress(OSError):
                    for _ in range(100):
                        sock.sendall(b"G")
                        sock.settimeout(0.05)
                        with suppress(TimeoutError):
                            if sock.recv(10) == b"":
                                break
                    else:
                        raise AssertionError("the connection is held")
        # One that goes on in time keeps its connection, however long ago it was opened.
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            for _ in range(6):
                sock.sendall(whole)
                assert b" 200 " in sock.recv(65536).splitlines()[0]
                time.sleep(0.1)


# -- a process of its own, and its end ---------------------------------------------------------------

PROCESS = """
import asyncio, json, sys, threading
from dataclasses import replace
from pathlib import Path
from serving_house import PASSAGES, QUICK, SPEC, House, PlantedOpener
from orrery import log
from orrery.serving.server import listen, make, run
log.configure()
house = House(Path(sys.argv[1]), SPEC, PlantedOpener(), replace(QUICK, stop=5.0, search_timeout=60.0), True)
house.publish(PASSAGES, 0.2)
house.opener.delay = float(sys.argv[2])
from orrery.serving.app import Service
scratch = house.folder / "scratch"; scratch.mkdir()
service = Service("notes", house.spec, house.store, house.opener, scratch, settings=house.settings)
listener = listen("127.0.0.1", 0)
server = make(service, "127.0.0.1")
print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
asyncio.run(run(server, service, listener))
import orrery.serving.__main__ as program
program._leave(0)
"""


@pytest.mark.parametrize(("delay", "answered"), [(3.0, True), (30.0, False)])
def test_told_to_stop_it_ends_what_began_refuses_what_comes_and_exits(
    tmp_path: Path, delay: float, answered: bool
) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"}
    argv = [sys.executable, "-c", PROCESS, str(tmp_path), str(delay)]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: ready(url))
            with ThreadPoolExecutor(1) as pool, httpx.Client() as kept:
                assert kept.get(f"{url}/info").status_code == 200
                asked = pool.submit(httpx.post, f"{url}/query", json={"question": QUESTION}, timeout=20)
                wait_for(lambda: "orrery_serve_in_flight 1" in httpx.get(f"{url}/metrics").text)
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                wait_for(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
                refused = kept.post(f"{url}/query", json={"question": QUESTION})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                if answered:
                    assert asked.result().json()["sources"]
                else:
                    with pytest.raises(httpx.HTTPError):
                        asked.result().raise_for_status()
            assert process.wait(25) == 0
            assert time.monotonic() - began < 25
        finally:
            process.kill()
        log = process.stdout.read()
    assert "stopping" in log
    assert "Traceback" not in log


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def command(tmp_path: Path, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("ORRERY_")} | more
    return subprocess.run(
        [sys.executable, "-m", "orrery.serving", *argv],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_what_must_be_put_right_first_is_said_in_a_line_and_not_as_a_traceback(tmp_path: Path) -> None:
    project = tmp_path / "projects" / "notes"
    project.mkdir(parents=True)
    spec = {"version": 1, "kind": "knowledge_base", "owner": "x", "sources": {"a": {"uri": "a"}}}
    (project / "spec.yaml").write_text(json.dumps(spec))
    env = {"ORRERY_PROJECTS": str(tmp_path / "projects"), "ORRERY_STORE": f"file://{tmp_path / 'store'}"}
    for argv, said in {
        ("notes", "--host", "0.0.0.0"): "needs tokens",
        ("note",): "did you mean 'notes'",
        ("notes", "--tokens", str(tmp_path / "none.yaml")): "no such file",
        ("notes", "--host", "192.0.2.1", "--tokens", str(tmp_path / "tokens.yaml")): "cannot listen",
    }.items():
        (tmp_path / "tokens.yaml").write_text("tokens: []")
        done = command(tmp_path, *argv, **env)
        assert done.returncode == 64, done
        assert said in done.stderr
        assert "Traceback" not in done.stderr + done.stdout
    (project / "spec.yaml").write_text(json.dumps({**spec, "llm": "nowhere"}))
    done = command(tmp_path, "notes", **env)
    assert (done.returncode, "platform.yaml" in done.stderr) == (64, True)


def test_who_never_reads_an_answer_holds_nothing_for_long() -> None:
    long = [
        Passage("The dome and the wind. " + "word " * 200, uri=f"guides/{i}.md", title="x" * 20_000) for i in range(50)
    ]
    settings = replace(QUICK, request_timeout=0.5)
    with serving(settings=settings, passages=long, spec={"answers": {"timeout": 0.5}}) as house:
        body = json.dumps({"question": QUESTION, "top_k": 50, "stream": True})
        token = house.headers()["authorization"]
        head = f"POST /query HTTP/1.1\r\nhost: x\r\nauthorization: {token}\r\ncontent-type: application/json\r\n"
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", int(house.url.rsplit(":", 1)[1])))
            sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(lambda: house.metric("orrery_serve_in_flight") == 1)
            wait_for(lambda: house.metric("orrery_serve_in_flight") == 0)
        assert house.service.live.current.opened.holders == 1  # type: ignore[union-attr]


def test_too_many_requests_are_told_so_whatever_they_ask() -> None:
    with serving(settings=replace(QUICK, requests=4, searches=8)) as house:
        house.opener.hold = threading.Event()
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(house.ask, QUESTION) for _ in range(4)]
            wait_for(lambda: house.opener.at_work == 4)
            # Head and body come apart, as many clients send them: the refusal must not be lost between the two.
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", int(house.url.rsplit(":", 1)[1])), timeout=10) as sock:
                    sock.sendall(b"POST /query HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
                    time.sleep(0.002)
                    sock.sendall(b"x" * 100)
                    assert sock.recv(4096).startswith(b"HTTP/1.1 503 ")
            house.opener.hold.set()
            assert all(a.result(10)["sources"] for a in asked)
