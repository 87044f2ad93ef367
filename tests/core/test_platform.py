"""platform.yaml and the variables over it."""

from __future__ import annotations

from pathlib import Path

import pytest
from core_house import PLATFORM, House

from orrery import platform
from orrery.errors import SpecError, UserError


def write(house: House, text: str) -> None:
    (house.home / "include" / "platform.yaml").write_text(text)


def test_variables_win_over_the_file_and_placeholders_are_filled(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    write(house, PLATFORM + "data: file://${root}/there\nmlflow: http://127.0.0.1:${mlflow_port}\n")
    monkeypatch.delenv("ORRERY_DATA")
    monkeypatch.setenv("ORRERY_MLFLOW_PORT", "5599")
    monkeypatch.setenv("ORRERY_STAGE", "prod")
    loaded = platform.load()
    assert loaded.data == f"file://{house.home}/there"
    assert loaded.mlflow == "http://127.0.0.1:5599"
    assert loaded.stage == "prod"
    monkeypatch.setenv("ORRERY_DATA", "s3://elsewhere/x")
    assert platform.load().data == "s3://elsewhere/x"


def test_another_shell_finds_the_mlflow_that_runs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started with a port of its own; the next shell knows nothing of it, and 5500 may be somebody else's."""
    write(house, PLATFORM + "mlflow: http://127.0.0.1:${mlflow_port}\n")
    for name in ("ORRERY_MLFLOW", "ORRERY_MLFLOW_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert platform.load().mlflow == "http://127.0.0.1:5500"
    (house.home / "var" / "run").mkdir(parents=True)
    (house.home / "var" / "run" / "mlflow.json").write_text('{"pid": 1, "port": 15500}')
    assert platform.load().mlflow == "http://127.0.0.1:15500"
    monkeypatch.setenv("ORRERY_MLFLOW_PORT", "5599")
    assert platform.load().mlflow == "http://127.0.0.1:5599"


def test_relative_places_mean_the_same_from_every_folder(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command line runs where a person is, a step in the home."""
    places = {"STORE": "var/x", "DATA": "file://up", "LEDGER": "sqlite:///var/l.db", "FEAST": "var/f"}
    for name, value in places.items():
        monkeypatch.setenv(f"ORRERY_{name}", value)
    monkeypatch.chdir(tmp_path)
    loaded = platform.load()
    assert loaded.store == f"file://{house.home}/var/x"
    assert loaded.data == f"file://{house.home}/up"
    assert loaded.ledger == f"sqlite:///{house.home}/var/l.db"
    assert loaded.feast.registry == f"{house.home}/var/f"


@pytest.mark.parametrize("variable", ["ORRERY_STORE", "ORRERY_DATA"])
def test_a_password_in_an_address_is_refused(house: House, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "s3://key:hunter2@bucket/x")
    with pytest.raises(SpecError, match=f"{variable}: a password must not stand in it.*\n.*AWS_SECRET_ACCESS_KEY") as e:
        platform.load()
    assert "hunter2" not in str(e.value)
    monkeypatch.delenv(variable)
    field = variable.removeprefix("ORRERY_").lower()
    write(house, PLATFORM + f"{field}: s3://key:hunter2@bucket/x\n")
    with pytest.raises(SpecError, match=f"platform.yaml: {field}: a password") as e:
        platform.load()
    assert "hunter2" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (PLATFORM + "stroe: file:///x\n", [":6: stroe: no such field", "did you mean 'store'?"]),
        (PLATFORM + "data: ${rot}/x\n", ["data: ${rot} is unknown", "did you mean 'root'?"]),
        (PLATFORM.replace("airflow:1", "airflow:latest"), [":3: environments.airflow.image", "not :latest"]),
        (PLATFORM.replace("airflow:1", "airflow"), ["a tag or a digest"]),
        (PLATFORM.replace('cpu: "1"', 'cpu: "1", image: "x/y:latest"'), ["compute.cpu-small.image", "not :latest"]),
        (PLATFORM.replace('cpu: "1"', 'cpu: "lots"'), [":5: compute.cpu-small.cpu", "'lots'"]),
        (
            PLATFORM.replace('cpu: "1"', "tolerations: [{key: spot, operator: Exists, tolerationSeconds: 60}]"),
            [":5: compute.cpu-small.tolerations.0", "`tolerationSeconds` needs `effect: NoExecute`"],
        ),
        (PLATFORM.replace('cpu: "1"', "price_per_hour: -1"), ["compute.cpu-small.price_per_hour", "-1"]),
    ],
)
def test_mistakes(house: House, monkeypatch: pytest.MonkeyPatch, text: str, parts: list[str]) -> None:
    monkeypatch.delenv("ORRERY_DATA")
    write(house, text)
    with pytest.raises(SpecError) as e:
        platform.load()
    for part in parts:
        assert part in str(e.value)


def test_no_file_and_no_home(house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORRERY_PLATFORM", str(tmp_path / "none.yaml"))
    with pytest.raises(SpecError, match="ORRERY_PLATFORM"):
        platform.load()
    monkeypatch.setenv("ORRERY_PLATFORM", str(house.folder / "spec.yaml" / "x"))
    with pytest.raises(SpecError, match="ORRERY_PLATFORM"):
        platform.load()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../delays", "delays/", "delays\n", "Delays", "dеlays", "a" * 9000, "$x"]
)
def test_hostile_project_names(house: House, name: str) -> None:
    with pytest.raises(SpecError, match="there is no project") as e:
        platform.project_folder(name)
    assert len(str(e.value)) < 2000


def test_the_nearest_project_is_named(house: House) -> None:
    with pytest.raises(SpecError, match="did you mean 'delays'"):
        platform.project_folder("delay")
    assert platform.project_folder("delays") == house.folder


def test_unknown_profile_and_compute_class(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_PROFILE", "locl")
    with pytest.raises(UserError, match="did you mean 'local'"):
        platform.profile()
    with pytest.raises(SpecError, match="did you mean 'cpu-small'"):
        platform.load().compute_class("cpu-smal")
