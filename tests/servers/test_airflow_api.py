"""The client of Airflow against a server that refuses as a busy database does; it makes runs and nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

from orrery import airflow_api
from orrery.airflow_api import AirflowApi
from orrery.errors import RequestError, TryAgain


class Busy(ThreadingHTTPServer):
    """Keeps runs; answers 500 to the next `refused` writes, after having done the work when `late`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.runs: dict[str, dict[str, Any]] = {}
        self.refused, self.late = 0, False
        self.writes: list[tuple[str, dict[str, Any]]] = []


class Answers(BaseHTTPRequestHandler):
    server: Busy

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def body(self) -> dict[str, Any]:
        return dict(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def write(self, body: dict[str, Any], done: Any) -> None:
        self.server.writes.append((self.command, body))
        if self.server.refused:
            self.server.refused -= 1
            if self.server.late:
                done()
            self.answer(500, {"detail": {"reason": "Database error"}})
        else:
            self.answer(*done())

    def do_GET(self) -> None:
        run = self.server.runs.get(unquote(self.path.rpartition("/")[2]))
        self.answer(200, run) if run else self.answer(404, {"detail": "no such run"})

    def do_PATCH(self) -> None:
        self.write(self.body(), lambda: (200, {}))

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/auth/token":
            self.answer(201, {"access_token": "t"})
            return

        def made() -> tuple[int, Any]:
            if body["dag_run_id"] in self.server.runs:
                return 409, {"detail": "a run of this id exists"}
            nothing = dict.fromkeys(("partition_key", "start_date", "note"))
            run = {"dag_id": "d", "state": "queued", "run_type": "manual", **nothing, **body}
            self.server.runs[body["dag_run_id"]] = run
            return 200, run

        self.write(body, made)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Busy, AirflowApi]]:
    monkeypatch.setattr(airflow_api, "PAUSES", (0.0, 0.0, 0.0))
    server = Busy()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with AirflowApi(f"http://127.0.0.1:{server.server_address[1]}", "admin", "x") as api:
        yield server, api
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("late", [False, True], ids=["before-the-work", "after-the-work"])
def test_a_run_that_a_busy_database_refused_is_made_once(busy: tuple[Busy, AirflowApi], late: bool) -> None:
    server, api = busy
    server.refused, server.late = 2, late
    run = api.trigger("d", {"reason": "x"}, partition_key="2013-03")
    assert set(server.runs) == {run.run_id}
    assert (run.dag_id, run.partition_key, run.conf) == ("d", "2013-03", {"reason": "x"})
    assert len(server.writes) == (1 if late else 3)


def test_one_that_is_refused_on_and_on_says_so(busy: tuple[Busy, AirflowApi]) -> None:
    server, api = busy
    server.refused = 99
    with pytest.raises(TryAgain, match="answered 500 to POST dags/d/dagRuns"):
        api.trigger("d")
    assert len(server.writes) == 4 and not server.runs


def test_a_run_of_an_id_that_exists_is_still_refused(busy: tuple[Busy, AirflowApi]) -> None:
    _, api = busy
    first = api.trigger("d", run_id="mine")
    assert first.run_id == "mine"
    with pytest.raises(RequestError, match="exists"):
        api.trigger("d", run_id="mine")


def test_two_runs_have_two_ids(busy: tuple[Busy, AirflowApi]) -> None:
    server, api = busy
    assert len({api.trigger("d").run_id for _ in range(3)}) == len(server.runs) == 3


def test_a_pause_is_asked_again(busy: tuple[Busy, AirflowApi]) -> None:
    server, api = busy
    server.refused = 1
    api.pause("d")
    assert server.writes == [("PATCH", {"is_paused": True})] * 2
