"""The test cluster over HTTP, by the clients that Airflow and the engine use."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from cluster.api import Cluster
from kubernetes.client.exceptions import ApiException
from kubernetes.watch import Watch

IMAGE = "orrery/airflow:1"


def pod(name: str, code: str = "print('hello')", **spec: Any) -> dict[str, Any]:
    """Return a pod that runs Python; `labels`, `env` and `resources` are put where they belong."""
    labels = spec.pop("labels", {})
    container = {"name": "base", "image": spec.pop("image", IMAGE), "command": ["python", "-u", "-c", code]}
    for field in (
        "env",
        "envFrom",
        "resources",
        "command",
        "terminationMessagePolicy",
        "volumeMounts",
        "imagePullPolicy",
    ):
        if field in spec:
            container[field] = spec.pop(field)
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"restartPolicy": "Never", "containers": [container], **spec},
    }


def until(there: Callable[[], Any], what: str = "it", seconds: float = 30.0) -> Any:
    """Return what is there, once it is."""
    deadline = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.01)
    return found


def log_of(core: Any, name: str, **more: Any) -> str:
    """Return a log; the client would make `b'...'` of it by itself."""
    return str(core.read_namespaced_pod_log(name, "orrery", _preload_content=False, **more).data.decode())


def ended(cluster: Cluster, name: str) -> dict[str, Any]:
    """Return a pod that is over."""

    def over() -> dict[str, Any] | None:
        found = cluster.pod(name)
        return found if found and found["status"]["phase"] in ("Succeeded", "Failed") else None

    return dict(until(over, f"the end of {name}"))


def running(cluster: Cluster, name: str) -> dict[str, Any]:
    return dict(until(lambda: (p := cluster.pod(name)) and p["status"]["phase"] == "Running" and p, f"{name} running"))


def test_a_pod_runs_as_a_process_with_what_it_says_and_nothing_else(cluster: Cluster, core: Any) -> None:
    env = [
        {"name": "TOLD", "value": "yes"},
        {"name": "TWICE", "value": "$(TOLD)$(TOLD)"},
        {"name": "ME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "STEP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['orrery/step']"}}},
        {"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
    ]
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    core.create_namespaced_pod(
        "orrery", pod("a", code, env=env, labels={"orrery/step": "train"}, resources={"limits": {"memory": "2Gi"}})
    )
    assert ended(cluster, "a")["status"]["phase"] == "Succeeded"
    told = json.loads(log_of(core, "a"))
    assert {k: told[k] for k in ("TOLD", "TWICE", "ME", "STEP", "LIMIT")} == {
        "TOLD": "yes", "TWICE": "yesyes", "ME": "a", "STEP": "train", "LIMIT": "2048",
    }  # fmt: skip
    own = {"PATH", "HOME", "TMPDIR", "HOSTNAME", "LC_CTYPE"}
    assert {k for k in told if not k.startswith(("KUBERNETES_", "ORRERY_TEST"))} - own == {e["name"] for e in env}


def test_pods_are_listed_by_labels_and_fields_and_names_are_taken_once(cluster: Cluster, core: Any) -> None:
    for name, step in (("a", "train"), ("b", "score"), ("c", "score")):
        core.create_namespaced_pod("orrery", pod(name, labels={"step": step}))

    def names(**selectors: str) -> list[str]:
        return [p.metadata.name for p in core.list_namespaced_pod("orrery", **selectors).items]

    assert names(label_selector="step=score") == ["b", "c"]
    assert names(label_selector="step in (train), step!=score") == ["a"]
    assert names(label_selector="!step") == [] and names(label_selector="step") == ["a", "b", "c"]
    assert names(field_selector="metadata.name=b") == ["b"]
    with pytest.raises(ApiException) as refused:
        core.create_namespaced_pod("orrery", pod("a"))
    assert (refused.value.status, json.loads(refused.value.body)["reason"]) == (409, "AlreadyExists")
    with pytest.raises(ApiException) as refused:
        core.create_namespaced_pod("elsewhere", pod("a"))
    assert refused.value.status == 404
    page = core.list_namespaced_pod("orrery", limit=2)
    rest = core.list_namespaced_pod("orrery", limit=2, _continue=page.metadata._continue)
    assert [p.metadata.name for p in (*page.items, *rest.items)] == ["a", "b", "c"]


def test_a_watch_tells_all_that_happens_and_a_stale_one_has_to_list_again(cluster: Cluster, core: Any) -> None:
    began = core.list_namespaced_pod("orrery").metadata.resource_version
    core.create_namespaced_pod("orrery", pod("a", labels={"step": "train"}))
    core.create_namespaced_pod("orrery", pod("b"))
    ended(cluster, "a")
    core.delete_namespaced_pod("a", "orrery")
    seen = []
    watch = Watch()
    for event in watch.stream(
        core.list_namespaced_pod, "orrery", label_selector="step=train", resource_version=began, timeout_seconds=20
    ):
        seen.append((event["type"], event["object"].status.phase))
        if event["type"] == "DELETED":
            break
    assert seen[0] == ("ADDED", "Pending") and seen[-1] == ("DELETED", "Succeeded")
    assert ("MODIFIED", "Running") in seen
    cluster.forget()
    with pytest.raises(ApiException) as stale:
        list(Watch().stream(core.list_namespaced_pod, "orrery", resource_version=began, timeout_seconds=5))
    assert stale.value.status == 410


def test_the_asynchronous_client_watches_with_bookmarks_until_the_time_is_over(cluster: Cluster) -> None:
    from kubernetes_asyncio import client, config, watch

    async def look() -> list[str]:
        async with await config.new_client_from_config_dict(cluster.kube_config()) as api:
            core = client.CoreV1Api(api)
            await core.create_namespaced_pod("orrery", pod("a", "import time; time.sleep(0.5)"))
            kinds = []
            async with watch.Watch() as w:
                stream = w.stream(
                    core.list_namespaced_pod,
                    "orrery",
                    resource_version="0",
                    timeout_seconds=4,
                    allow_watch_bookmarks=True,
                )
                async for event in stream:
                    kinds.append(event["type"])
            return kinds

    kinds = asyncio.run(look())
    assert kinds[0] == "ADDED" and "MODIFIED" in kinds and "BOOKMARK" in kinds


def test_a_log_is_followed_from_a_time_on(cluster: Cluster, core: Any, tmp_path: Any) -> None:
    go = tmp_path / "go"
    code = f"import pathlib, time\nprint('one')\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(.01)\nprint('two')"
    core.create_namespaced_pod("orrery", pod("a", code))
    running(cluster, "a")
    first = until(lambda: log_of(core, "a", timestamps=True), "the first line")
    stamp = first.split()[0]
    threading.Timer(0.2, go.touch).start()
    lines = list(Watch().stream(core.read_namespaced_pod_log, "a", "orrery"))
    assert lines == ["one", "two"]
    later = log_of(core, "a", timestamps=True, tail_lines=1)
    assert later.split()[1] == "two" and later.split()[0] > stamp
    assert log_of(core, "a", since_seconds=3600) == "one\ntwo\n"


def test_a_container_that_cannot_start_yet_has_no_log(cluster: Cluster, core: Any) -> None:
    core.create_namespaced_pod("orrery", pod("a", image="orrery/none:1", imagePullPolicy="Never"))

    def waiting() -> str:
        states = cluster.pod("a")["status"].get("containerStatuses") or [{}]  # type: ignore[index]
        return str(states[0].get("state", {}).get("waiting", {}).get("reason", ""))

    until(lambda: waiting() == "ErrImageNeverPull", "the kubelet's reason")
    with pytest.raises(ApiException) as refused:
        core.read_namespaced_pod_log("a", "orrery")
    assert refused.value.status == 400 and "waiting to start: ErrImageNeverPull" in refused.value.body


def test_a_quota_refuses_in_the_real_words(cluster: Cluster, core: Any) -> None:
    core.create_namespaced_resource_quota(
        "orrery", {"metadata": {"name": "team"}, "spec": {"hard": {"requests.nvidia.com/gpu": "1"}}}
    )
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    sleep = "import time; time.sleep(60)"
    core.create_namespaced_pod("orrery", pod("a", sleep, resources=gpu))
    with pytest.raises(ApiException) as refused:
        core.create_namespaced_pod("orrery", pod("b", resources=gpu))
    assert refused.value.status == 403
    assert json.loads(refused.value.body)["message"] == (
        'pods "b" is forbidden: exceeded quota: team, requested: requests.nvidia.com/gpu=1, '
        "used: requests.nvidia.com/gpu=1, limited: requests.nvidia.com/gpu=1"
    )
    core.delete_namespaced_pod("a", "orrery", grace_period_seconds=0)
    core.create_namespaced_pod("orrery", pod("b", resources=gpu))


def test_roles_are_asked_for_each_verb(cluster: Cluster) -> None:
    from kubernetes import client, config

    at = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    role = {**at, "kind": "Role", "metadata": {"name": "pods"}, "rules": [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "list"]}]}  # fmt: skip
    binding = {**at, "kind": "RoleBinding", "metadata": {"name": "pods"},
               "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "pods"},
               "subjects": [{"kind": "ServiceAccount", "name": "worker", "namespace": "orrery"}]}  # fmt: skip
    cluster.apply(role, binding)
    cluster.secure()
    with config.new_client_from_config_dict(cluster.kube_config(cluster.token("worker"))) as api:
        core = client.CoreV1Api(api)
        core.create_namespaced_pod("orrery", pod("a"))
        core.list_namespaced_pod("orrery")
        with pytest.raises(ApiException) as refused:
            core.read_namespaced_pod_log("a", "orrery")
        assert json.loads(refused.value.body)["message"] == (
            'pods "a" is forbidden: User "system:serviceaccount:orrery:worker" cannot get resource "pods/log" '
            'in API group "" in the namespace "orrery"'
        )
    with (
        config.new_client_from_config_dict(cluster.kube_config("nonsense")) as api,
        pytest.raises(ApiException) as refused,
    ):
        client.CoreV1Api(api).list_namespaced_pod("orrery")
    assert refused.value.status == 401
    assert cluster.requests["create pods"] == 1 and cluster.requests["get pods/log"] == 1


def test_what_a_test_wants_goes_wrong(cluster: Cluster, core: Any) -> None:
    cluster.answer(503, "list pods", message="etcd is away")
    with pytest.raises(ApiException) as refused:
        core.list_namespaced_pod("orrery")
    assert refused.value.status == 503
    core.list_namespaced_pod("orrery")


def test_an_indexed_job_runs_a_pod_for_each_index_and_takes_them_with_it(
    cluster: Cluster, core: Any, tmp_path: Any
) -> None:
    from kubernetes import client

    batch = client.BatchV1Api(core.api_client)
    code = "import os; print(os.environ['JOB_COMPLETION_INDEX'], os.environ['MASTER'], flush=True)"
    env = [{"name": "MASTER", "value": "gang-0.gang.orrery.svc:29500"}]

    def job(code: str) -> dict[str, Any]:
        spec = {**pod("x", code, env=env)["spec"], "subdomain": "gang"}
        return {
            "metadata": {"name": "gang"},
            "spec": {"completions": 2, "parallelism": 2, "completionMode": "Indexed", "backoffLimit": 0,
                     "podFailurePolicy": {"rules": [
                         {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}}]},
                     "template": {"metadata": {"labels": {"unit": "gang"}}, "spec": spec}},
        }  # fmt: skip

    batch.create_namespaced_job("orrery", job(code))
    done = until(lambda: len([p for p in cluster.pods("unit=gang") if p["status"]["phase"] == "Succeeded"]) == 2)
    assert done
    names = [p["metadata"]["name"] for p in cluster.pods("unit=gang")]
    said = sorted(log_of(core, n).split() for n in names)
    assert [s[0] for s in said] == ["0", "1"] and said[0][1] == said[1][1]
    assert said[0][1].startswith("127.0.0.1:")
    until(
        lambda: any(c.type == "Complete" for c in batch.read_namespaced_job("gang", "orrery").status.conditions or [])
    )
    batch.delete_namespaced_job("gang", "orrery", propagation_policy="Background")
    until(lambda: not cluster.pods("unit=gang"), "the end of the job's pods")
    # One that fails ends the other.
    other = "import os, sys, time; sys.exit(3) if os.environ['JOB_COMPLETION_INDEX'] == '1' else time.sleep(60)"
    batch.create_namespaced_job("orrery", job(other))
    until(lambda: any(c.type == "Failed" for c in batch.read_namespaced_job("gang", "orrery").status.conditions or []))
    assert len(cluster.pods("unit=gang")) <= 2
