"""The web pages as Airflow's API server serves them: who may see what, what is in them, and what hostile names reach."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import web_house
from mlflow_house import free_port, mlflow_server
from web_house import EVIL, PROJECT, RUNS, attempt

from orrery.registry.client import Mlflow

pytestmark = pytest.mark.slow

TRAIN = f"{PROJECT}.train"
MODEL = f"/orrery/pages/dags/{TRAIN}/model"


class House:
    """The server, a client that is nobody, and a token per user."""

    def __init__(self, home: Path, address: str) -> None:
        self.home, self.http = home, httpx.Client(base_url=address, timeout=60, trust_env=False)
        self.tokens: dict[str, str] = {}

    def get(self, path: str, user: str | None = "ada", **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token(user)}"} if user else {}
        return self.http.get(path, headers=headers, **more)

    def raw(self, path: str, user: str | None = "ada") -> tuple[int, dict[str, str], str]:
        """Send a path as it is: other clients tidy it up first. Return status, headers and text."""
        url = self.http.base_url
        connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.token(user)}"} if user else {})
            answer = connection.getresponse()
            headers = {k.lower(): v for k, v in answer.getheaders()}
            return answer.status, headers, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def token(self, user: str) -> str:
        if user not in self.tokens:
            answer = self.http.post("/auth/token", json={"username": user, "password": user})
            assert answer.status_code == 201, answer.text
            self.tokens[user] = answer.json()["access_token"]
        return self.tokens[user]


@pytest.fixture(scope="module")
def mlflow_port() -> int:
    return free_port()


@pytest.fixture
def mlflow(mlflow_port: int, tmp_path: Path) -> Iterator[Mlflow]:
    with mlflow_server(tmp_path, mlflow_port) as address:
        yield Mlflow(address)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, mlflow_port: int) -> Iterator[House]:
    home = tmp_path_factory.mktemp("web")
    with web_house.api_server(home, free_port(), f"http://127.0.0.1:{mlflow_port}") as address:
        found = House(home, address)
        yield found
        found.http.close()


def page(kind: str, run: str) -> str:
    verb, run_id, _, _ = RUNS[run]
    return f"/orrery/{kind}/dags/{PROJECT}.{verb}/runs/{quote(run_id, safe='')}/verdict"


EVERY = (
    MODEL,
    f"/orrery/api/dags/{TRAIN}/model",
    page("pages", "promoted"),
    page("api", "promoted"),
    f"/orrery/evidence/{TRAIN}/{attempt('kept', 'evaluate')}/evidence/curves.html",
    f"/orrery/mlflow/{TRAIN}/run/{attempt('kept', 'train')}",
    f"/orrery/mlflow/{TRAIN}/version/{attempt('promoted', 'register')}",
    "/orrery/static/style.css",
)


# -- who may see what ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EVERY)
def test_nobody_is_answered_without_a_token(house: House, path: str) -> None:
    assert house.get(path, None).status_code == 401
    forged = {"Authorization": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ."}
    assert house.http.get(path, headers=forged).status_code == 403
    assert house.http.get(path, headers={"Cookie": "_token=forged"}).status_code in (401, 403)


@pytest.mark.parametrize("path", EVERY[:-1])
def test_who_may_not_read_the_dag_sees_nothing(house: House, path: str) -> None:
    answer = house.get(path, "mallory")
    assert answer.status_code == 403
    assert "version" not in answer.text and "auc" not in answer.text
    # Not even whether there is such a Dag.
    assert house.get("/orrery/pages/dags/nothing.train/model", "mallory").status_code == 403


def test_airflows_cookie_is_as_good_as_its_bearer_token(house: House) -> None:
    answer = house.http.get(MODEL, headers={"Cookie": f"_token={house.token('ada')}"})
    assert answer.status_code == 200


def test_every_answer_to_a_change_is_no(house: House) -> None:
    """Nothing of ours changes anything, so there is nothing to forge."""
    headers = {"Authorization": f"Bearer {house.token('ada')}"}
    for path in EVERY:
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert house.http.request(method, path, headers=headers).status_code == 405, (method, path)


def test_a_reader_is_not_offered_a_rollback_and_airflow_refuses_it(house: House) -> None:
    text = house.get(MODEL, "viv").text
    assert f"you may not start {PROJECT}.rollback" in text and "<dialog" not in text
    assert "<dialog" in house.get(MODEL, "ada").text
    headers = {"Authorization": f"Bearer {house.token('viv')}"}
    body = {"logical_date": None, "conf": {"version": "1", "reason": "x"}}
    assert house.http.post(f"/api/v2/dags/{PROJECT}.rollback/dagRuns", json=body, headers=headers).status_code == 403


def test_a_foreign_site_can_start_nothing_in_a_users_name(house: House) -> None:
    """What a form of another site could send is refused, and its script gets no permission to send JSON."""
    cookie = {"Cookie": f"_token={house.token('ada')}", "Origin": "https://evil.example"}
    path = f"/api/v2/dags/{PROJECT}.rollback/dagRuns"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        body = '{"logical_date": null, "conf": {"version": "1"}}'
        assert house.http.post(path, content=body, headers={**cookie, "Content-Type": kind}).status_code in (
            400,
            415,
            422,
        )
    asked = {**cookie, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert "access-control-allow-origin" not in house.http.options(path, headers=asked).headers


# -- what is there ------------------------------------------------------------------------------------


def test_what_is_not_there_is_404_and_what_is_not_ours_is_told_kindly(house: House) -> None:
    assert house.get("/orrery/pages/dags/nothing/model").status_code == 404
    assert house.get(f"/orrery/pages/dags/{TRAIN}/runs/nothing/verdict").status_code == 404
    for other in ("reports", "elsewhere.train"):
        answer = house.get(f"/orrery/pages/dags/{other}/model")
        assert answer.status_code == 200 and "not one of Orrery" in answer.text
        assert house.get(f"/orrery/api/dags/{other}/model").status_code == 404
    assert house.get(f"/orrery/api/dags/{TRAIN}/nothing").status_code == 404


def test_the_model_tab_says_what_the_ledger_says(house: House) -> None:
    text, data = house.get(MODEL).text, house.get(f"/orrery/api/dags/{TRAIN}/model").json()
    assert data["champion"]["version"] == "3" and data["champion"]["reason"] == "it was the network after all"
    assert data["rollback"] == ["2", "1"]
    assert [h["version"] for h in data["history"]] == ["3", "2", "3", "2", "1"]
    assert [h["verdict"] for h in data["health"]] == list(web_house.VERDICTS)
    assert [h["version"] for h in data["health"]] == list(web_house.VERSIONS)
    assert data["challenger"]["version"] == "4"
    assert data["approvals"][0]["approvers"] == ["ada", "bob"]
    assert [r["window"] for r in data["requests"]] == ["2013-11..2014-01"]
    assert [(a["kind"], a["ended"] is None) for a in data["alerts"]] == [("late", True), ("quarantine", False)]
    for word in ("version 3", "it was the network after all", "A promotion waits for a person", "2013-11..2014-01"):
        assert word in text
    assert f'href="/dags/{TRAIN}/required_actions"' in text
    assert text.count('<path class="mark bad"') == 3  # in the legend, the wide chart and the narrow one
    assert "v1</text>" in text and "v3</text>" in text


def test_the_model_tab_says_what_trainings_cost(house: House) -> None:
    text, data = house.get(MODEL).text, house.get(f"/orrery/api/dags/{TRAIN}/model").json()
    rows = data["costs"]  # the newest first: the one that waits, the one that was kept, versions 3, 2 and 1
    assert sorted(v for c in rows for v in c["versions"]) == ["1", "2", "3", "4"]
    second, third = (next(c for c in rows if v in c["versions"]) for v in "23")
    assert second["attempts"] == 4 and second["causes"] == {"interrupted": 3}
    assert second["steps"] == {"kept": 4 * 2900, "done": 4 * 2900 + 300}
    assert 0.8 < second["goodput"] < 0.95 and second["seconds"]["lost"] == pytest.approx(3 * (0.39 * 100 + 13))
    assert second["saved"] > second["cost"]  # a third of the price, little lost
    assert third["classes"] == ["gpu-small", "gpu-large"] and 0 < third["saved"] < second["saved"]
    first = next(c for c in rows if "1" in c["versions"])
    assert (first["cost"], first["unpriced"], first["saved"]) == (None, 1, None)
    assert "4 (3 interrupted)" in text and f"{100 * second['goodput']:.1f} %" in text
    assert text.count('class="bar"') == len(rows) == 5 and text.count('class="part lost"') == 1 + 2


def test_the_ledger_is_paged_to_its_end_and_each_entry_comes_once(house: House) -> None:
    seen: list[int] = []
    before = None
    while True:
        data = house.get(f"/orrery/api/dags/{TRAIN}/model", params={"before": before} if before else {}).json()[
            "ledger"
        ]
        seen += [e["id"] for e in data["entries"]]
        before = data["older"]
        if before is None:
            break
    assert len(seen) == len(set(seen)) == data["total"]
    assert seen == sorted(seen, reverse=True)
    for bad in ("x", "-1", "0", "9" * 40, "1;drop", "1'"):
        assert house.get(MODEL, params={"before": bad}).status_code == 422


@pytest.mark.parametrize(
    ("run", "word", "title", "live"),
    [
        ("promoted", "promoted", "version 1 is champion", False),
        ("kept", "kept", "the champion stays", False),
        ("asking", "waiting for approval", "the gate says promote; a person is asked", True),
        ("monitored", "watch", "worse than promised, not yet for long enough to act", False),
        ("failed", "failed", "validate 2013-12 failed", False),
        ("going", "running", "ingest of 2014-01", True),
    ],
)
def test_the_verdict_comes_first(house: House, run: str, word: str, title: str, live: bool) -> None:
    data, text = house.get(page("api", run)).json(), house.get(page("pages", run)).text
    assert (data["verdict"]["word"], data["verdict"]["title"], data["live"]) == (word, title, live)
    assert data["asked"]["by"] == "ada" and data["asked"]["why"] == f"why {run}"
    assert text.index(f"<h1>{word}") < text.index(">Steps<")
    assert ("data-live" in text) == live


def test_steps_are_in_order_with_outcome_seconds_and_evidence(house: House) -> None:
    data = house.get(page("api", "kept")).json()
    assert [s["verb"] for s in data["steps"]] == [
        *("request", "materialize", "materialize", "train", "evaluate", "gate", "approve", "register", "promote")
    ]
    evaluate = next(s for s in data["steps"] if s["verb"] == "evaluate")
    assert evaluate["seconds"] == 21.0
    shown = house.get(evaluate["links"]["Curves"])
    assert shown.status_code == 200 and "sandbox" in shown.headers["content-security-policy"]
    assert data["requests"][0]["source"] == "each"
    failed = house.get(page("api", "failed")).json()
    assert [s["outcome"] for s in failed["steps"]] == ["new", "failed: someone must act", "upstream failed"]


def test_evidence_that_is_not_there_yet_looks_again_until_the_attempt_has_ended(house: House) -> None:
    from orrery.orchestration.links import expected

    going, going_run = attempt("going", "validate"), RUNS["going"][1]
    url = expected("model", "validate", f"{PROJECT}.ingest", going_run, going)["link_data_docs"]
    answer = house.get(url)
    assert answer.status_code == 202 and "Data Docs: not there yet" in answer.text
    assert re.search(r'http-equiv="refresh" content="\d+"', answer.text)
    assert answer.headers["retry-after"]
    # This attempt failed and left none: nothing is promised.
    ended = house.get(
        expected("model", "validate", f"{PROJECT}.ingest", "x", attempt("failed", "validate"))["link_data_docs"]
    )
    assert ended.status_code == 404 and "4 checks fail" in ended.text and "refresh" not in ended.text
    nothing = house.get(f"/orrery/evidence/{TRAIN}/{attempt('kept', 'train', 7)}/evidence/x.html")
    assert nothing.status_code == 404 and "no such attempt" in nothing.text


def test_a_version_is_found_by_the_attempt_that_registered_it(house: House, mlflow_port: int) -> None:
    version = house.get(f"/orrery/mlflow/{TRAIN}/version/{attempt('promoted', 'register')}")
    assert version.status_code == 303
    assert version.headers["location"] == f"http://127.0.0.1:{mlflow_port}/#/models/{PROJECT}/versions/1"


def test_a_training_is_found_in_mlflow_by_its_attempt(house: House, mlflow: Mlflow) -> None:
    url = f"/orrery/mlflow/{TRAIN}/run/"
    # No experiment, and then no run: the attempt has ended (its ledger says so), so nothing is promised.
    assert house.get(url + attempt("kept", "train")).status_code == 404
    assert mlflow.find_experiment(PROJECT) is None  # looking makes nothing
    run = mlflow.create_run(mlflow.experiment(PROJECT), "x", {"orrery.attempt": attempt("kept", "train")}, 1)
    found = house.get(url + attempt("kept", "train"))
    assert found.status_code == 303 and found.headers["location"] == mlflow.run_page(run)
    # An attempt that is at work and has none yet.
    begun = house.home / "store" / attempt("asking", "train", 2)
    begun.mkdir(parents=True)
    (begun / "config.json").write_text("{}")
    assert "not there yet" in house.get(url + attempt("asking", "train", 2)).text


def test_an_mlflow_that_is_away_is_said_so(house: House) -> None:
    away = house.get(f"/orrery/mlflow/{TRAIN}/run/{attempt('kept', 'train')}")
    assert away.status_code == 503 and "cannot be reached" in away.text and away.headers["retry-after"]


# -- attacks ------------------------------------------------------------------------------------------

HOSTILE = (
    "..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%252e%252e", "a/../../b", "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>",
    "' OR 1=1 --", "'; DROP TABLE orrery_ledger; --", "%00", "a\u202eb", "\u2028", "ﬂight_delay.train", "~", "*", "{{71*73}}", "${71*73}",
    "x" * 4000, "flight_delay.train\n", "flight_delay.train%0d%0aSet-Cookie:%20a=b", "%ff%fe", "\\..\\..",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_reaches_no_path_no_query_and_no_page(house: House, name: str) -> None:
    raw = name if "%" in name else quote(name, safe="")
    folder = attempt("kept", "evaluate")
    for path in (
        f"/orrery/pages/dags/{raw}/model",
        f"/orrery/api/dags/{raw}/model",
        f"/orrery/pages/dags/{TRAIN}/runs/{raw}/verdict",
        f"/orrery/api/dags/{TRAIN}/runs/{raw}/verdict",
        f"/orrery/evidence/{TRAIN}/{raw}",
        f"/orrery/evidence/{TRAIN}/{folder}/evidence/{raw}",
        f"/orrery/evidence/{TRAIN}/{folder}/evidence/{raw}/{raw}",
        f"/orrery/evidence/{TRAIN}/{PROJECT}/runs/{raw}/x/1/evidence/x",
        f"/orrery/evidence/{raw}/{folder}/evidence/curves.html",
        f"/orrery/mlflow/{TRAIN}/run/{raw}",
        f"/orrery/mlflow/{TRAIN}/run/{PROJECT}/runs/{raw}/train-x/1",
        f"/orrery/mlflow/{TRAIN}/version/{raw}",
        f"/orrery/static/{raw}",
    ):
        status, headers, text = house.raw(path)
        assert status == 404, (path, status, text[:300])
        assert "<script>alert" not in text and "<img" not in text and "5183" not in text
        assert "set-cookie" not in headers
        assert "Traceback" not in text and "root:" not in text
        assert house.raw(path, None)[0] in (401, 404)
    assert house.get(MODEL).status_code == 200  # it lives, and so does the ledger


def test_another_projects_evidence_is_out_of_reach(house: House) -> None:
    secret = house.home / "store" / "other" / "runs" / "r" / "t" / "1" / "evidence"
    secret.mkdir(parents=True, exist_ok=True)
    (secret / "x.html").write_text("secret")
    for path in ("other/runs/r/t/1/evidence/x.html", f"{PROJECT}/runs/../../other/runs/r/t/1/evidence/x.html"):
        assert house.get(f"/orrery/evidence/{TRAIN}/{quote(path, safe='')}").status_code == 404


class Tags(HTMLParser):
    """The tags, the attributes that could run something, and the addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.bad: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            address = name in ("href", "src", "action", "data-rollback")
            outside = address and re.match(r"\s*(javascript|data|vbscript):", value or "", re.IGNORECASE)
            elsewhere = (
                tag in ("script", "link", "img", "iframe")
                and address
                and not (value or "").startswith("/orrery/static/")
            )
            if name.startswith("on") or name == "style" or outside or elsewhere:
                self.bad.append(f"{tag} {name}={value}")


def test_hostile_texts_of_the_ledger_are_shown_as_texts(tmp_path: Path) -> None:
    """Whatever a project, a person or a step wrote: actor, reason, version, partition, verdict, metric, link, error."""
    from orrery import alerts, requests
    from orrery.ledger import Ledger
    from orrery.orchestration.web import model, pages, verdict

    book = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    payload: dict[str, Any] = {
        "verb": EVIL, "key": EVIL, "attempt": EVIL, "status": "done", "verdict": EVIL, "skipped": EVIL, "error": EVIL,
        "seconds": {"total": 1.0}, "metrics": {EVIL: 1.0}, "reasons": [EVIL, EVIL], "facts": {"model_version": EVIL, "primary": EVIL},
        "links": {"Data Docs": "javascript:alert(1)", "Curves": EVIL, "MLflow run": f"http://x/{EVIL}"}, "version": EVIL,
    }  # fmt: skip
    book.record(PROJECT, "run", f"{PROJECT}/runs/r/{EVIL}/1", "done", EVIL, payload)
    book.record(PROJECT, "run", f"{PROJECT}/runs/r/register/1", "done", EVIL, {**payload, "verb": "register"})
    observed = {"observed": 0.7, "observed_low": 0.6, "observed_high": 0.8, "promised": 0.7}
    book.record(PROJECT, "decision", f"r/{EVIL}", "done", EVIL, {**payload, "verb": "monitor", "metrics": observed})
    change = {"from": EVIL, "version": EVIL, "model": EVIL, "reason": EVIL, "window": EVIL}
    for number in range(2):
        for phase in ("intent", "done"):
            book.record(PROJECT, "promotion", f"r{number}{EVIL}", phase, EVIL, {**change, "version": f"{number}{EVIL}"})
    book.record(PROJECT, "promotion", f"r2{EVIL}", "intent", EVIL, {**change, "version": f"2{EVIL}"})
    until = {
        "window": EVIL,
        "approvers": [EVIL],
        "until": "2999-01-01T00:00:00+00:00",
        "otherwise": EVIL,
        "verdict": EVIL,
    }
    book.record(PROJECT, "approval", f"r/{EVIL}", "intent", EVIL, until)
    requests.submit(book, PROJECT, window=EVIL, source="ui", by=EVIL, why=EVIL, id=EVIL)
    alert = alerts.Alert("late", EVIL, PROJECT, EVIL, "critical", EVIL, "https://x/" + EVIL)
    alerts.settle(book, PROJECT, [alert], (EVIL,), [])
    training = {"verb": "train", "key": EVIL, "status": EVIL, "folder": f"{PROJECT}/runs/r{EVIL}/train/1"}
    training |= {"attempt": web_house.spent("2", 1, 1) | {"compute": EVIL, "placed": EVIL}}
    book.record(PROJECT, "run", f"t{EVIL}", "done", EVIL, training)
    book.record(PROJECT, "run", f"g{EVIL}", "done", EVIL, {"verb": "register", "version": EVIL, "model": EVIL})
    seen = SimpleNamespace(owner=EVIL)
    found = model.read(book, PROJECT, {"r": (EVIL, EVIL)})
    text = bytes(pages.render("model.html", seen=seen, rollback_dag=EVIL, may_roll_back=True, **found).body).decode()
    run = verdict.Run(PROJECT, TRAIN, EVIL, "r", "failed", *[EVIL] * 7, tasks=(verdict.Task(EVIL, EVIL),))  # type: ignore[arg-type]
    text += bytes(pages.render("verdict.html", seen=seen, **verdict.read(book, run)).body).decode()
    text += bytes(pages.render("message.html", 404, title=EVIL, text=EVIL).body).decode()
    tags = Tags(text)
    assert tags.bad == []
    assert "img" not in tags.tags and tags.tags.count("script") == 2 + 2 + 1
    assert text.count("&lt;script&gt;") > 40
    assert "5183" not in text
    json.dumps(found)


def test_the_policy_of_every_page_is_strict(house: House) -> None:
    for path in (
        MODEL,
        page("pages", "asking"),
        "/orrery/pages/dags/reports/model",
        "/orrery/pages/dags/nothing/model",
    ):
        answer = house.get(path)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
        assert Tags(answer.text).bad == []


# -- the plugin ---------------------------------------------------------------------------------------


def test_airflow_knows_the_tabs(house: House) -> None:
    found = house.get("/api/v2/plugins").json()["plugins"]
    ours = next(p for p in found if p["name"] == "orrery")
    assert {(v["name"], v["destination"], v["url_route"]) for v in ours["external_views"]} == {
        ("Model", "dag", "orrery-model"),
        ("Verdict", "dag_run", "orrery-verdict"),
    }
    for view in ours["external_views"]:
        assert house.get(view["icon"]).status_code == house.get(view["icon_dark_mode"]).status_code == 200


def test_five_thousand_entries_are_answered_within_300_ms(house: House) -> None:
    """A bar of the project, and far from it: a tenth of that on a quiet machine, so that a busy one passes too."""
    from orrery.ledger import Ledger

    book = Ledger(f"sqlite:///{house.home}/ledger.db")
    payload = {
        "verb": "materialize",
        "status": "done",
        "metrics": {"rows": 1.0},
        "reasons": ["as before"] * 6,
        "seconds": {"total": 1.0},
    }
    with book.engine.begin() as connection:
        from orrery.ledger import entries

        rows = [
            {
                "at": "2013-01-01T00:00:00.000+00:00", "project": PROJECT, "kind": "run", "key": f"{PROJECT}/runs/bulk/{i}/1",
                "phase": "done", "actor": "ada", "payload": json.dumps({**payload, "key": str(i)}),
            }
            for i in range(5000)
        ]  # fmt: skip
        connection.execute(entries.insert(), rows)
    for path in (MODEL, f"/orrery/api/dags/{TRAIN}/model", page("pages", "kept"), page("api", "kept")):
        house.get(path)
        took: list[float] = []
        while len(took) < 40 and min(took, default=1.0) >= 0.3:  # a busy second takes several in a row
            began = time.perf_counter()
            assert house.get(path).status_code == 200
            took.append(time.perf_counter() - began)
        assert min(took) < 0.3, (path, took)
