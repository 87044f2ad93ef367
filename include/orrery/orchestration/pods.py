"""The same step as a pod: image, resources and placement from the compute class, the same argv, the same result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.pod_generator import make_safe_label_value
from kubernetes.client import models as k8s

from orrery import platform
from orrery.errors import OrreryError, UserError
from orrery.orchestration.operators import StepOperator
from orrery.plan import Plan, safe_name
from orrery.platform import Compute, Platform, Toleration

if TYPE_CHECKING:
    from airflow.sdk import Context

    from orrery.plan import Planner


PER_ATTEMPT = ("orrery/run", "orrery/attempt")


class PodStepOperator(StepOperator, KubernetesPodOperator):
    """Runs one verb in a pod. What is asked for, planned, skipped and recorded is `StepOperator`'s."""

    labels: Any
    pod: Any
    pod_request_obj: Any
    remote_pod: Any

    def __init__(self, *, project: str, verb: str, compute: str, chain: tuple[str, ...] = (), **kwargs: Any) -> None:
        from orrery.contract import VERBS

        where = platform.load()
        pod = pod_arguments(where, where.compute_class(compute), VERBS[verb].environment, project, verb)
        super().__init__(project=project, verb=verb, compute=compute, chain=chain, **pod, **kwargs)

    def execute(self, context: Context) -> dict[str, Any]:
        """Return a small summary of the result, like `StepOperator.execute`."""
        result = StepOperator.execute(self, context)
        # `do_xcom_push` would mean the pod operator's sidecar, so the summary is pushed by hand.
        context["ti"].xcom_push(key="return_value", value=result)
        return result

    def _make_launcher(self, context: Context, planner: Planner) -> Any:
        base: dict[str, str] = {k: v for k, v in (self.labels or {}).items() if k not in PER_ATTEMPT}

        def launch(plan: Plan) -> int:
            sources = planner.spec.sources.items()
            missing = [n for n, s in sources if s.connection and not planner.platform.kubernetes.secret]
            if self.verb == "ingest" and missing:
                raise UserError(
                    f"source {missing[0]} needs a credential, and a pod is given none",
                    hint=f"kubernetes.secret in platform.yaml, with the URL as ORRERY_SOURCE_{missing[0].upper()}",
                )
            # The pod operator remembers the pod of an earlier launch; one task may launch several partitions.
            self.pod = self.pod_request_obj = self.remote_pod = None
            self.arguments = step_arguments(plan)
            # One attempt of a training may run on another class than the task's (see `placement`).
            place = planner.platform.compute_class(plan.compute)
            for name, value in placement_arguments(planner.platform, place, plan.verb.environment).items():
                setattr(self, name, value)
            self.labels = {
                **base,
                # A run id holds what a label may not (+00:00); Airflow shortens and cleans it as its own labels.
                "orrery/run": make_safe_label_value(plan.config.run),
                "orrery/attempt": str(plan.config.attempt),
            }
            self.env_vars = [k8s.V1EnvVar(name=k, value=v) for k, v in sorted(plan.environment.items())]
            try:
                KubernetesPodOperator.execute(self, context)
            except OrreryError:
                raise
            except Exception as e:
                # The pod operator raises one type for every end; the result document tells them apart.
                self.log.warning("the pod did not end well: %s", e)
                return 1
            return 0

        return launch

    def on_kill(self) -> None:
        """Delete the pod."""
        KubernetesPodOperator.on_kill(self)


def step_arguments(plan: Plan) -> list[str]:
    """Return the container's arguments; URIs are ours, made of checked segments, and no shell is involved."""
    folder = f"{plan.config.store}/{plan.config.folder}"
    return ["step", "--config", f"{folder}/config.json", "--result", f"{folder}/result.json"]


def placement_arguments(where: Platform, compute: Compute, environment: str) -> dict[str, Any]:
    """Return those of KubernetesPodOperator's arguments that a compute class decides."""
    limits: dict[str, str] = {"memory": compute.memory}
    if compute.gpu:
        limits["nvidia.com/gpu"] = str(compute.gpu)
    return {
        "service_account_name": compute.service_account or where.kubernetes.service_account,
        "image": compute.image or where.environments[environment].image,
        # No CPU limit: a throttled step is slower and no safer; memory is what must not be exceeded.
        "container_resources": k8s.V1ResourceRequirements(
            requests={"cpu": compute.cpu, "memory": compute.memory}, limits=limits
        ),
        "node_selector": dict(compute.node_selector),
        "tolerations": [_toleration(t) for t in compute.tolerations],
    }


def pod_arguments(where: Platform, compute: Compute, environment: str, project: str, verb: str) -> dict[str, Any]:
    """Return KubernetesPodOperator's arguments for one step on one compute class. Each unusual one says why."""
    cluster = where.kubernetes
    secret = [k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=cluster.secret))] if cluster.secret else []
    return {
        "name": safe_name(f"{project}-{verb}").replace("_", "-").lower(),
        "namespace": cluster.namespace,
        "kubernetes_conn_id": cluster.connection,
        "in_cluster": None if cluster.connection else True,
        **placement_arguments(where, compute, environment),
        "cmds": ["orrery"],
        "labels": {"orrery/project": project, "orrery/step": verb},
        "env_from": secret,
        # The result document is the truth; the XCom sidecar would be a second one, and needs websocket exec.
        "do_xcom_push": False,
        # Another attempt has a config and a result document of its own, so it may not take up an earlier pod;
        # the lease keeps that one from committing.
        "durable": False,
        # The launcher waits for the pod's end here and now, whatever Airflow's default is.
        "deferrable": False,
        "get_logs": True,
        "on_finish_action": "delete_pod",
        # 30 s of grace covers a step's clean end (SIGTERM to exit 143).
        "termination_grace_period": 30,
        "security_context": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "automount_service_account_token": False,
    }


def _toleration(wanted: Toleration) -> Any:
    return k8s.V1Toleration(toleration_seconds=wanted.seconds, **wanted.model_dump(exclude={"seconds"}))
