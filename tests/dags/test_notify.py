"""How alerts go out: a real webhook, a real mail server, all the ways in which both can fail, and a missed deadline."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator
from email import message_from_string
from email.header import decode_header, make_header
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from live_house import Live, free_port, webhook
from smtp_house import smtp_server

from orrery.alerts import told_of
from orrery.ledger import Ledger

SPEC = """\
version: 1
kind: model
owner: {owner}
task: binary
label: {{column: late}}
sources:
  flights: {{uri: "file:///x/{{partition}}.parquet", partition: month}}
"""
SECRET = "s3cret-pa55"


class House:
    """A project with missing labels in its ledger, and a platform with channels."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.patch = home, monkeypatch
        (home / "projects" / "toy").mkdir(parents=True)
        self.spec()
        monkeypatch.setenv("ORRERY_PROJECTS", str(home / "projects"))
        monkeypatch.setenv("ORRERY_PLATFORM", str(home / "platform.yaml"))
        monkeypatch.setenv("ORRERY_LEDGER", f"sqlite:///{home}/ledger.db")
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        self.book = Ledger(f"sqlite:///{home}/ledger.db")
        self.platform("")

    def spec(self, owner: str = "ops-ml") -> None:
        (self.home / "projects" / "toy" / "spec.yaml").write_text(SPEC.format(owner=json.dumps(owner)))

    def platform(self, alerts: str) -> None:
        base = "version: 1\nenvironments: {ml: {image: 'a/b:1'}}\ncompute: {cpu-light: {}}\n"
        (self.home / "platform.yaml").write_text(base + alerts)

    def webhook(self, **connection: Any) -> None:
        self.platform("alerts: {webhook: hook}\n")
        self.patch.setenv("AIRFLOW_CONN_HOOK", json.dumps({"conn_type": "http", **connection}))

    def email(self, port: int, also_webhook: bool = False, host: str = "127.0.0.1", **extra: Any) -> None:
        hook = "webhook: hook, " if also_webhook else ""
        self.platform(f"alerts: {{{hook}email: {{connection: mail, to: [a@x.example, b@x.example]}}}}\n")
        extra = {"from_email": "orrery@x.example", "disable_ssl": True, "disable_tls": True, **extra}
        connection = {"conn_type": "smtp", "host": host, "port": port, "extra": extra}
        self.patch.setenv("AIRFLOW_CONN_MAIL", json.dumps(connection))

    def unlabelled(self, key: str = "2013-01", share: float = 0.1) -> None:
        n = len(self.book.find("toy", "run"))
        payload = {"verb": "monitor", "key": key, "status": "done", "metrics": {"labelled": share}}
        self.book.record("toy", "run", f"toy/runs/toy.monitor--{n}/monitor-{key}/1", "done", "t", payload)

    def occasion(self) -> None:
        """Do as Airflow does when a task has ended."""
        from orrery.orchestration.notify import task_callbacks

        task_callbacks("toy", "monitor")["on_success_callback"]({"dag_run": None})

    def tries(self, channel: str, key: str = "labels/2013-01/1") -> list[Any]:
        told = next(t for t in told_of(self.book.find("toy", "alert")) if t.key == key)
        return list(told.tries.get(channel, ()))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    found = House(tmp_path, monkeypatch)
    found.unlabelled()
    return found


def test_a_webhook_is_told_once(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with webhook() as (url, told), caplog.at_level(logging.INFO, "orrery.alerts"):
        house.webhook(host=url, password=SECRET, extra={"path": "/services/x", "headers": {"X-Team": "ml"}})
        for _ in range(3):  # a task, its retry, another task
            house.occasion()
        (one,) = told
        assert one["_path"] == "/services/x" and one["_headers"]["Authorization"] == f"Bearer {SECRET}"
        assert one["_headers"]["X-Team"] == "ml"
        assert (one["kind"], one["subject"], one["owner"], one["severity"]) == (
            "labels",
            "2013-01",
            "ops-ml",
            "warning",
        )
        assert one["reason"] == "10.0% of the rows of 2013-01 have a label; at least 80.0% should"
        assert one["runbook"].endswith("/dags/toy.labels") and one["facts"] == {"labelled": 0.1, "least": 0.8}
        assert one["reason"] in one["text"] and "ops-ml" in one["text"] and one["runbook"] in one["text"]
        house.unlabelled(share=0.9)
        house.occasion()
        house.unlabelled(share=0.2)
        house.occasion()
        assert [t["key"] for t in told] == ["labels/2013-01/1", "labels/2013-01/2"]
    assert SECRET not in caplog.text and SECRET not in str(house.book.find("toy"))


def test_without_a_channel_it_is_in_the_ledger_and_the_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.occasion()
    assert "alert labels/2013-01/1: 10.0% of the rows" in caplog.text and "owner: ops-ml" in caplog.text
    assert [t.key for t in told_of(house.book.find("toy", "alert"))] == ["labels/2013-01/1"]


@pytest.mark.parametrize(("status", "posts"), [(500, 2), (429, 2), (404, 1), (302, 2)])
def test_a_webhook_that_refuses_is_on_record_and_is_told_later(house: House, status: int, posts: int) -> None:
    with webhook(status) as (url, told):
        house.webhook(host=url)
        house.occasion()
        assert len(told) == posts
        assert house.tries("webhook")[0]["error"] == f"it answered {status}"
    with webhook() as (url, told):
        house.webhook(host=url)
        house.occasion()
        house.occasion()
        assert len(told) == 1 and house.tries("webhook")[1]["delivered"] is True


def test_what_cannot_be_reached_fails_no_task_and_names_no_address(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.webhook(host=f"http://user:{SECRET}@127.0.0.1:{free_port()}/T0/{SECRET}")
    house.occasion()
    assert house.tries("webhook")[-1]["error"] == "ConnectError: Connection refused"
    house.webhook(host=f"https://no-such-host-{SECRET}.invalid/{SECRET}")
    house.occasion()
    assert house.tries("webhook")[-1]["error"].startswith("ConnectError: ")
    house.webhook(host=f"ftp://{SECRET}")
    house.occasion()
    assert house.tries("webhook")[-1]["error"] == "UnsupportedProtocol"
    house.patch.delenv("AIRFLOW_CONN_HOOK")
    house.occasion()
    assert "Airflow connection cannot be used" in house.tries("webhook")[-1]["error"]
    assert "is tried again at the next occasion" in caplog.text
    assert SECRET not in caplog.text and SECRET not in str(house.book.find("toy"))


@pytest.fixture
def hanging() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        thread = Thread(target=accept, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
    for one in held:
        one.close()


def test_servers_that_hang_cost_a_bounded_time(house: House, hanging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from orrery.orchestration import channels

    monkeypatch.setattr(channels, "TIMEOUT", 1.0)
    monkeypatch.setattr(channels, "BUDGET", 20.0)
    house.webhook(host=f"http://127.0.0.1:{hanging}")
    house.email(hanging, also_webhook=True)
    for key in ("2013-02", "2013-03"):
        house.unlabelled(key)
    began = time.monotonic()
    house.occasion()
    assert time.monotonic() - began < 15
    assert house.tries("webhook")[0]["error"] == "ReadTimeout"
    assert house.tries("email")[0]["error"]  # its share of the time is what the webhook left
    # The other alerts wait: a channel that fails is left alone until the next occasion.
    assert house.tries("webhook", "labels/2013-02/1") == house.tries("email", "labels/2013-02/1") == []


def test_an_answer_byte_by_byte_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from orrery.orchestration.channels import within

    began = time.monotonic()
    assert within(0.2, lambda: time.sleep(10)) == "no answer within the time"
    assert time.monotonic() - began < 8
    assert within(30, lambda: None) is None
    assert within(30, lambda: json.loads("x")) == "JSONDecodeError"


HOSTILE = "ops\r\nBcc: eve@evil.example\r\n\r\n<script>alert(1)</script>"


def test_mail_says_the_same_and_cannot_be_bent(house: House) -> None:
    house.spec(HOSTILE[:90])
    with smtp_server() as (port, mails):
        house.email(port)
        house.occasion()
        house.occasion()
    ((to, text),) = mails
    mail = message_from_string(text)
    subject = str(make_header(decode_header(mail["Subject"])))
    assert to == ["a@x.example", "b@x.example"] and mail["To"] == "a@x.example, b@x.example"
    assert subject == "[warning] toy: labels 2013-01" and mail["From"] == "orrery@x.example"
    assert mail["Bcc"] is None and set(mail.keys()) == {"Content-Type", "MIME-Version", "Subject", "From", "To", "Date"}
    body = mail.get_payload(0).get_payload(decode=True).decode()
    assert "10.0% of the rows of 2013-01 have a label" in body and "/dags/toy.labels" in body
    assert "<script>" not in body and "&lt;script&gt;" in body


def test_a_subject_is_one_line_whatever_it_is_about() -> None:
    from orrery.alerts import Alert, Told
    from orrery.orchestration.channels import document, page, title

    alert = Alert(
        "late", "x\r\nBcc: a@b.c\u202e", "toy", "o", "critical", "r", "https://x/'><script>", {"<b>": "\n<i>"}
    )
    told = Told("k", "now", alert, (), None, {}, {})
    assert "\n" not in title(told) and "\r" not in title(told) and len(title(told)) <= 150
    assert "<script>" not in page(told) and "<i>" not in page(told) and "<b>" not in page(told)
    assert json.loads(json.dumps(document(told), allow_nan=False))["key"] == "k"


@pytest.mark.parametrize(
    ("refuses", "error"),
    [
        ({"RCPT": "550 no such user"}, "the server refuses the recipients"),
        ({"MAIL": "451 try later s3cret-pa55"}, "the server answered 451"),
        ({"DATA": "554 not today"}, "the server answered 554"),
    ],
)
def test_mail_that_is_refused_is_on_record(house: House, refuses: dict[str, str], error: str) -> None:
    with smtp_server(**refuses) as (port, mails):
        house.email(port)
        house.occasion()
        assert mails == [] and house.tries("email")[0]["error"] == error
    house.email(free_port())
    house.occasion()
    assert house.tries("email")[1]["error"] == "ConnectionRefusedError: Connection refused"


def test_one_channel_that_is_down_keeps_nothing_from_the_other(house: House) -> None:
    house.webhook(host=f"http://127.0.0.1:{free_port()}")
    with smtp_server() as (port, mails):
        house.email(port, also_webhook=True)
        house.occasion()
        assert len(mails) == 1 and house.tries("webhook")[0]["delivered"] is False


def test_nothing_that_is_broken_fails_a_task(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.patch.setenv("ORRERY_LEDGER", "sqlite:////proc/none/ledger.db")
    house.occasion()
    assert "alerts of toy could not be looked at" in caplog.text
    house.patch.setenv("ORRERY_PROJECTS", str(house.home / "none"))
    house.occasion()


def test_a_deadline_is_told_by_the_run_that_missed_it(house: House) -> None:
    from orrery.orchestration.notify import OrreryNotifier

    def missed(**run: Any) -> list[str]:
        context = {"dag_run": {"dag_id": "toy.score", "queued_at": "2026-01-01T00:00:00Z", **run}, "deadline": {}}

        async def wait() -> None:
            await OrreryNotifier("toy", missed="score", context=context)  # type: ignore[arg-type]

        asyncio.run(wait())
        return [t.key for t in told_of(house.book.find("toy", "alert")) if t.alert.kind == "late"]

    assert missed(partition_key=None, conf=None) == []
    assert missed(partition_key="../../etc/passwd") == []
    assert missed(partition_key="2013-01", queued_at=None) == []
    assert missed(partition_key="2013-01") == ["late/2013-01/1"]
    assert missed(conf={"partition": "2013-02"}) == ["late/2013-01/1", "late/2013-02/1"]


def test_deadlines_and_callbacks_are_where_scores_depend_on_them() -> None:
    from datetime import timedelta

    from airflow.dag_processing.dagbag import DagBag

    dags = DagBag(str(Path(__file__).resolve().parents[2] / "dags")).dags
    alerts = {name: dag.deadline for name, dag in dags.items() if dag.deadline}
    assert set(alerts) == {"flight_delay.ingest", "flight_delay.score", "handbook.reindex"}
    assert alerts.pop("handbook.reindex")[0].interval == timedelta(hours=4)
    for (deadline,) in alerts.values():
        assert deadline.interval == timedelta(hours=6)
        assert deadline.callback.path == "orrery.orchestration.notify.OrreryNotifier"
        assert deadline.callback.kwargs["project"] == "flight_delay"
    told = {f"{d}.{t.task_id}" for d, dag in dags.items() for t in dag.tasks if t.on_success_callback}
    assert {"flight_delay.train.gate", "flight_delay.score.score", "flight_delay.monitor.monitor"} <= told
    assert "flight_delay.train.train" not in told


@pytest.mark.slow
def test_a_missed_deadline_is_told_once_by_airflow_itself(live: Live) -> None:
    run = live.trigger("toy.score", partition="2013-05")
    end = time.monotonic() + 60
    while not (late := [t for t in live.told if t["kind"] == "late"]):
        assert time.monotonic() < end, live.log()[-4000:]
        time.sleep(0.5)
    assert live.states("toy.score", run)["score"] in (
        "running",
        "queued",
        "scheduled",
    )  # it fires while the run goes on
    assert (late[0]["subject"], late[0]["owner"], late[0]["severity"]) == ("2013-05", "ops", "critical")
    assert "its scoring has not ended well within 5s" in late[0]["reason"]
    assert late[0]["runbook"] == f"{live.url}/dags/toy.score"
    assert late[0]["_headers"]["Authorization"] == "Bearer s3cret"
    assert live.ended("toy.score", run)["state"] == "success"
    time.sleep(3)
    assert len([t for t in live.told if t["kind"] == "late"]) == 1
    logs = live.log() + "".join(p.read_text() for p in (live.home / "airflow").rglob("*.log"))
    assert "s3cret" not in logs
