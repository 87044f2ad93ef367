"""Spark on Kubernetes: what the driver makes of what its pod is told, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orrery.errors import SpecError, UserError
from orrery.scoring import executors
from orrery.scoring.session import spark_settings

MASTER = "k8s://https://kubernetes.default.svc"
DOCUMENT = {"spec": {"containers": [{"name": "executor", "image": "orrery/spark:1", "imagePullPolicy": "Always"}]}}
TOLD = {
    "ORRERY_POD_IP": "10.1.2.3",
    "ORRERY_POD_NAME": "delays-score-0123456789ab-1",
    "ORRERY_POD_NAMESPACE": "orrery",
    "ORRERY_EXECUTOR": json.dumps(DOCUMENT),
}


def test_a_pod_needs_nothing_but_a_master_and_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    made = spark_settings(MASTER, {"spark.executor.instances": "8"}, tmp_path)
    assert made["spark.master"] == MASTER
    assert made["spark.executor.instances"] == "8"
    assert (made["spark.driver.host"], made["spark.driver.bindAddress"]) == ("10.1.2.3", "10.1.2.3")
    assert made["spark.kubernetes.namespace"] == "orrery"
    assert made["spark.kubernetes.driver.pod.name"] == TOLD["ORRERY_POD_NAME"]
    assert made["spark.kubernetes.container.image"] == "orrery/spark:1"
    assert made["spark.kubernetes.container.image.pullPolicy"] == "Always"
    assert json.loads(Path(made["spark.kubernetes.executor.podTemplateFile"]).read_text()) == DOCUMENT
    assert made["spark.kubernetes.executor.disableConfigMap"] == "true"


def test_what_platform_yaml_says_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    conf = {"spark.kubernetes.container.image": "other/spark:2", "spark.driver.port": "0"}
    made = spark_settings(MASTER, conf, tmp_path)
    assert {k: made[k] for k in conf} == conf


@pytest.mark.parametrize("lost", sorted(TOLD))
def test_a_driver_that_executors_could_not_reach_is_refused(tmp_path: Path, lost: str) -> None:
    told = {k: v for k, v in TOLD.items() if k != lost}
    with pytest.raises(UserError, match=f"is no pod that executors could reach \\({lost} is not set\\)") as e:
        executors.settings(MASTER, {}, tmp_path, told)
    assert "ORRERY_PROFILE=kubernetes" in e.value.hint


def test_a_driver_elsewhere_says_all_of_it_by_hand(tmp_path: Path) -> None:
    conf = dict.fromkeys(executors.BY_HAND, "x")
    assert executors.settings(MASTER, conf, tmp_path, {}) == {}
    for left_out in executors.BY_HAND:
        with pytest.raises(UserError) as e:
            executors.settings(MASTER, {k: v for k, v in conf.items() if k != left_out}, tmp_path, {})
        assert e.value.hint.endswith(left_out)


@pytest.mark.parametrize("master", ["k8s://", "k8s://kubernetes.default.svc", "k8s://https://", "k8s://ftp://x"])
def test_a_master_that_names_no_server_is_refused(tmp_path: Path, master: str) -> None:
    with pytest.raises(SpecError, match="names no API server"):
        executors.settings(master, {}, tmp_path, TOLD)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"spec": {"containers": []}}', '{"spec": {"containers": [{}]}}'])
def test_a_document_without_a_container_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="is no pod document with a container"):
        executors.settings(MASTER, {}, tmp_path, {**TOLD, "ORRERY_EXECUTOR": text})


def test_other_masters_are_left_alone(tmp_path: Path) -> None:
    assert not any(k.startswith("spark.kubernetes") for k in spark_settings("local[2]", {}, tmp_path))
    assert not any(k.startswith("spark.kubernetes") for k in spark_settings("spark://host:7077", {}, tmp_path))
