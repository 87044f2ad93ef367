"""Spark's executors as pods of their own: what `spark: {master: "k8s://…"}` in platform.yaml leaves open is said here.

The step's pod is the driver (Spark's client mode). The orchestrator knows how a pod of this platform is made, and the
pod knows its own address; both reach the step by its environment, so neither is part of what the step computes.
"""

from __future__ import annotations

import json
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.client import models as k8s

from orrery.cluster import names
from orrery.contract import StepConfig
from orrery.platform import Compute, Platform
from orrery.scoring.executors import CONTAINER, EXECUTOR, POD


def drives(where: Platform, verb: str) -> bool:
    """Tell whether a step is the driver of executors that it starts as pods."""
    return verb == "score" and where.spark.master.startswith("k8s://")


def variables(where: Platform, compute: Compute, config: StepConfig, unit: str, pod: Any) -> list[k8s.V1EnvVar]:
    """Return what the driver must be told. `pod`: the driver's own arguments, as `template.for_class` returns them."""
    of_the_pod = [
        k8s.V1EnvVar(
            name=name,
            value_from=k8s.V1EnvVarSource(field_ref=k8s.V1ObjectFieldSelector(field_path=path, api_version="v1")),
        )
        for name, path in POD.items()
    ]
    made = json.dumps(executor(where, compute, config, unit, pod), separators=(",", ":"))
    # `$(…)` in a pod's variable would be put in by Kubernetes.
    return [*of_the_pod, k8s.V1EnvVar(name=EXECUTOR, value=made.replace("$(", "$$("))]


def executor(where: Platform, compute: Compute, config: StepConfig, unit: str, pod: Any) -> dict[str, Any]:
    """Return the document that Spark makes each executor's pod from: as the driver's, without rights in the cluster.

    Spark adds memory and CPU (`spark.executor.memory`, `spark.executor.cores`), its own labels and the owner.
    """
    labels = {k: v for k, v in names.labels(config, unit).items() if k not in (names.UNIT, names.SLOT)}
    disk = {"ephemeral-storage": compute.storage}
    scratch, mount = (
        pod["volumes"][0],
        pod["volume_mounts"][0],
    )  # what may be written; no ranks talk through memory here
    document = k8s.V1Pod(
        api_version="v1",
        kind="Pod",
        # Without the label of a unit: an executor is no attempt, and nobody waits for one.
        metadata=k8s.V1ObjectMeta(labels={**labels, names.DRIVER: unit}),
        spec=k8s.V1PodSpec(
            service_account_name=where.kubernetes.service_account,
            automount_service_account_token=False,
            enable_service_links=False,
            image_pull_secrets=pod["image_pull_secrets"] or None,
            priority_class_name=pod["priority_class_name"],
            node_selector=pod["node_selector"] or None,
            tolerations=pod["tolerations"],
            security_context=pod["security_context"],
            termination_grace_period_seconds=5,  # it holds nothing that could be saved
            volumes=[scratch],
            containers=[
                k8s.V1Container(
                    name=CONTAINER,
                    image=pod["image"],
                    image_pull_policy=pod["image_pull_policy"],
                    env=[k8s.V1EnvVar(name=n, value=mount.mount_path) for n in ("HOME", "TMPDIR")],
                    env_from=pod["env_from"] or None,
                    resources=k8s.V1ResourceRequirements(requests=disk, limits=disk),
                    security_context=pod["container_security_context"],
                    volume_mounts=[mount],
                )
            ],
        ),
    )
    return dict(ApiClient().sanitize_for_serialization(document))
