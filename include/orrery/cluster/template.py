"""What a step's pod is made of: KubernetesPodOperator's arguments, from the compute class, the cluster and the plan.

Each that a reader would not expect says why it is so.
"""

from __future__ import annotations

import logging
from typing import TypedDict

from kubernetes.client import models as k8s

from orrery.cluster import names, spark
from orrery.contract import StepConfig
from orrery.errors import SpecError, UserError
from orrery.plan import Plan, grace
from orrery.platform import Compute, Platform, Toleration
from orrery.spec import seconds
from orrery.uri import has_secret

log = logging.getLogger(__name__)

CONTAINER = "base"  # what the pod operator calls it
# Kubernetes reads it when the container has ended, and keeps it in the pod's status.
LAST_WORDS = "/dev/termination-log"
SCRATCH, SHARED_MEMORY = "/tmp", "/dev/shm"  # noqa: S108 - volumes of the pod's own
# The node's own taints when it is silent; Kubernetes bears each for 300 s unless a pod says otherwise.
SILENT = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


class ClassArguments(TypedDict):
    """What follows from the compute class alone: an attempt may run on another one than its task's."""

    image: str
    image_pull_policy: str
    image_pull_secrets: list[k8s.V1LocalObjectReference]
    service_account_name: str
    automount_service_account_token: bool
    container_resources: k8s.V1ResourceRequirements
    node_selector: dict[str, str]
    tolerations: list[k8s.V1Toleration]
    priority_class_name: str | None
    volumes: list[k8s.V1Volume]
    volume_mounts: list[k8s.V1VolumeMount]
    security_context: k8s.V1PodSecurityContext
    container_security_context: k8s.V1SecurityContext
    active_deadline_seconds: int
    termination_grace_period: int
    env_from: list[k8s.V1EnvFromSource]


class AttemptArguments(ClassArguments):
    """All of one attempt's."""

    name: str
    arguments: list[str]
    labels: dict[str, str]
    annotations: dict[str, str]
    env_vars: list[k8s.V1EnvVar]


class ClusterArguments(TypedDict):
    """What is the same for every pod of the platform."""

    namespace: str
    kubernetes_conn_id: str | None
    in_cluster: bool | None
    cmds: list[str]
    base_container_name: str
    full_pod_spec: k8s.V1Pod
    random_name_suffix: bool
    do_xcom_push: bool
    durable: bool
    deferrable: bool


def for_cluster(where: Platform) -> ClusterArguments:
    """Return what every pod of the platform has."""
    cluster = where.kubernetes
    return {
        "namespace": cluster.namespace,
        "kubernetes_conn_id": cluster.connection,
        "in_cluster": None if cluster.connection else True,
        "cmds": ["orrery"],
        "base_container_name": CONTAINER,
        # Kubernetes puts a variable into each pod for each Service of the namespace: MLFLOW_PORT=tcp://… for one that
        # is called mlflow, which is what programs read their own settings from.
        "full_pod_spec": k8s.V1Pod(spec=k8s.V1PodSpec(containers=[], enable_service_links=False)),
        # The name follows from the attempt: a creation that is repeated is refused instead of starting a second pod.
        "random_name_suffix": False,
        # The result document is the truth; the XCom sidecar would be a second one, and needs websocket exec.
        "do_xcom_push": False,
        # The pod operator takes up pods by their phase, dead and Terminating ones among them. We do it ourselves.
        "durable": False,
        "deferrable": True,
    }


def for_class(where: Platform, compute: Compute, verb: str, environment: str, outlive: float = 0.0) -> ClassArguments:
    """Return what a compute class decides. `outlive`: seconds after SIGTERM in which the step saves its state."""
    cluster, spot = where.kubernetes, where.kubernetes.spot if compute.spot else None
    secret = [k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=cluster.secret))] if cluster.secret else []
    return {
        "image": compute.image or where.environments[environment].image,
        "image_pull_policy": cluster.pull_policy,
        "image_pull_secrets": [k8s.V1LocalObjectReference(name=name) for name in cluster.pull_secrets],
        "service_account_name": compute.service_account or cluster.service_account,
        # A step asks nothing of the cluster, so it gets no key to it; Spark's driver starts executors.
        "automount_service_account_token": spark.drives(where, verb),
        "container_resources": _resources(compute),
        "node_selector": {**(spot.node_selector if spot else {}), **compute.node_selector},
        "tolerations": _tolerations(where, compute),
        "priority_class_name": compute.priority_class,
        "volumes": [
            k8s.V1Volume(name="scratch", empty_dir=k8s.V1EmptyDirVolumeSource(size_limit=compute.storage)),
            # The default /dev/shm has 64 MB, which ranks and data loaders exceed.
            k8s.V1Volume(
                name="shared-memory",
                empty_dir=k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit=compute.shared_memory),
            ),
        ],
        "volume_mounts": [
            k8s.V1VolumeMount(name="scratch", mount_path=SCRATCH),
            k8s.V1VolumeMount(name="shared-memory", mount_path=SHARED_MEMORY),
        ],
        # What the Pod Security Standard `restricted` demands, and a root filesystem that nobody writes into.
        "security_context": k8s.V1PodSecurityContext(
            run_as_non_root=True, seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault")
        ),
        "container_security_context": k8s.V1SecurityContext(
            allow_privilege_escalation=False,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
            read_only_root_filesystem=True,
            run_as_non_root=True,
        ),
        # Counted from the pod's start on its node, so waiting for one costs nothing of it.
        "active_deadline_seconds": seconds(compute.timeout),
        "termination_grace_period": grace(compute, outlive),
        "env_from": secret,
    }


def for_attempt(where: Platform, compute: Compute, plan: Plan, unit: str) -> AttemptArguments:
    """Return all that one attempt's pod is made of. Raises `UserError` for what a pod may not be given."""
    config = plan.config
    if why := local_store(config.store):
        log.warning("%s", why)
    decided = for_class(where, compute, config.verb, plan.verb.environment, plan.outlive)
    own = [k8s.V1EnvVar(name=k, value=v) for k, v in sorted(environment(compute, plan).items())]
    if spark.drives(where, config.verb):
        own += spark.variables(where, compute, config, unit, decided)
    return {
        **decided,
        "name": unit,
        "arguments": step_arguments(config),
        "labels": names.labels(config, unit),
        "annotations": names.notes(config),
        "env_vars": own,
    }


def step_arguments(config: StepConfig) -> list[str]:
    """Return the container's arguments; URIs are ours, made of checked segments, and no shell is involved."""
    folder = f"{config.store}/{config.folder}"
    return ["step", "--config", f"{folder}/config.json", "--result", f"{folder}/result.json"]


def environment(compute: Compute, plan: Plan) -> dict[str, str]:
    """Return a pod's variables. Raises `UserError` for a password among them."""
    for variable, value in plan.environment.items():
        if has_secret(value):
            raise UserError(
                f"{variable} holds a password, and a pod's environment is read by whoever may read pods",
                hint="an address without one; user and password as keys of the Secret that kubernetes.secret names "
                "(for MLflow: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)",
            )
    found = {
        **plan.environment,
        "ORRERY_LOG": "json",  # the operator makes lines of Airflow's log from it
        "ORRERY_LAST_WORDS": LAST_WORDS,
        "ORRERY_CACHE": f"{SCRATCH}/cache",
        "TMPDIR": SCRATCH,
        # Libraries keep files in it, and the image's own is read-only.
        "HOME": SCRATCH,
    }
    if compute.gpu:
        found["ORRERY_GPUS"] = str(compute.gpu)  # a training that then finds none says so: it is paid for
    if plan.outlive:
        # A save that would take longer than the grace is cut off by the step itself, so that it can still say so.
        found["ORRERY_OUTLIVE"] = f"{min(plan.outlive, max(grace(compute, plan.outlive) - 1, 1)):g}"
    return found


def local_store(uri: str) -> str:
    """Return what is wrong with a store that is a folder; "" for a bucket. A cluster may mount one into each pod."""
    if not uri.startswith("file:"):
        return ""
    return (
        f"the store is a folder, {uri}: a pod has its own disk, and finds it only where the cluster mounts it into "
        "each pod at that path. All can reach a bucket: `store` in platform.yaml, or ORRERY_STORE (s3://…)"
    )


def _resources(compute: Compute) -> k8s.V1ResourceRequirements:
    storage = {"ephemeral-storage": compute.storage}
    limits = {"memory": compute.memory, **storage}
    if compute.gpu:
        limits[compute.gpu_resource] = str(compute.gpu)
    # No CPU limit: a throttled step is slower and no safer; memory and disk are what must not be exceeded.
    return k8s.V1ResourceRequirements(requests={"cpu": compute.cpu, "memory": compute.memory, **storage}, limits=limits)


def _tolerations(where: Platform, compute: Compute) -> list[k8s.V1Toleration]:
    """Return the class's, those of interruptible machines, and how long a silent node is borne."""
    wanted = [*compute.tolerations, *(where.kubernetes.spot.tolerations if compute.spot else ())]
    silent = seconds(where.kubernetes.silent_node)
    own = [
        Toleration(key=key, operator="Exists", effect="NoExecute", seconds=silent)
        for key in SILENT
        if not any(t.key == key for t in wanted)
    ]
    return [
        k8s.V1Toleration(toleration_seconds=t.seconds, **t.model_dump(exclude={"seconds"})) for t in [*wanted, *own]
    ]


def check(where: Platform, compute: Compute, name: str, verb: str) -> None:
    """Raise `SpecError` for a class that a step cannot run on."""
    if compute.pods > 1 and verb != "train":
        raise SpecError(
            f"compute class {name!r} has {compute.pods} pods: {verb} runs in one",
            hint="a class without `pods`; only trainings are spread over several",
        )
