"""A training's run in MLflow: what is in it, once per attempt, and never in the way."""

import json
import socket
import threading
import time

import pytest

from orrery.errors import Interrupted, TryAgain, UserError
from orrery.registry import client, tracking
from orrery.registry.client import Mlflow

PARAMS = {"dim": 16, "layers": [8, 4]}
HISTORY = [{"loss": 0.6, "valid_auc": 0.61}, {"loss": 0.5, "valid_auc": float("nan")}]


def logged(server: Mlflow, number: str) -> dict[str, object]:
    return server.call("GET", "runs/get", run_id=number)["run"]


@pytest.mark.slow
def test_a_run_says_what_it_was_made_from(release, server: Mlflow) -> None:
    work = release.house.work("train", {"features": [release.features]}, address="c1")
    number = tracking.log_training(work, PARAMS, HISTORY, {"valid_auc": 0.62})
    assert number is not None
    run = logged(server, number)
    assert run["info"]["status"] == "FINISHED"
    assert {p["key"]: p["value"] for p in run["data"]["params"]} == {"dim": "16", "layers": "[8, 4]"}
    assert {m["key"]: m["value"] for m in run["data"]["metrics"]} == {"loss": 0.5, "valid_auc": 0.62}
    losses = server.call("GET", "metrics/get-history", run_id=number, metric_key="loss")["metrics"]
    assert [(m["step"], m["value"]) for m in losses] == [(0, 0.6), (1, 0.5)]
    tags = {t["key"]: t["value"] for t in run["data"]["tags"]}
    assert json.loads(tags["orrery.data"])["manifests"][0]["digest"] == release.features.digest
    assert tags["orrery.window"] == work.config.key
    assert tags["orrery.bundle"] == release.house.bundle
    assert {"orrery.project", "orrery.code", "orrery.environment", "orrery.run", "orrery.attempt"} <= tags.keys()
    assert tracking.url(number) == f"{server.address}/#/experiments/{run['info']['experiment_id']}/runs/{number}"


@pytest.mark.slow
def test_the_same_attempt_completes_its_run_and_another_one_has_its_own(release, server: Mlflow) -> None:
    work = release.house.work("train", {"features": [release.features]}, address="c1")
    first = tracking.log_training(work, PARAMS, HISTORY[:1], {})
    assert tracking.log_training(work, PARAMS, HISTORY, {}) == first
    losses = server.call("GET", "metrics/get-history", run_id=first, metric_key="loss")["metrics"]
    assert [m["step"] for m in losses] == [0, 1]
    other = release.house.work("train", {"features": [release.features]}, address="c1")
    assert tracking.log_training(other, PARAMS, HISTORY, {}) != first


@pytest.mark.slow
def test_a_long_history_and_many_params_fit_the_servers_limits(release, server: Mlflow) -> None:
    work = release.house.work("train", {"features": [release.features]}, address="c1")
    params = {f"p{i}": "x" * 9000 if i == 0 else i for i in range(150)}
    number = tracking.log_training(work, params, [{"loss": 1 / (i + 1)} for i in range(1500)], {})
    assert number is not None
    assert len(logged(server, number)["data"]["params"]) == 150


@pytest.mark.slow
def test_the_version_is_made_from_the_trainings_run(release, server: Mlflow) -> None:
    work = release.house.work("train", {"features": [release.features]}, address="c1")
    number = tracking.log_training(work, PARAMS, HISTORY, {})
    release.register(release.candidate())
    assert server.versions(release.house.project)[0].run == number


@pytest.mark.slow
def test_a_run_is_there_from_the_start_and_its_curve_grows(release, server: Mlflow) -> None:
    work = release.house.work("train", {"features": [release.features]}, address="c1")
    with tracking.begun(work) as run:
        assert run is not None
        assert logged(server, run.id)["info"]["status"] == "RUNNING"
        live = tracking.Live(run)
        live.epoch(0, {"loss": 0.6, "valid_auc": float("nan")})
        live.epoch(1, {"loss": 0.5})
        live.end()
        metrics = server.call("GET", "metrics/get-history", run_id=run.id, metric_key="loss")["metrics"]
        assert [(m["step"], m["value"]) for m in metrics] == [(0, 0.6), (1, 0.5)]
        assert tracking.log_training(work, PARAMS, [{"loss": 0.6}, {"loss": 0.5}, {"loss": 0.4}], {}) == run.id
    metrics = server.call("GET", "metrics/get-history", run_id=run.id, metric_key="loss")["metrics"]
    assert [m["step"] for m in metrics] == [0, 1, 2]  # each point once
    assert logged(server, run.id)["info"]["status"] == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), [(ValueError("x"), "FAILED"), (Interrupted("x"), "KILLED")])
def test_a_training_that_fails_leaves_no_running_run(release, server: Mlflow, error: Exception, status: str) -> None:
    work = release.house.work("train", {"features": [release.features]}, address="c1")
    with pytest.raises(type(error)), tracking.begun(work) as run:
        raise error
    assert logged(server, run.id)["info"]["status"] == status


def test_a_server_that_is_down_does_not_hold_up_an_epoch(release, no_server: str) -> None:
    work = release.house.work("train", {"features": [release.features]})
    with tracking.begun(work) as run:
        assert run is None
    live = tracking.Live(client.Run("abc", "1", "", 0))
    began = time.monotonic()
    for step in range(100):
        live.epoch(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    live.end()


def test_no_address_is_no_run(release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    work = release.house.work("train", {"features": [release.features]})
    assert tracking.log_training(work, {}, [], {}) is None


def test_a_server_that_is_down_is_a_warning(release, no_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    work = release.house.work("train", {"features": [release.features]})
    assert tracking.log_training(work, {}, [], {}) is None
    assert f"the training is not in MLflow: MLflow at {no_server} cannot be reached" in capsys.readouterr().out


def test_a_hundred_partitions_are_named_as_far_as_a_tag_holds_them(release) -> None:
    text = tracking.lineage("p", "w", {}, "b", [release.features] * 100)["orrery.data"]
    found = json.loads(text)
    assert len(text) <= tracking.MAX_TAG
    assert found["count"] == 100
    assert 0 < len(found["manifests"]) < 100


def test_something_else_that_listens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UserError, match=r"is no MLflow server: it answered 'hello'"):
            Mlflow(address).experiment("x")
        thread.join()


def test_a_server_that_never_answers_is_given_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Mlflow(f"http://127.0.0.1:{listener.getsockname()[1]}", answer_s=0.2)
        with pytest.raises(TryAgain, match="timed out"):
            server.experiment("x")


def test_a_password_in_the_address_is_sent_and_never_shown() -> None:
    server = Mlflow("http://ann:s%40cret@127.0.0.1:1/base/")
    assert server.address == "http://127.0.0.1:1/base"
    assert server._credentials() == {"Authorization": "Basic YW5uOnNAY3JldA=="}
    with pytest.raises(TryAgain) as e:
        server.experiment("x")
    assert "cret" not in str(e.value)


@pytest.mark.parametrize("uri", ["sqlite:///x.db", "mlruns", "http://"])
def test_an_address_that_is_no_server_ends_64(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="is not one of a server"):
        client.needed()


def test_artifacts_that_the_server_does_not_serve_go_where_they_lie(tmp_path) -> None:
    server = Mlflow("http://127.0.0.1:1")
    server.put_file(f"file://{tmp_path}/1/run/artifacts/model/MLmodel", b"x")
    assert server.get_file(f"file://{tmp_path}/1/run/artifacts/model/MLmodel") == b"x"
    with pytest.raises(UserError, match="is gone"):
        server.get_file(f"file://{tmp_path}/nothing")


@pytest.mark.slow
def test_the_trials_of_a_search_are_runs_within_its_run(release, server: Mlflow) -> None:
    search = tracking.Search("0" * 32, "tune 2013-01..2013-03")
    numbers = []
    for trial in range(2):
        work = release.house.work("train", {"features": [release.features]}, address=f"t{trial}")
        with tracking.begun(work, within=search, name=f"trial {trial}") as run:
            assert run is not None
            ended = tracking.log_training(work, PARAMS, HISTORY, {"auc": 0.7}, search, f"trial {trial}")
            assert ended == run.id
        numbers.append(run.id)
    whole = tracking.log_search(work, search, {"trial": 1}, {"auc": 0.71})
    assert whole is not None and tracking.log_search(work, search, {"trial": 1}, {"auc": 0.71}) == whole
    parent = logged(server, whole)
    assert parent["info"]["run_name"] == search.name and parent["info"]["status"] == "FINISHED"
    for trial, number in enumerate(numbers):
        run = logged(server, number)
        tags = {t["key"]: t["value"] for t in run["data"]["tags"]}
        assert run["info"]["run_name"] == f"trial {trial}"
        assert tags["mlflow.parentRunId"] == whole and tags["orrery.search"] == search.key


@pytest.mark.slow
def test_two_trials_that_begin_at_once_find_one_search(release, server: Mlflow) -> None:
    search = tracking.Search("1" * 32, "tune x")
    works = [release.house.work("train", {"features": [release.features]}, address=f"s{i}") for i in range(4)]
    threads = [threading.Thread(target=tracking.attempt_run, args=(server, work, search)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    experiment = server.experiment(release.house.project)
    found = server.call(
        "POST", "runs/search", experiment_ids=[experiment], filter=f"tags.`orrery.study` = '{'1' * 32}'"
    )
    (whole,) = found["runs"]
    trials = server.call(
        "POST", "runs/search", experiment_ids=[experiment], filter=f"tags.`orrery.search` = '{'1' * 32}'"
    )
    parents = [{t["key"]: t["value"] for t in r["data"]["tags"]}["mlflow.parentRunId"] for r in trials["runs"]]
    assert parents == [whole["info"]["run_id"]] * 4
