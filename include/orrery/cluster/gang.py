"""What a training over several pods is made of: an Indexed Job of plain Kubernetes, or Kubeflow's PyTorchJob.

Both are made from one pod document, as the operator makes it for a step of one pod. All pods run the same argv; what
tells them apart are a few variables (see `contract.Node`): how many nodes there are, which one this is, and where
node 0 is found. One pod that ends badly, or is taken away, ends them all, and none is replaced: a new rank would have
nobody to train with. The next attempt is a new unit, which goes on from the checkpoint.

    gang = make(platform.kubernetes.ranks)
    first, *others = gang.documents(pod, unit, pods, namespace)
    made = POST collection(first)          # 409: this attempt has started it before; GET address(first) then
    for document in others:
        POST collection(document) of owned(document, made)      # 409: is there already
    DELETE address(first) with DELETION                         # its pods and all that it owns go with it
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

from orrery.errors import OrreryError

Json: TypeAlias = dict[str, Any]

UNIT = "orrery/unit"
PORT = 29500  # where node 0 waits for the others
INDEX = "batch.kubernetes.io/job-completion-index"  # label and annotation of an Indexed Job's pods
# In the background: the object is gone at once, its pods are told to stop with their grace as always.
DELETION: Mapping[str, str] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
# What is left of a unit whose operator never came back for it: long enough to be looked at, no rubbish for ever.
KEPT_S = 6 * 3600
PLACES: Mapping[str, str] = {
    "Pod": "/api/v1/namespaces/{}/pods",
    "Service": "/api/v1/namespaces/{}/services",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "PyTorchJob": "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs",
}


class Gang(Protocol):
    """A way to run one step in several pods."""

    longest: int  # characters that a unit's name may have: names of pods and hosts are made from it
    container: str | None  # what the step's container is called; none: as in the pod document

    def documents(self, pod: Json, unit: str, pods: int, namespace: str, *, wait: float = 3600) -> list[Json]:
        """Return the objects to create, in order; the first owns the others (see `owned`).

        `pod`: a pod document in the API's own JSON, with the labels of the unit; its first container is the step's.
        `wait`: seconds that the pods may take to be placed. So long those that run wait for the others.
        """
        ...

    def node(self, pod: Mapping[str, Any]) -> int:
        """Return which node a pod of the unit is, from 0, which leads."""
        ...


class IndexedJob:
    """Plain Kubernetes: `completions` pods with an index each, found by name through a headless Service."""

    longest = 60  # `<unit>-63` is a host name
    container: str | None = None

    def documents(self, pod: Json, unit: str, pods: int, namespace: str, *, wait: float = 3600) -> list[Json]:
        """See `Gang.documents`."""
        template = _template(self, pod, unit, pods, wait)
        spec = template["spec"]
        spec["subdomain"] = unit  # with the Service of that name, `<unit>-<index>.<unit>` is a pod's address
        step = spec["containers"][0]
        index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
        step["env"] += [
            {"name": "ORRERY_NODE", "valueFrom": index},
            {"name": "ORRERY_MASTER", "value": f"{unit}-0.{unit}.{namespace}.svc:{PORT}"},
        ]
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": _metadata(template, unit, namespace),
            "spec": {
                "completions": pods,
                "parallelism": pods,
                "completionMode": "Indexed",
                "backoffLimit": 0,
                # One out, all out: whoever fails or is taken away, the Job ends the others at once.
                "podFailurePolicy": {
                    "rules": [
                        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                        {
                            "action": "FailJob",
                            "onExitCodes": {"containerName": step["name"], "operator": "NotIn", "values": [0]},
                        },
                    ]
                },
                # A pod that is told to go has its grace to save in; no other comes in its place meanwhile.
                "podReplacementPolicy": "Failed",
                "ttlSecondsAfterFinished": KEPT_S,
                **_deadline(spec, wait),
                "template": template,
            },
        }
        return [job, _service(template, unit, namespace)]

    def node(self, pod: Mapping[str, Any]) -> int:
        """See `Gang.node`."""
        metadata = pod.get("metadata", {})
        told = {**metadata.get("annotations", {}), **metadata.get("labels", {})}
        return int(told.get(INDEX, 0))


class PyTorchJob:
    """Kubeflow's training operator: a master and workers. It makes their Services and their ranks' variables."""

    longest = 53  # `<unit>-worker-62` is a Service
    container: str | None = "pytorch"  # its operator demands the name
    replica, number = "training.kubeflow.org/replica-type", "training.kubeflow.org/replica-index"

    def documents(self, pod: Json, unit: str, pods: int, namespace: str, *, wait: float = 3600) -> list[Json]:
        """See `Gang.documents`."""
        template = _template(self, pod, unit, pods, wait)
        template["spec"]["containers"][0]["name"] = self.container
        replicas = {"Master": 1, "Worker": pods - 1}
        specs = {
            kind: {"replicas": count, "restartPolicy": "Never", "template": copy.deepcopy(template)}
            for kind, count in replicas.items()
            if count
        }
        job = {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": _metadata(template, unit, namespace),
            "spec": {
                "runPolicy": {
                    "cleanPodPolicy": "Running",  # when one has failed, the others are ended
                    "backoffLimit": 0,
                    "ttlSecondsAfterFinished": KEPT_S,
                    **_deadline(template["spec"], wait),
                },
                "pytorchReplicaSpecs": specs,
            },
        }
        return [job]

    def node(self, pod: Mapping[str, Any]) -> int:
        """See `Gang.node`."""
        labels = pod.get("metadata", {}).get("labels", {})
        worker = str(labels.get(self.replica, "master")).lower() == "worker"
        return int(labels.get(self.number, 0)) + int(worker)


def make(ranks: Literal["indexed-job", "pytorchjob"]) -> Gang:
    """Return what `kubernetes.ranks` of platform.yaml names."""
    return PyTorchJob() if ranks == "pytorchjob" else IndexedJob()


def collection(document: Mapping[str, Any]) -> str:
    """Return the path that an object is created at (POST)."""
    return PLACES[document["kind"]].format(document["metadata"]["namespace"])


def address(document: Mapping[str, Any]) -> str:
    """Return the path of one object (GET, DELETE)."""
    return f"{collection(document)}/{document['metadata']['name']}"


def owned(document: Json, owner: Mapping[str, Any]) -> Json:
    """Return a document that goes when its owner goes; `owner` is what the API answered, for its uid."""
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
    }
    return {**document, "metadata": {**document["metadata"], "ownerReferences": [reference]}}


def _template(gang: Gang, pod: Json, unit: str, pods: int, wait: float) -> Json:
    """Return the pods' template: the document without what is one pod's own, and how many nodes there are."""
    if len(unit) > gang.longest:
        raise OrreryError(f"unit {unit!r} has {len(unit)} characters, of {gang.longest} that a training's pods allow")
    given = copy.deepcopy(pod)
    labels = {**given["metadata"].get("labels", {}), UNIT: unit}
    metadata = {"labels": labels, "annotations": given["metadata"].get("annotations") or {}}
    spec = {k: v for k, v in given["spec"].items() if k not in ("hostname", "subdomain", "nodeName")}
    spec["restartPolicy"] = "Never"
    if (own := spec.get("activeDeadlineSeconds")) is not None:
        # A pod's time counts from its own start, and it may wait so long for the last of the others.
        spec["activeDeadlineSeconds"] = int(own + wait)
    step = spec["containers"][0]
    told = {"ORRERY_NODES": pods, "ORRERY_PATIENCE": int(wait)}
    step["env"] = [*(step.get("env") or ()), *({"name": name, "value": str(value)} for name, value in told.items())]
    return {"metadata": metadata, "spec": spec}


def _metadata(template: Json, unit: str, namespace: str) -> Json:
    return {"name": unit, "namespace": namespace, **copy.deepcopy(template["metadata"])}


def _deadline(spec: Json, wait: float) -> Json:
    """Return when the whole is given up. Each pod has its own deadline, which is judged; this one ends an orphan.

    `spec`: the pods', the last of which may start so late as `wait`.
    """
    own = spec.get("activeDeadlineSeconds")
    return (
        {}
        if own is None
        else {"activeDeadlineSeconds": int(own + wait + spec.get("terminationGracePeriodSeconds", 30))}
    )


def _service(template: Json, unit: str, namespace: str) -> Json:
    """Return the headless Service that gives the pods their addresses, also before they are ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(template, unit, namespace),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {UNIT: unit},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
