"""register, promote and rollback against a real server: desired states, reached from wherever a kill left them."""

import json
import subprocess
import sys

import pytest
from planted import linear, rows

from orrery.errors import DataError, RequestError, TryAgain, UserError
from orrery.registry import client, promote, register
from orrery.registry.client import Mlflow

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


def test_a_candidate_is_registered_once_with_what_it_was_made_from(release, server: Mlflow) -> None:
    inputs, project = release.measured(), release.house.project
    first, again = release.register(inputs), release.register(inputs)
    assert first.facts == again.facts == {"model_version": "1"}
    assert first.links["MLflow model"] == f"{server.address}/#/models/{project}/versions/1"
    (version,) = server.versions(project)
    assert version.tags["orrery.address"] == "c1"
    assert version.tags["orrery.manifest"] == inputs["candidate"][0].path
    assert version.tags["orrery.registered_by"] == "ann"
    assert float(version.tags["auc"]) == pytest.approx(inputs["evaluation"][0].result["metrics"]["auc"], abs=1e-4)
    assert server.alias(project, "challenger") == 1
    assert server.alias(project, "champion") is None
    assert "rows as evaluated" in release.promote(inputs, "1").reasons[0]
    held = json.loads(server.get_file(f"{version.source}/report.json"))
    assert held["task"] == "binary"


def test_mlflow_itself_loads_the_version_by_its_alias(release, server: Mlflow) -> None:
    release.register(release.candidate())
    code = f"""
import mlflow.onnx, mlflow.pyfunc, numpy as np
graph = mlflow.onnx.load_model("models:/{release.house.project}/1")
model = mlflow.pyfunc.load_model("models:/{release.house.project}@challenger")
rows = {{"numeric": np.ones((2, 2), np.float32), "categorical": np.zeros((2, 1), np.int64)}}
names = sorted(model.metadata.signature.inputs.input_names())
print(graph.graph.name, model.predict(rows)["prediction"].tolist(), names)
"""
    env = {"MLFLOW_TRACKING_URI": server.address, "PATH": "/usr/bin:/bin", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    name, rest = done.stdout.strip().split(" ", 1)
    assert name == "linear"
    assert rest.startswith("[0.8807970")  # sigmoid(2)
    assert rest.endswith("['categorical', 'numeric']")


def test_promoted_twice_is_promoted_once(release, server: Mlflow) -> None:
    inputs, project = release.candidate(), release.house.project
    release.register(inputs)
    for _ in range(2):
        result = release.promote(inputs, "1")
        assert result.facts == {"model_version": "1", "previous": None}
        assert server.alias(project, "champion") == 1
        assert server.alias(project, "challenger") is None
    tags = server.versions(project)[0].tags
    assert (tags["orrery.promoted_by"], tags["orrery.promoted_why"]) == ("ann", "drift")


def test_registering_the_champion_again_does_not_make_it_a_challenger(release, server: Mlflow) -> None:
    inputs = release.candidate()
    release.register(inputs)
    release.promote(inputs, "1")
    release.register(inputs)
    assert server.alias(release.house.project, "challenger") is None


def test_a_late_attempt_of_an_older_release_leaves_the_newer_challenger(release, server: Mlflow) -> None:
    older, newer = release.candidate("c1"), release.candidate("c2", b=1.1)
    release.register(older)
    assert release.register(newer).facts == {"model_version": "2"}
    release.register(older)
    assert server.alias(release.house.project, "challenger") == 2


@pytest.mark.parametrize("at", ["put_file", "create_version", "set_alias"])
def test_killed_before_each_write_the_next_attempt_finishes(
    release, server: Mlflow, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def kill(*args: object, **kwargs: object) -> None:
        raise Killed

    inputs = release.candidate()
    with monkeypatch.context() as patch:
        patch.setattr(Mlflow, at, kill)
        with pytest.raises(Killed):
            release.register(inputs)
    assert release.register(inputs).facts == {"model_version": "1"}
    assert [v.number for v in server.versions(release.house.project)] == [1]
    assert server.alias(release.house.project, "challenger") == 1


def test_two_attempts_at_once_agree_on_one_version(release, server: Mlflow, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, real = release.candidate(), Mlflow.create_version

    def overtaken(self: Mlflow, *args: object, **kwargs: object) -> client.Version:
        with monkeypatch.context() as patch:
            patch.setattr(Mlflow, "create_version", real)
            assert release.register(inputs).facts == {"model_version": "1"}
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Mlflow, "create_version", overtaken)
    assert release.register(inputs).facts == {"model_version": "1"}
    assert [v.number for v in server.versions(release.house.project)] == [1]


def test_killed_between_tags_and_alias_the_next_attempt_promotes(
    release, server: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: object) -> None:
        raise Killed

    inputs = release.candidate()
    release.register(inputs)
    with monkeypatch.context() as patch:
        patch.setattr(Mlflow, "set_alias", kill)
        with pytest.raises(Killed):
            release.promote(inputs, "1")
    assert server.alias(release.house.project, "champion") is None
    release.promote(inputs, "1")
    assert server.alias(release.house.project, "champion") == 1


def test_a_version_whose_file_was_changed_is_not_promoted(release, server: Mlflow) -> None:
    inputs, project = release.candidate(), release.house.project
    release.register(inputs)
    (version,) = server.versions(project)
    other, _ = linear({"a": 1.0, "b": 1.001}, categories=["c"])
    server.put_file(f"{version.source}/model.onnx", other)
    with pytest.raises(UserError, match="is not the model that was evaluated: 64 rows differ"):
        release.promote(inputs, "1")
    assert server.alias(project, "champion") is None


def test_another_candidates_version_is_not_promoted(release, server: Mlflow) -> None:
    one, two = release.candidate("c1"), release.candidate("c2", b=1.1)
    release.register(one)
    release.register(two)
    with pytest.raises(UserError, match=r"version 2 .* was made from .*/c2/.*, not from .*/c1/.*"):
        release.promote(one, "2")


@pytest.mark.parametrize("version", ["3", "latest", "0"])
def test_an_unknown_version_ends_64_and_says_which_there_are(release, server: Mlflow, version: str) -> None:
    inputs = release.candidate()
    release.register(inputs)
    with pytest.raises(UserError, match=rf"has no version '{version}' .* there are: 1"):
        release.promote(inputs, version)


def test_a_kept_verdict_is_neither_registered_nor_promoted(release, server: Mlflow) -> None:
    inputs = release.candidate(verdict="kept")
    for effect in (lambda: release.register(inputs), lambda: release.promote(inputs, "1")):
        with pytest.raises(RequestError, match="the gate kept the champion"):
            effect()
    assert server.versions(release.house.project) == []


def test_rollback_moves_the_alias_back_after_the_old_model_has_scored(release, server: Mlflow) -> None:
    one, two = release.candidate("c1"), release.candidate("c2", b=1.1)
    for number, inputs in (("1", one), ("2", two)):
        release.register(inputs)
        release.promote(inputs, number)
    params = {"version": "1", "previous": "2", "actor": "bob", "reason": "complaints"}
    inputs = {"model": one["candidate"], "features": [release.features]}
    for _ in range(2):
        result = release.house.run("rollback", inputs, params)
        assert "it scored 64 rows first" in result.reasons[0]
        assert server.alias(release.house.project, "champion") == 1
    assert server.versions(release.house.project)[0].tags["orrery.rolled_back_by"] == "bob"


def test_a_model_that_cannot_score_today_is_not_rolled_back_to(release, server: Mlflow) -> None:
    one, two = release.candidate("c1"), release.candidate("c2", b=1.1)
    for number, inputs in (("1", one), ("2", two)):
        release.register(inputs)
        release.promote(inputs, number)
    columns = rows(100)
    columns.pop("b")
    today = release.house.features(columns, "2013-02", "f2")
    with pytest.raises(DataError, match="the features lack b"):
        release.house.run("rollback", {"model": one["candidate"], "features": [today]}, {"version": "1"})
    assert server.alias(release.house.project, "champion") == 2


@pytest.mark.parametrize("verb", ["register", "promote", "rollback"])
def test_a_server_that_is_down_asks_for_another_attempt(release, no_server: str, verb: str) -> None:
    inputs = release.candidate()
    inputs |= {"model": inputs["candidate"], "features": [release.features]} if verb == "rollback" else {}
    with pytest.raises(TryAgain, match=f"MLflow at {no_server} cannot be reached") as e:
        release.house.run(verb, inputs, {} if verb == "register" else {"version": "1"})
    assert e.value.exit_code == 75
    assert "ORRERY_MLFLOW" in e.value.hint


def test_without_an_address_it_is_the_users_to_set(release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        release.register(release.candidate())


def test_an_address_that_is_none_is_told_without_its_password() -> None:
    with pytest.raises(UserError, match=r"MLflow's address 'mlflow://\*\*\*@host' is not one") as e:
        Mlflow("mlflow://me:hunter2@host")
    assert "hunter2" not in str(e.value)


def test_the_effects_import_no_mlflow() -> None:
    modules = ", ".join(m.__name__ for m in (promote, register)) + ", orrery.registry.tracking"
    code = f"import sys, {modules}; print({{'mlflow', 'requests', 'matplotlib', 'torch'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
