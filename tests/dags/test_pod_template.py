"""What a pod is called, what it is made of, what is found of earlier ones, and what a refusal means: all pure."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from orrery.cluster import answers, gang, names, template, units
from orrery.contract import VERBS, StepConfig
from orrery.errors import SpecError, UserError
from orrery.plan import Plan
from orrery.platform import Compute, Platform

PLATFORM: dict[str, Any] = {
    "version": 1,
    "environments": {"ml": {"image": "orrery/ml:1"}, "spark": {"image": "orrery/spark:1"}},
    "compute": {"cpu-light": {}},
}


def config(**more: Any) -> StepConfig:
    values: dict[str, Any] = {
        "project": "flight_delay", "verb": "train", "key": "2013-01..2013-03", "partitions": ("2013-01",),
        "store": "s3://b", "bundle": "d", "address": "a" * 32, "run": "r+1", "task": "train", "attempt": 1,
        "folder": "flight_delay/runs/r/train-x/1", **more,
    }  # fmt: skip
    return StepConfig(**values)


def platform_(**kubernetes: Any) -> Platform:
    spark = kubernetes.pop("spark", {})
    return Platform.model_validate({**PLATFORM, "kubernetes": kubernetes, "spark": spark})


def plan(outlive: float = 0.0, environment: dict[str, str] | None = None, **more: Any) -> Plan:
    made = config(**more)
    return Plan(made, VERBS[made.verb], environment or {}, compute="cpu-light", outlive=outlive)


def arguments(compute: Compute, plan_: Plan, **kubernetes: Any) -> template.AttemptArguments:
    return template.for_attempt(platform_(**kubernetes), compute, plan_, names.unit(plan_.config))


def variables(made: template.AttemptArguments) -> dict[str, str]:
    return {v.name: v.value for v in made["env_vars"]}


# -- names ---------------------------------------------------------------------------------------------


def test_an_attempt_has_one_name_and_another_attempt_another() -> None:
    one = names.unit(config())
    assert one == names.unit(config(run="other", key="z"))  # nothing but the attempt's folder counts
    others = [
        names.unit(config(), again=2),
        names.unit(config(folder="flight_delay/runs/r/train-x/2", attempt=2)),
        names.unit(config(folder="flight_delay/runs/r/train-y/1")),
        names.unit(config(store="s3://c")),
    ]
    assert len({one, *others}) == 5
    assert names.slot("s3://b", config().folder) == names.slot("s3://b", "flight_delay/runs/r/train-x/7")


@pytest.mark.parametrize("project", ["a", "flight_delay", "p" * 63, "a" + "_" * 40 + "b"])
def test_a_name_is_a_dns_label_with_room_for_what_is_made_from_it(project: str) -> None:
    for verb in VERBS:
        name = names.unit(config(project=project, verb=verb, attempt=1234), again=99)
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name), name
        assert len(name) <= min(gang.IndexedJob.longest, gang.PyTorchJob.longest)


@pytest.mark.parametrize(
    "text", ["plain", "manual__2026-11-24T13:20:35.1+00:00", "x" * 200, "+", "", "_a_", "2013-01..2013-03", "ä" * 70]
)
def test_a_label_is_one_whatever_it_says(text: str) -> None:
    assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", names.label(text))
    assert text == "" or names.label(text) != names.label(text + "?")


def test_the_same_work_is_told_by_its_address_or_by_all_that_the_step_is_told() -> None:
    again = {"run": "s", "attempt": 2, "folder": "flight_delay/runs/s/train-x/2", "requested": "now"}
    assert names.work(config()) == names.work(config(**again, params={"observed_s": 3}))
    assert names.work(config(address="b" * 32)) != names.work(config())
    effect = {"address": None, "verb": "register"}
    assert names.work(config(**effect)) == names.work(config(**effect, **again))
    assert names.work(config(**effect, params={"actor": "eve"})) != names.work(config(**effect))


# -- template ------------------------------------------------------------------------------------------


def test_a_pod_is_restricted_and_writes_into_named_volumes_alone() -> None:
    made = arguments(Compute(storage="20Gi", shared_memory="4Gi"), plan())
    own = made["container_security_context"]
    assert own.read_only_root_filesystem and own.run_as_non_root and own.allow_privilege_escalation is False
    assert own.capabilities.drop == ["ALL"] and not own.capabilities.add
    assert (
        made["security_context"].seccomp_profile.type == "RuntimeDefault" and made["security_context"].run_as_non_root
    )
    assert made["automount_service_account_token"] is False
    volumes = {v.name: v.empty_dir for v in made["volumes"]}
    mounts = {m.mount_path: volumes[m.name] for m in made["volume_mounts"]}
    assert mounts["/tmp"].size_limit == "20Gi" and mounts["/tmp"].medium is None
    assert (mounts["/dev/shm"].size_limit, mounts["/dev/shm"].medium) == ("4Gi", "Memory")
    given = variables(made)
    assert all(given[name].startswith("/tmp") for name in ("TMPDIR", "HOME", "ORRERY_CACHE"))
    assert given["ORRERY_LAST_WORDS"] == "/dev/termination-log" and given["ORRERY_LOG"] == "json"
    assert "ORRERY_OUTLIVE" not in given


def test_a_spot_class_goes_where_the_platform_has_its_spot_machines() -> None:
    spot = {"node_selector": {"pool": "spot", "zone": "a"}, "tolerations": [{"key": "spot", "operator": "Exists"}]}
    made = arguments(Compute(spot=True, node_selector={"zone": "b"}), plan(), spot=spot, silent_node="90s")
    assert made["node_selector"] == {"pool": "spot", "zone": "b"}
    silent = {t.key: t.toleration_seconds for t in made["tolerations"] if t.effect == "NoExecute"}
    assert silent == {"node.kubernetes.io/not-ready": 90, "node.kubernetes.io/unreachable": 90}
    assert any(t.key == "spot" for t in made["tolerations"])
    assert arguments(Compute(), plan(), spot=spot)["node_selector"] == {}


def test_a_class_says_itself_how_long_a_silent_node_is_borne() -> None:
    own = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
    made = arguments(Compute.model_validate({"tolerations": [own]}), plan())
    assert [t.toleration_seconds for t in made["tolerations"] if t.key == own["key"]] == [5]


@pytest.mark.parametrize(
    ("grace", "outlive", "wanted", "told"),
    [(None, 0.0, 30, None), (None, 28.0, 31, "28"), (None, 118.0, 121, "118"), ("60s", 28.0, 60, "28"), ("20s", 28.0, 20, "19")],
)  # fmt: skip
def test_the_grace_is_the_classs_or_what_the_step_needs(
    grace: str | None, outlive: float, wanted: int, told: str | None
) -> None:
    made = arguments(Compute(grace=grace), plan(outlive))
    assert made["termination_grace_period"] == wanted
    assert variables(made).get("ORRERY_OUTLIVE") == told


def test_a_gpu_is_called_what_the_cluster_calls_it() -> None:
    made = arguments(Compute(gpu=2, gpu_resource="amd.com/gpu", priority_class="high"), plan(), pull_secrets=["reg"])
    assert made["container_resources"].limits["amd.com/gpu"] == "2" and "cpu" not in made["container_resources"].limits
    assert variables(made)["ORRERY_GPUS"] == "2" and "ORRERY_GPUS" not in variables(arguments(Compute(), plan()))
    assert made["priority_class_name"] == "high" and made["image_pull_secrets"][0].name == "reg"


def test_only_the_driver_of_spark_in_the_cluster_has_a_key_to_it() -> None:
    for master, verb, key in (
        ("k8s://https://c", "score", True),
        ("local[*]", "score", False),
        ("k8s://x", "train", False),
    ):
        where = platform_(spark={"master": master})
        assert template.for_class(where, Compute(), verb, "spark")["automount_service_account_token"] is key


def test_a_password_is_not_written_into_a_pod() -> None:
    given = {"MLFLOW_TRACKING_URI": "https://eve:s3cret@mlflow"}
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI holds a password") as refused:
        arguments(Compute(), plan(environment=given))
    assert "s3cret" not in str(refused.value)


def test_a_store_that_is_a_folder_is_doubted_before_a_pod_is_made(caplog: pytest.LogCaptureFixture) -> None:
    arguments(Compute(), plan())
    assert caplog.messages == []
    arguments(Compute(), plan(store="file:///var/store"))
    (said,) = caplog.messages
    assert all(part in said for part in ("file:///var/store", "platform.yaml", "ORRERY_STORE", "s3://"))


def test_several_pods_are_for_trainings() -> None:
    template.check(platform_(), Compute(pods=2), "two", "train")
    with pytest.raises(SpecError, match="class 'two' has 2 pods: gate runs in one"):
        template.check(platform_(), Compute(pods=2), "two", "gate")


# -- what is there of earlier attempts -----------------------------------------------------------------


def pod(attempt: int = 1, phase: str = "Running", deleted: bool = False, kind: str = "Pod", **status: Any) -> Any:
    made = config(attempt=attempt, folder=f"flight_delay/runs/r/train-x/{attempt}")
    metadata: dict[str, Any] = {
        "name": names.unit(made), "namespace": "orrery", "labels": names.labels(made, names.unit(made)),
        "annotations": names.notes(made),
    }  # fmt: skip
    if deleted:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"kind": kind, "metadata": metadata, "status": {"phase": phase, **status}}


@pytest.mark.parametrize(
    ("document", "state"),
    [
        (pod(phase="Pending"), "live"),
        (pod(phase="Running"), "live"),
        (pod(phase="Running", deleted=True), "ending"),
        (pod(phase="Succeeded"), "dead"),
        (pod(phase="Failed"), "dead"),
        (pod(kind="Job"), "live"),
        (pod(kind="Job", conditions=[{"type": "Failed", "status": "True"}]), "dead"),
        (pod(kind="Job", conditions=[{"type": "Suspended", "status": "True"}]), "live"),
    ],
)
def test_a_unit_is_live_ending_or_dead(document: Any, state: str) -> None:
    (unit,) = units.found([document]).values()
    assert (unit.state, unit.attempt, unit.work) == (state, 1, "a" * 32)
    assert unit.folder == "flight_delay/runs/r/train-x/1"
    assert unit.address.endswith(f"/{'pods' if document['kind'] == 'Pod' else 'jobs'}/{unit.name}")


def test_a_job_is_one_unit_with_its_pods_and_ends_when_one_of_them_is_ending() -> None:
    job = {**pod(kind="Job"), "spec": {"completions": 2}}
    (unit,) = units.found([pod(), job, pod(deleted=True)]).values()
    assert (unit.state, unit.pods) == ("ending", 2) and "/jobs/" in unit.address
    assert [u.attempt for u in units.found([pod(1), pod(3), pod(2)]).values()] == [3, 2, 1]


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_pods_of_a_job_that_is_deleted_are_ending_before_the_garbage_collector_says_so(kind: str) -> None:
    job = pod(kind=kind)
    job["metadata"]["uid"] = "u-1"
    owner = {"kind": kind, "name": job["metadata"]["name"], "uid": "u-1", "controller": True}
    owned = [pod(), pod(phase="Pending"), pod(phase="Succeeded")]
    for each in owned:
        each["metadata"]["ownerReferences"] = [owner]
    (unit,) = units.found([*owned, job]).values()
    assert unit.state == "live"
    (unit,) = units.found(owned).values()
    assert unit.state == "ending"
    # A Job of the same name that was made since is another one.
    job["metadata"]["uid"] = "u-2"
    (unit,) = units.found([*owned, job]).values()
    assert unit.state == "ending"
    (unit,) = units.found(owned[2:]).values()
    assert unit.state == "dead"  # nothing of it runs
    owner |= {"kind": "Workflow"}  # another's, and no unit of ours is made of it
    (unit,) = units.found(owned).values()
    assert unit.state == "live"


# -- what a refusal means ------------------------------------------------------------------------------


def status(reason: str, message: str) -> str:
    return json.dumps({"kind": "Status", "reason": reason, "message": message})


@pytest.mark.parametrize(
    ("code", "body", "kind"),
    [
        (409, status("AlreadyExists", 'pods "x" already exists'), "exists"),
        (409, status("Conflict", "Operation cannot be fulfilled on resourcequotas"), "wait"),
        (403, status("Forbidden", 'pods "x" is forbidden: exceeded quota: team, requested: pods=1'), "wait"),
        (403, status("Forbidden", 'pods "x" is forbidden: violates PodSecurity "restricted"'), "user"),
        (403, status("Forbidden", 'pods is forbidden: User "a" cannot create resource "pods"'), "user"),
        (422, status("Invalid", "spec.containers[0].image: Required value"), "user"),
        (404, status("NotFound", 'namespaces "orrery" not found'), "absent"),
        (429, "", "wait"),
        (503, b"<html>no upstream</html>", "wait"),
        (500, "[1]", "wait"),
        (0, "ConnectTimeout", "wait"),
    ],
)
def test_a_refusal_is_waited_for_or_told(code: int, body: str | bytes, kind: str) -> None:
    answer = answers.read(code, body, "unit-1")
    assert answer.kind == kind and answer.message.startswith("unit-1: ") and len(answer.message) > len("unit-1: ")


def test_rights_that_are_missing_name_the_role() -> None:
    body = status("Forbidden", 'pods is forbidden: User "a" cannot create resource "pods" in API group ""')
    assert "Role" in answers.read(403, body, "x").hint
