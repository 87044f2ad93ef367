"""Spark on Kubernetes from the driver's side: settings made from what its own pod is told (see `cluster/spark.py`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orrery.errors import SpecError, UserError

EXECUTOR = "ORRERY_EXECUTOR"  # the document that an executor's pod is made from, as JSON
ADDRESS, NAME, NAMESPACE = "ORRERY_POD_IP", "ORRERY_POD_NAME", "ORRERY_POD_NAMESPACE"
# Variable -> field of the pod that Kubernetes puts in (the downward API).
POD: Mapping[str, str] = {ADDRESS: "status.podIP", NAME: "metadata.name", NAMESPACE: "metadata.namespace"}
CONTAINER = "executor"
# Fixed, since a NetworkPolicy names them; a pod has an address of its own, so nobody else is there.
DRIVER_PORT, BLOCKS_PORT = "7078", "7079"
# A driver may also be somewhere else, if platform.yaml says all that a pod would be told.
BY_HAND = frozenset({"spark.driver.host", "spark.kubernetes.container.image", "spark.kubernetes.namespace"})


def is_kubernetes(master: str) -> bool:
    """Tell whether executors are pods."""
    return master.startswith("k8s://")


def settings(master: str, conf: Mapping[str, str], scratch: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return Spark's settings for executors as pods; `conf`, platform.yaml's, wins over them.

    Raises `SpecError` for a master that names no API server, `UserError` where this process is no pod of ours and the
    settings do not make up for it: executors would be started that can never reach their driver.
    """
    if not re.fullmatch(r"k8s://https?://[^/\s]+(/\S*)?", master):
        raise SpecError(
            f"spark.master in platform.yaml is {master!r}: it names no API server",
            hint='k8s://https://HOST:PORT; inside of a cluster "k8s://https://kubernetes.default.svc"',
        )
    missing = [name for name in (*POD, EXECUTOR) if not environ.get(name)]
    if not missing:
        return _of_a_pod(scratch, environ)
    if set(conf) >= BY_HAND:
        return {}
    raise UserError(
        f"spark.master is {master!r}, and this step is no pod that executors could reach ({missing[0]} is not set)",
        hint='ORRERY_PROFILE=kubernetes, or `spark: {master: "local[*]"}` in platform.yaml; for a driver elsewhere '
        f"spark.conf must say {', '.join(sorted(BY_HAND - set(conf)))}",
    )


def _of_a_pod(scratch: Path, environ: Mapping[str, str]) -> dict[str, str]:
    document = _document(environ[EXECUTOR])
    file = scratch / "executor.json"
    file.write_text(json.dumps(document))  # JSON is YAML, which Spark reads
    container = document["spec"]["containers"][0]
    return {
        "spark.submit.deployMode": "client",
        "spark.kubernetes.namespace": environ[NAMESPACE],
        "spark.kubernetes.container.image": container["image"],
        "spark.kubernetes.container.image.pullPolicy": container.get("imagePullPolicy", "IfNotPresent"),
        "spark.kubernetes.executor.podTemplateFile": str(file),
        "spark.kubernetes.executor.podTemplateContainerName": container["name"],
        "spark.kubernetes.executor.podNamePrefix": environ[NAME][:47],
        # Its owner: when the driver's pod is gone, however it went, Kubernetes removes its executors.
        "spark.kubernetes.driver.pod.name": environ[NAME],
        "spark.driver.host": environ[ADDRESS],
        "spark.driver.bindAddress": environ[ADDRESS],
        "spark.driver.port": DRIVER_PORT,
        "spark.driver.blockManager.port": BLOCKS_PORT,
        "spark.blockManager.port": BLOCKS_PORT,
        # What would want rights that a driver need not have: ConfigMaps, Services and claims that it does not make.
        "spark.kubernetes.executor.disableConfigMap": "true",
        "spark.kubernetes.driver.service.deleteOnTermination": "false",
        "spark.kubernetes.driver.ownPersistentVolumeClaim": "false",
        "spark.kubernetes.driver.reusePersistentVolumeClaim": "false",
    }


def _document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
        container = document["spec"]["containers"][0]
        assert container["name"] and container["image"]
    except (ValueError, KeyError, IndexError, TypeError, AssertionError):
        raise UserError(
            f"{EXECUTOR} is no pod document with a container", hint="the orchestrator sets it; leave it alone"
        ) from None
    return dict(document)


__all__ = ["ADDRESS", "CONTAINER", "EXECUTOR", "NAME", "NAMESPACE", "POD", "is_kubernetes", "settings"]
