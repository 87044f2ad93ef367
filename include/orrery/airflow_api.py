"""A small client of Airflow's REST API (v2), for `orrery up`, the demo and the tests. Does not import airflow.

    with AirflowApi.of(home) as airflow:
        run = airflow.trigger("flight_delay.ingest", partition_key="2013-03")
        run = airflow.wait(run, timeout=600)
        if not run.ok:
            print(airflow.failures(run))

Times out with `TryAgain`; a run that failed is no error here, ask its `ok`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote

import httpx

from orrery.errors import OrreryError, RequestError, TryAgain, UserError

PAGE = 100  # the most that Airflow returns at once ([api] maximum_page_limit)
FINISHED = frozenset({"success", "failed"})
# Of a log entry: what is written in front or below, and what every entry repeats.
NOT_SHOWN = frozenset(
    {"timestamp", "level", "event", "logger", "filename", "lineno", "loc", "error_detail"}
    | {"ti_id", "ti", "dag_id", "run_id", "task_id", "map_index", "try_number"}
)
FAILED_TASK = frozenset({"failed", "upstream_failed"})
PAUSES = (0.5, 1.0, 2.0)  # seconds before what a busy database refused is asked again


class _ServerError(TryAgain):
    """Airflow answered 5xx."""


@dataclass(frozen=True)
class Run:
    """One run of a Dag, as Airflow had it when asked."""

    dag_id: str
    run_id: str
    state: str
    run_type: str = ""
    partition_key: str | None = None
    conf: Mapping[str, Any] = field(default_factory=dict)
    started: datetime | None = None
    note: str | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        return self.state in FINISHED

    @property
    def ok(self) -> bool:
        """Whether it has ended well."""
        return self.state == "success"


@dataclass(frozen=True)
class Task:
    """One task of a run."""

    task_id: str
    state: str | None
    try_number: int
    max_tries: int
    map_index: int = -1
    seconds: float | None = None
    started: datetime | None = None


class AirflowApi:
    """Talks to one Airflow as one user.

    Raises `UserError` for a wrong password, `RequestError` for what Airflow refuses (unknown Dag, bad
    conf, a run that exists), and `TryAgain` while Airflow does not answer.
    """

    def __init__(self, url: str, user: str, password: str, *, timeout: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self._login = {"username": user, "password": password}
        # trust_env=False: no proxy of the surroundings comes between us and a loopback address.
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)
        self._token = ""

    @classmethod
    def of(cls, home: Path | None = None) -> AirflowApi:
        """Return a client of the local Airflow that `orrery up` started in `home`."""
        from orrery.servers import airflow_login

        url, user, password = airflow_login(home)
        return cls(url, user, password)

    def __enter__(self) -> AirflowApi:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the connections."""
        self._http.close()

    # Dags

    def dag_ids(self) -> list[str]:
        """Return the ids of all Dags that Airflow knows, sorted."""
        return sorted(dag["dag_id"] for dag in self._pages("dags", "dags", {}))

    def import_errors(self) -> dict[str, str]:
        """Return, for every Dag file that cannot be read, its name and the traceback."""
        return {str(e["filename"]): str(e["stack_trace"]) for e in self._pages("importErrors", "import_errors", {})}

    def wait_for_dags(self, *dag_ids: str, timeout: float = 120.0) -> None:
        """Wait until Airflow has read these Dags. Raises `UserError` when a Dag file is broken."""
        deadline = time.monotonic() + timeout
        while missing := sorted(set(dag_ids) - set(self.dag_ids())):
            if errors := self.import_errors():
                raise UserError("\n\n".join(f"{file} cannot be read:\n{text}" for file, text in errors.items()))
            if time.monotonic() > deadline:
                raise TryAgain(f"Airflow has not read these Dags within {timeout:.0f} s: {', '.join(missing)}")
            time.sleep(1)

    # runs

    def trigger(
        self,
        dag_id: str,
        conf: Mapping[str, Any] | None = None,
        *,
        partition_key: str | None = None,
        run_id: str | None = None,
    ) -> Run:
        """Start a run, once. A partition key is refused by a Dag whose timetable knows no partitions.

        The run's id is chosen here, in Airflow's own form, so that what a busy database refused can be asked again:
        had the run been made all the same, it is found by its id and none is made twice.
        """
        run_id = run_id or f"manual__{datetime.now(UTC).isoformat()}_{secrets.token_hex(4)}"
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf or {})}
        if partition_key is not None:
            body["partition_key"] = partition_key
        path = f"dags/{_part(dag_id)}/dagRuns"
        for pause in PAUSES:
            try:
                return _run(self._call("POST", path, json=body))
            except _ServerError:
                time.sleep(pause)
                if (made := self._found(dag_id, run_id)) is not None:
                    return made
        return _run(self._call("POST", path, json=body))

    def backfill(self, dag_id: str, first: datetime, last: datetime, conf: Mapping[str, Any] | None = None) -> None:
        """Have a scheduled Dag's runs from `first` to `last` (both included) made, those that there are left out."""
        body = {"dag_id": dag_id, "from_date": first.isoformat(), "to_date": last.isoformat(), "max_active_runs": 1}
        self._call("POST", "backfills", json={**body, "dag_run_conf": dict(conf or {})})

    def pause(self, dag_id: str, paused: bool = True) -> None:
        """Keep a Dag from starting by itself, or let it again."""
        self._call("PATCH", f"dags/{_part(dag_id)}", json={"is_paused": paused})

    def run(self, dag_id: str, run_id: str) -> Run:
        """Return one run as it is now."""
        return _run(self._call("GET", _path(dag_id, run_id)))

    def _found(self, dag_id: str, run_id: str) -> Run | None:
        try:
            return self.run(dag_id, run_id)
        except RequestError:
            return None

    def runs(self, dag_id: str = "~", *, partition_key: str | None = None) -> list[Run]:
        """Return the runs of a Dag (`~`: of all Dags), the newest first."""
        query: dict[str, str] = {"order_by": "-run_after"}
        if partition_key is not None:
            query["partition_key_prefix_pattern"] = partition_key
        found = (_run(item) for item in self._pages(f"dags/{_part(dag_id)}/dagRuns", "dag_runs", query))
        return [run for run in found if partition_key is None or run.partition_key == partition_key]

    def wait(self, run: Run, *, timeout: float = 600.0, every: float = 2.0) -> Run:
        """Return the run once it has ended, well or badly. Raises `TryAgain` when it takes longer than `timeout`."""
        deadline = time.monotonic() + timeout
        while not (now := self.run(run.dag_id, run.run_id)).done:
            if time.monotonic() > deadline:
                tasks = ", ".join(f"{t.task_id} {t.state or 'waiting'}" for t in self.tasks(now))
                raise TryAgain(
                    f"{run.dag_id} run {run.run_id} is still {now.state} after {timeout:.0f} s ({tasks})",
                    hint=f"look at {self.url}/dags/{_part(run.dag_id)}/runs/{_part(run.run_id)}",
                )
            time.sleep(every)
        return now

    def wait_for_partition(self, dag_id: str, partition_key: str, *, timeout: float = 600.0, every: float = 2.0) -> Run:
        """Wait until a Dag has a run for this partition (others cause it, through assets) and that run has ended."""
        deadline = time.monotonic() + timeout
        while not (runs := self.runs(dag_id, partition_key=partition_key)):
            if time.monotonic() > deadline:
                raise TryAgain(f"{dag_id} has no run for partition {partition_key} after {timeout:.0f} s")
            time.sleep(every)
        return self.wait(runs[0], timeout=max(1.0, deadline - time.monotonic()), every=every)

    # tasks

    def tasks(self, run: Run) -> list[Task]:
        """Return the tasks of a run, in the order in which they started."""
        items = self._pages(f"{_path(run.dag_id, run.run_id)}/taskInstances", "task_instances", {})
        tasks = [
            Task(
                task_id=item["task_id"],
                state=item["state"],
                try_number=item["try_number"],
                max_tries=item["max_tries"],
                map_index=item["map_index"],
                seconds=item["duration"],
                started=_time(item["start_date"]),
            )
            for item in items
        ]
        return sorted(tasks, key=lambda task: (task.started is None, task.started.timestamp() if task.started else 0.0))

    def xcom(self, run: Run, task_id: str, key: str = "return_value", *, map_index: int = -1) -> Any:
        """Return one value that a task passed on. Raises `RequestError` when it passed none."""
        path = f"{_path(run.dag_id, run.run_id)}/taskInstances/{_part(task_id)}/xcomEntries/{_part(key)}"
        return self._call("GET", path, query={"deserialize": "true", "map_index": str(map_index)})["value"]

    def log(self, run: Run, task_id: str, try_number: int = 1, *, map_index: int = -1) -> str:
        """Return the log of one try as plain lines."""
        path = f"{_path(run.dag_id, run.run_id)}/taskInstances/{_part(task_id)}/logs/{try_number}"
        content = self._call("GET", path, query={"full_content": "true", "map_index": str(map_index)})["content"]
        return "\n".join(_log_line(entry) for entry in content)

    def failures(self, run: Run, *, lines: int = 60, state: str = "failed") -> str:
        """Return, for every failed task of a run (or in `state`), the last lines of its last try's log."""
        parts = []
        for task in self.tasks(run):
            if task.state == state and task.try_number > 0:
                text = self.log(run, task.task_id, task.try_number, map_index=task.map_index)
                log = [line for line in text.splitlines() if "::group::" not in line and "::endgroup::" not in line]
                parts.append(f"{run.dag_id}.{task.task_id} try {task.try_number}:\n" + "\n".join(log[-lines:]))
            elif task.state in FAILED_TASK:
                parts.append(f"{run.dag_id}.{task.task_id}: {task.state}")
        return "\n\n".join(parts)

    # settings

    def put(self, kind: Literal["pools", "connections", "variables"], entities: list[dict[str, Any]]) -> None:
        """Create or overwrite pools, connections or variables, all in one call."""
        if not entities:
            return
        action = {"action": "create", "action_on_existence": "overwrite", "entities": entities}
        result = self._call("PATCH", kind, json={"actions": [action]})
        if errors := (result.get("create") or {}).get("errors"):
            raise UserError(f"Airflow refused {kind} of airflow_settings.yaml: {'; '.join(_detail(e) for e in errors)}")

    # the wire

    def _pages(self, path: str, key: str, query: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        offset = 0
        while True:
            page = self._call("GET", path, query={**query, "limit": str(PAGE), "offset": str(offset)})
            yield from page[key]
            offset += len(page[key])
            if not page[key] or offset >= page["total_entries"]:
                return

    def _call(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, json: Any = None
    ) -> dict[str, Any]:
        response = self._send(method, path, query, json)
        if response.status_code == httpx.codes.UNAUTHORIZED:  # the token is as old as a day, or Airflow is a new one
            self._token = ""
            response = self._send(method, path, query, json)
        if response.is_success:
            return dict(response.json()) if response.content else {}
        what = f"Airflow answered {response.status_code} to {method} {path}: {_text(response)}"
        if response.status_code in (401, 403):
            raise UserError(what)
        if response.is_client_error:
            raise RequestError(what)
        raise _ServerError(what, hint="see var/log/airflow.log")

    def _send(self, method: str, path: str, query: Mapping[str, str] | None, json: Any) -> httpx.Response:
        # A busy SQLite may answer 500 once. A question may be asked again, and so may a PATCH: all of ours say what
        # shall be, not what to add.
        for pause in PAUSES if method in ("GET", "PATCH") else ():
            response = self._once(method, path, query, json)
            if not response.is_server_error:
                return response
            time.sleep(pause)
        return self._once(method, path, query, json)

    def _once(self, method: str, path: str, query: Mapping[str, str] | None, json: Any) -> httpx.Response:
        try:
            if not self._token:
                self._token = self._sign_in()
            headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
            return self._http.request(method, f"/api/v2/{path}", params=query, json=json, headers=headers)
        except httpx.TransportError as e:
            raise TryAgain(
                f"Airflow does not answer at {self.url} ({type(e).__name__})",
                hint="start it with `orrery up`, or see `orrery status`",
            ) from None

    def _sign_in(self) -> str:
        response = self._http.post("/auth/token", json=self._login)
        if response.status_code == httpx.codes.CREATED:
            return str(response.json()["access_token"])
        user = self._login["username"]
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise UserError(
                f"Airflow at {self.url} refuses the password of {user}", hint="is it another home's Airflow?"
            )
        kind = TryAgain if response.is_server_error else OrreryError
        raise kind(f"Airflow at {self.url} gave no token to {user}: {response.status_code} {_text(response)}")


def _part(text: str) -> str:
    return quote(text, safe="~")


def _path(dag_id: str, run_id: str) -> str:
    return f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}"


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _run(item: Mapping[str, Any]) -> Run:
    return Run(
        dag_id=item["dag_id"],
        run_id=item["dag_run_id"],
        state=item["state"],
        run_type=item["run_type"],
        partition_key=item["partition_key"],
        conf=item["conf"] or {},
        started=_time(item["start_date"]),
        note=item["note"],
    )


def _log_line(entry: Any) -> str:
    """Write one structured log entry as `time level event key=value …`, with the traceback where there is one."""
    if not isinstance(entry, dict):
        return str(entry)
    rest = (f"{key}={value!r}" for key, value in entry.items() if key not in NOT_SHOWN)
    head = (str(entry.get(key) or "") for key in ("timestamp", "level", "event"))
    line = " ".join(word for word in (*head, *rest) if word)
    for error in entry.get("error_detail") or []:
        if isinstance(error, dict):
            calls = error.get("frames") or []
            frames = (f"    {call.get('filename')}:{call.get('lineno')} in {call.get('name')}" for call in calls)
            line = "\n".join([line, *frames, f"    {error.get('exc_type')}: {error.get('exc_value')}"])
    return line


def _text(response: httpx.Response) -> str:
    """Return what an error answer says, in one line."""
    try:
        return _detail(response.json())
    except ValueError:
        return response.text.strip()[:500] or response.reason_phrase


def _detail(body: Any) -> str:
    detail = body.get("detail", body.get("error", body)) if isinstance(body, dict) else body
    if isinstance(detail, dict) and detail.get("reason") == "Unique constraint violation":
        return "it exists already"
    if isinstance(detail, list):  # FastAPI's list of what is wrong with a request
        return "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" if "loc" in d else str(d) for d in detail)
    return str(detail)
