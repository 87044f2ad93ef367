"""Spark's executors as pods: what the operator tells the driver, and a true driver that starts true executors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from aiohttp import web
from cluster.api import Cluster
from cluster.objects import Refused

from orrery import platform
from orrery.cluster import names, spark, template
from orrery.scoring.executors import EXECUTOR, POD

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
SPARK = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs")) / "spark"
PLATFORM = """\
version: 1
environments:
  spark: {image: "orrery/spark:1"}
compute:
  driver:
    cpu: "1"
    memory: 2Gi
    storage: 5Gi
    service_account: orrery-spark
    node_selector: {disk: fast}
    priority_class: orrery-step
kubernetes: {connection: cluster, secret: keys, pull_secrets: [registry]}
spark: {master: "MASTER", conf: {spark.executor.instances: "2"}}
"""
CONFIG: Any = SimpleNamespace(
    store="s3://bucket/x", folder="delays/runs/r/score-2013-01/1", project="delays", verb="score", run="r", attempt=1,
    key="2013-01",
)  # fmt: skip
DRIVER = """
import json, os
from pathlib import Path
from orrery.scoring.session import with_spark

def where(i):
    return i * i, os.environ.get("SPARK_EXECUTOR_ID"), os.environ.get("KEY")

conf = json.loads(os.environ["CONF"])
try:
    got = with_spark(os.environ["MASTER"], conf, Path(os.environ["TMPDIR"]),
                     lambda s: s.sparkContext.parallelize(range(4), 4).map(where).collect(), lambda: None)
except Exception as e:
    print(json.dumps(getattr(e, "details", None), indent=1), flush=True)
    raise
print("GOT " + json.dumps(got), flush=True)
"""


def where(tmp_path: Path, master: str = "k8s://https://kubernetes.default.svc") -> platform.Platform:
    file = tmp_path / "platform.yaml"
    file.write_text(PLATFORM.replace("MASTER", master))
    return platform.load(file)


def document(at: platform.Platform) -> dict[str, Any]:
    place = at.compute_class("driver")
    return spark.executor(at, place, CONFIG, "delays-score-1", template.for_class(at, place, "score", "spark"))


def test_an_executor_is_made_as_its_driver_but_may_do_nothing(tmp_path: Path) -> None:
    made = document(where(tmp_path))
    spec, labels = made["spec"], made["metadata"]["labels"]
    (container,) = spec["containers"]
    assert spec["serviceAccountName"] == "orrery-step"
    assert spec["automountServiceAccountToken"] is False
    assert spec["nodeSelector"] == {"disk": "fast"}
    assert spec["priorityClassName"] == "orrery-step"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container["image"] == "orrery/spark:1"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert container["resources"]["limits"] == {"ephemeral-storage": "5Gi"}
    # Nobody may take it for an attempt.
    assert names.UNIT not in labels and names.SLOT not in labels
    assert (labels[names.DRIVER], labels[names.STEP]) == ("delays-score-1", "score")


def test_only_a_step_that_scores_by_a_cluster_is_told_of_executors(tmp_path: Path) -> None:
    at = where(tmp_path)
    assert spark.drives(at, "score")
    assert not spark.drives(at, "train")
    assert not spark.drives(where(tmp_path, "local[*]"), "score")
    place = at.compute_class("driver")
    told = spark.variables(at, place, CONFIG, "u", template.for_class(at, place, "score", "spark"))
    assert {v.name for v in told} == {*POD, EXECUTOR}
    assert {v.name: v.value_from.field_ref.field_path for v in told if v.value_from} == dict(POD)
    assert template.for_class(at, place, "score", "spark")["automount_service_account_token"] is True
    assert template.for_class(at, place, "train", "spark")["automount_service_account_token"] is False


class WithoutSockets(Cluster):
    """Spark's client asks for a watch over a websocket first, and over plain HTTP where a proxy says 503."""

    async def _watch(self, request: web.Request, *args: Any) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            raise Refused(503, "ServiceUnavailable", "no websockets here")
        return await super()._watch(request, *args)


@pytest.fixture
def venvs(tmp_path: Path) -> Path:
    """The image of Spark: its Python, and its own entry point with the paths of this machine."""
    if not (SPARK / "bin" / "python").exists():
        pytest.skip("the spark environment has not been made")
    folder, cache = tmp_path / "venvs" / "spark" / "bin", tmp_path / "cache"
    folder.mkdir(parents=True)
    found = subprocess.run(
        [SPARK / "bin" / "python", "-c", "import os; from orrery.scoring import java; print(java.find_home(os.environ))"],
        env={**os.environ, "ORRERY_CACHE": str(cache)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    entry = (ROOT / "docker" / "spark" / "entrypoint").read_text()
    entry = entry.replace("/opt/orrery/.venvs/spark", str(SPARK))
    entry = entry.replace("/opt/orrery/bin/named", str(ROOT / "docker" / "spark" / "named"))
    entry = re.sub(r"^java=.*$", f"java={found.stdout.strip()}/bin/java", entry, flags=re.MULTILINE)
    for name, text in (("python", f'#!/bin/sh\nexec {SPARK}/bin/python "$@"\n'), ("orrery", entry)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder.parents[1]


@pytest.fixture
def cluster(tmp_path: Path, venvs: Path) -> Iterator[Cluster]:
    given = {"ORRERY_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT / "include")}
    with WithoutSockets(tmp_path / "cluster", venvs=venvs, environment=given) as served:
        yield served


@pytest.mark.slow
def test_a_driver_scores_by_executors_with_the_rights_that_its_role_grants(tmp_path: Path, cluster: Cluster) -> None:
    documents = list(yaml.safe_load_all((FOLDER / "spark" / "spark.yaml").read_text()))
    cluster.apply(*(d for d in documents if d["kind"] in ("Role", "RoleBinding", "ServiceAccount")))
    limits = yaml.safe_load_all((FOLDER / "limits.yaml").read_text())
    cluster.apply(*(d for d in limits if d["kind"] == "PriorityClass"))
    cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "data": {"KEY": "czNjcjN0"}})
    token = cluster.token("orrery-spark")
    executor = document(where(tmp_path))
    executor["spec"].pop("nodeSelector")
    conf = {
        "spark.executor.instances": "2",
        "spark.executor.memory": "512m",
        "spark.kubernetes.executor.request.cores": "100m",
        # All pods share one address here, and a token is in no file.
        "spark.driver.port": "0",
        "spark.driver.blockManager.port": "0",
        "spark.blockManager.port": "0",
        "spark.kubernetes.authenticate.oauthToken": token,
    }
    env = [{"name": n, "valueFrom": {"fieldRef": {"fieldPath": path}}} for n, path in POD.items()]
    told = {"MASTER": f"k8s://{cluster.url}", "CONF": json.dumps(conf), EXECUTOR: json.dumps(executor)}
    env += [{"name": n, "value": v} for n, v in told.items()]
    container = {
        "name": "base", "image": "orrery/spark:1", "command": ["python", "-c", DRIVER], "env": env,
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }  # fmt: skip
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "driver", "labels": {"orrery/unit": "driver"}},
        "spec": {"restartPolicy": "Never", "containers": [container], "volumes": [{"name": "scratch", "emptyDir": {}}]},
    }  # fmt: skip
    ask(cluster, "pods", json.dumps(pod).encode())
    cluster.do(lambda: setattr(cluster.rbac, "on", True))
    cluster.asked.clear()
    seen: dict[str, Any] = {}
    until = time.monotonic() + 300
    while time.monotonic() < until:
        for one in cluster.pods():
            seen[one["metadata"]["name"]] = one
        if seen["driver"]["status"].get("phase") in ("Succeeded", "Failed"):
            break
        time.sleep(0.1)
    used = {(a.resource, a.verb) for a in cluster.asked if a.namespace == "orrery"}
    cluster.do(lambda: setattr(cluster.rbac, "on", False))
    log = ask(cluster, "pods/driver/log").decode()
    assert seen["driver"]["status"]["phase"] == "Succeeded", log
    got = json.loads(log.split("GOT ")[1])
    assert sorted(value for value, *_ in got) == [0, 1, 4, 9]
    assert {who for _, who, _ in got} <= {"1", "2"} and {key for *_, key in got} == {"s3cr3t"}
    made = [one for name, one in seen.items() if name != "driver"]
    assert len(made) == 2
    for one in made:
        assert one["metadata"]["name"].startswith("driver-exec-")
        assert one["metadata"]["labels"]["spark-role"] == "executor"
        assert one["metadata"]["labels"][names.DRIVER] == "delays-score-1"
        assert one["metadata"]["ownerReferences"][0]["name"] == "driver"
        assert one["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
        assert one["spec"]["automountServiceAccountToken"] is False
    rules = [r for d in documents if d["kind"] == "Role" for r in d["rules"]]
    granted = {(r, v) for rule in rules for r in rule["resources"] for v in rule["verbs"]}
    assert used - granted == set()
    assert granted - used == {("pods", "delete")}, "of an executor that has died, which none did"


def ask(cluster: Cluster, path: str, body: bytes | None = None) -> bytes:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{cluster.url}/api/v1/namespaces/orrery/{path}", data=body, headers=headers)
    with urllib.request.urlopen(request) as answer:
        return bytes(answer.read())
