"""vLLM as a server of one's own: a typed spec, the command that it means, and what Kubernetes is told.

The flags are those of vLLM 0.32. A spec is a YAML file; `orrery llm command FILE` and `orrery llm manifest FILE` print.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StringConstraints, field_validator, model_validator

from orrery import yamlfile
from orrery.errors import SpecError
from orrery.platform import Compute, Platform, Toleration, pinned
from orrery.spec import ComputeName, Frozen, seconds
from orrery.uri import has_secret

__all__ = ["VllmSpec", "command", "environment", "heading", "job", "manifest", "read", "to_yaml"]

# A name of the hub (org/name), a folder, or a bucket that vLLM's Run:ai streamer reads. Never an option: no `-` first.
MODEL = r"^(?:[A-Za-z0-9][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_.-]+)?|/[A-Za-z0-9_./-]+|(?:s3|gs|az)://[A-Za-z0-9_./-]+)$"
DnsName = Annotated[str, StringConstraints(pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$")]
Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/-]*$", max_length=200)]
# What else may be set, and of which kind it is. Not among them: what runs a model's own code (trust-remote-code), what
# opens another door (api-key, allowed-origins, middleware), and what would be said twice.
EXTRA: dict[str, type] = {
    "cpu-offload-gb": float,
    "enable-chunked-prefill": bool,
    "enforce-eager": bool,
    "generation-config": str,
    "kv-cache-dtype": str,
    "kv-cache-memory-bytes": int,
    "load-format": str,
    "max-num-batched-tokens": int,
    "max-num-queued-reqs": int,
    "pipeline-parallel-size": int,
    "reasoning-parser": str,
    "safetensors-load-strategy": str,
    "scheduling-policy": str,
    "seed": int,
    "tokenizer": str,
}
NAMESPACE = "orrery-platform"
# What a pod that may ask the model is labelled with, beside steps.
ASKS = "orrery/asks-models"
CACHE, SCRATCH, SHARED_MEMORY = "/cache", "/tmp", "/dev/shm"  # noqa: S108 - volumes of the pod's own
DRAIN_S = 30
USER = 10001


class VllmSpec(Frozen):
    """One vLLM server."""

    version: Literal[1] = 1
    name: DnsName = Field("vllm", description="Of its Deployment, Service and so its host name.")
    model: Annotated[str, StringConstraints(pattern=MODEL, max_length=300)] = Field(
        description="A name of the hub (org/name), a folder, or s3://, gs://, az://."
    )
    revision: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]*$", max_length=100)] | None = (
        Field(None, description="Commit, tag or branch of the hub's model; a commit cannot change behind your back.")
    )
    served_name: Token = Field(description="What clients call it: `model` of its entry in platform.yaml (llms).")
    tensor_parallel_size: int = Field(1, ge=1, le=16, description="Over how many GPUs each layer is split.")
    gpu_memory_utilization: float = Field(
        0.9, ge=0.05, le=0.98, description="Share of the GPU's memory for weights and KV cache."
    )
    max_model_len: int | None = Field(
        None,
        ge=256,
        le=10_000_000,
        description="Tokens of prompt and answer; none: what the model was made for.",
    )
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Answers that are written at once.")
    enable_prefix_caching: bool = Field(True, description="Prompts that begin alike share what was computed of them.")
    quantization: Literal["awq", "gptq", "fp8", "compressed-tensors", "int8_per_channel_weight_only"] | None = Field(
        None,
        description="awq, gptq, compressed-tensors: weights made so; fp8: such ones, or made so while they are "
        "read, as int8_per_channel_weight_only is. None: as the model says.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    port: int = Field(8000, ge=1024, le=65535)
    extra: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="More of vLLM's flags, without the dashes: " + ", ".join(sorted(EXTRA)) + "."
    )
    # Kubernetes
    image: str = Field("vllm/vllm-openai:v0.32.0", description="With a tag or digest; `:latest` is refused.")
    compute: ComputeName = Field("gpu-firm", description="A compute class of platform.yaml with as many GPUs.")
    replicas: int = Field(1, ge=1, le=64)
    claim: DnsName | None = Field(
        None, description="A PersistentVolumeClaim for weights; none: the node's disk, and each start reads them anew."
    )
    secret: DnsName = Field(
        "vllm",
        description="Secret with the key `api-key`; of use are `hf-token` for gated models, `aws-…` for a bucket.",
    )
    priority_class: DnsName = "orrery-platform"

    @field_validator("image")
    @classmethod
    def _pinned(cls, value: str) -> str:
        return pinned(value)

    @field_validator("model")
    @classmethod
    def _plain(cls, value: str) -> str:
        if ".." in value.split("/") or has_secret(value):
            raise ValueError("a plain name, folder or bucket is allowed: no `..`, and no password")
        return value

    @field_validator("extra")
    @classmethod
    def _allowed(cls, value: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
        for flag, given in value.items():
            kind = EXTRA.get(flag)
            if kind is None:
                raise ValueError(
                    f"{flag[:80]!r} is not among the flags that may be set; allowed: {', '.join(sorted(EXTRA))}"
                )
            wrong = isinstance(given, bool) != (kind is bool) or not isinstance(
                given, (int, float) if kind is float else kind
            )
            if wrong:
                raise ValueError(f"{flag} is {given!r}, and must be a value of kind {kind.__name__}")
            if isinstance(given, str) and not re.fullmatch(r"[A-Za-z0-9][\w./:-]{0,199}", given, re.ASCII):
                raise ValueError(f"{flag} is {given[:80]!r}; letters, digits and ./:_- are allowed")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> VllmSpec:
        if self.revision and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", self.model):
            raise ValueError("`revision` is for a model of the hub; a folder or bucket has none")
        if self.replicas > 1 and self.claim:
            raise ValueError("several replicas cannot share one claim that a single node mounts: leave `claim` out")
        return self

    @property
    def gpus(self) -> int:
        """How many GPUs one server has."""
        return self.tensor_parallel_size * int(self.extra.get("pipeline-parallel-size", 1))

    @property
    def url(self) -> str:
        """What platform.yaml calls it by, inside the cluster."""
        return f"http://{self.name}.{NAMESPACE}.svc.cluster.local:{self.port}/v1"


def read(file: Path) -> VllmSpec:
    """Read a spec. Raises `SpecError` with file, line and field."""
    data, lines = yamlfile.read(file)
    return yamlfile.validate(VllmSpec, data, lines, file)


def command(spec: VllmSpec, *, host: str = "127.0.0.1") -> list[str]:
    """Return the command that starts the server. vLLM's own default is to listen on every interface."""
    argv = ["vllm", "serve", spec.model, "--served-model-name", spec.served_name]
    argv += ["--host", host, "--port", str(spec.port)]
    if spec.revision:
        argv += ["--revision", spec.revision]
    argv += ["--tensor-parallel-size", str(spec.tensor_parallel_size)]
    argv += ["--gpu-memory-utilization", f"{spec.gpu_memory_utilization:g}"]
    if spec.max_model_len is not None:
        argv += ["--max-model-len", str(spec.max_model_len)]
    argv += ["--max-num-seqs", str(spec.max_num_seqs)]
    argv.append("--enable-prefix-caching" if spec.enable_prefix_caching else "--no-enable-prefix-caching")
    if spec.quantization:
        argv += ["--quantization", spec.quantization]
    argv += ["--dtype", spec.dtype]
    # Told to stop, it writes to the end what it has begun. Requests are no news.
    argv += ["--shutdown-timeout", str(DRAIN_S), "--disable-uvicorn-access-log"]
    for flag, value in sorted(spec.extra.items()):
        argv += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return argv


def environment() -> dict[str, str]:
    """Return the variables that every vLLM of ours has: it reports its use to its makers otherwise."""
    return {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def manifest(spec: VllmSpec, where: Platform) -> list[dict[str, Any]]:
    """Return the server as documents for Kubernetes: ServiceAccount, Service, Deployment and its NetworkPolicies.

    Raises `SpecError` for a compute class that does not fit.
    """
    compute = _compute(spec, where)
    labels = {"app.kubernetes.io/name": spec.name}
    metadata = {"name": spec.name, "namespace": NAMESPACE, "labels": labels}
    pod = {
        "serviceAccountName": f"orrery-{spec.name}",
        **_pod(spec, where, compute),
        "priorityClassName": spec.priority_class,
        "terminationGracePeriodSeconds": DRAIN_S + 30,
        "containers": [_server(spec, compute, host="0.0.0.0")],  # noqa: S104 - its pod's; policies say who may reach it
    }
    annotations = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(spec.port),
        "prometheus.io/path": "/metrics",
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": f"orrery-{spec.name}", "namespace": NAMESPACE},
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": labels, "ports": [{"name": "http", "port": spec.port}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": spec.replicas,
                # A second server beside the old one would wait for a GPU that the old one holds.
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
            },
        },
        *_policies(spec, where, labels),
    ]


def job(
    spec: VllmSpec, where: Platform, *, prompts: str, answers: str, max_tokens: int = 256, parallel: int = 32
) -> list[dict[str, Any]]:
    """Return a Job that answers a file of prompts with a vLLM of its own, and gives the GPU back.

    The server is a sidecar: an init container that stays (Kubernetes 1.29). `orrery.llm.batch` goes on where an earlier
    attempt was lost. Raises `SpecError` for a compute class that does not fit, or a folder instead of a bucket.
    """
    compute, cluster = _compute(spec, where), where.kubernetes
    for uri in (prompts, answers):
        if not uri.startswith("s3://") or has_secret(uri):
            raise SpecError(f"{uri!r}: a pod reaches a bucket only", hint="s3://bucket/path, without a password")
    name = f"{spec.name}-batch"
    labels = {"app.kubernetes.io/name": name}
    argv = ["python", "-m", "orrery.llm.batch", "--prompts", prompts, "--answers", answers]
    argv += ["--url", f"http://127.0.0.1:{spec.port}/v1", "--model", spec.served_name]
    argv += ["--max-tokens", str(max_tokens), "--parallel", str(parallel)]
    secret = [{"secretRef": {"name": cluster.secret}}] if cluster.secret else []
    asking = {
        "name": "batch",
        "image": where.environments["rag"].image,
        "command": argv,
        "env": [{"name": "HOME", "value": SCRATCH}, {"name": "ORRERY_LOG", "value": "json"}],
        "envFrom": secret,
        "resources": {
            "requests": {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "256Mi"},
            "limits": {"memory": "1Gi", "ephemeral-storage": "1Gi"},
        },
        "securityContext": _restricted(),
        "volumeMounts": [{"name": "scratch", "mountPath": SCRATCH}],
    }
    server = {**_server(spec, compute, host="127.0.0.1", key=False), "restartPolicy": "Always"}
    for probe in ("readinessProbe", "livenessProbe"):
        server.pop(probe)
    # On loopback, where the kubelet's own requests do not reach it.
    code = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{spec.port}/health', timeout=4)"
    server["startupProbe"] = {**server["startupProbe"], "exec": {"command": ["python3", "-c", code]}}
    server["startupProbe"].pop("httpGet")
    pod = {
        "serviceAccountName": compute.service_account or cluster.service_account,
        **_pod(spec, where, compute),
        **({"priorityClassName": compute.priority_class} if compute.priority_class else {}),
        "restartPolicy": "Never",
        "initContainers": [server],
        "containers": [asking],
    }
    metadata = {"name": name, "namespace": cluster.namespace, "labels": labels}
    return [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata,
            "spec": {
                "activeDeadlineSeconds": seconds(compute.timeout),
                "ttlSecondsAfterFinished": 86_400,
                "backoffLimit": 3,
                "podFailurePolicy": {
                    "rules": [
                        # 64: someone must act, so another attempt would only pay for the GPU again.
                        {
                            "action": "FailJob",
                            "onExitCodes": {"containerName": "batch", "operator": "In", "values": [64]},
                        },
                        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    ]
                },
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata,
            "spec": {
                "podSelector": {"matchLabels": labels},
                "policyTypes": ["Egress"],
                "egress": [_names(), _internet()],
            },
        },
    ]


def heading(spec: VllmSpec) -> str:
    """Return the words above a manifest: where it comes from, and how platform.yaml names it."""
    return (
        f"vLLM: {spec.model} as {spec.served_name}. Written by `orrery llm manifest` from its spec: change that.\n"
        "In platform.yaml, and VLLM_API_KEY in the Secret of the steps and of whatever else asks:\n"
        f"llms: {{{spec.name}: {{url: {spec.url}, model: {spec.served_name}, key_env: VLLM_API_KEY}}}}"
    )


def to_yaml(documents: list[dict[str, Any]], heading: str = "") -> str:
    """Return documents as one YAML file, with a heading of comment lines."""
    comment = "".join(f"# {line}\n" for line in heading.splitlines())
    return comment + str(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120))


class _Dumper(yaml.SafeDumper):
    """Without anchors: what is said twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """Tell that nothing is an alias."""
        return True


def _compute(spec: VllmSpec, where: Platform) -> Compute:
    compute = where.compute_class(spec.compute)
    if compute.gpu != spec.gpus:
        raise SpecError(
            f"compute class {spec.compute!r} has {compute.gpu} GPUs, and the server wants {spec.gpus} "
            "(tensor_parallel_size × pipeline-parallel-size)",
            hint="a class with as many, in platform.yaml (compute)",
        )
    if compute.pods > 1 or compute.sagemaker is not None:
        raise SpecError(
            f"compute class {spec.compute!r} is not for one pod", hint="a class without `pods` and `sagemaker`"
        )
    return compute


def _pod(spec: VllmSpec, where: Platform, compute: Compute) -> dict[str, Any]:
    """Return what does not depend on who else is in the pod."""
    spot = where.kubernetes.spot if compute.spot else None
    tolerations: list[Toleration] = [*compute.tolerations, *(spot.tolerations if spot else ())]
    cache = (
        {"persistentVolumeClaim": {"claimName": spec.claim}}
        if spec.claim
        else {"emptyDir": {"sizeLimit": compute.storage}}
    )
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        # Kubernetes sets VLLM_PORT=tcp://… for a Service that is called vllm, and vLLM reads its own port from it.
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,  # the image's own is root
            "runAsGroup": 0,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "nodeSelector": {**(spot.node_selector if spot else {}), **compute.node_selector},
        "tolerations": [t.model_dump(by_alias=True, exclude_none=True) for t in tolerations],
        "volumes": [
            {"name": "cache", **cache},
            {"name": "scratch", "emptyDir": {"sizeLimit": "4Gi"}},
            # Through which the processes of tensor parallelism talk; the default has 64 MB.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": compute.shared_memory}},
        ],
    }
    if where.kubernetes.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in where.kubernetes.pull_secrets]
    return pod


def _server(spec: VllmSpec, compute: Compute, *, host: str, key: bool = True) -> dict[str, Any]:
    """Return vLLM's container."""
    health = {"httpGet": {"path": "/health", "port": "http"}}
    fixed = {
        **environment(),
        # Its folders: the image's own file system is read-only, and its user has no home.
        "HOME": SCRATCH,
        "USER": "vllm",
        "HF_HOME": f"{CACHE}/huggingface",
        "VLLM_CACHE_ROOT": f"{CACHE}/vllm",
        "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
        "TRITON_CACHE_DIR": f"{CACHE}/triton",
    }
    secrets = [("VLLM_API_KEY", "api-key", False)] if key else []
    if spec.model.startswith("s3://"):
        fields = ("aws-access-key-id", "aws-secret-access-key", "aws-endpoint-url")
        secrets += [(field.replace("-", "_").upper(), field, True) for field in fields]
    elif not spec.model.startswith("/"):
        secrets.append(("HF_TOKEN", "hf-token", True))
    return {
        "name": "vllm",
        "image": spec.image,
        "command": command(spec, host=host),
        "env": [{"name": name, "value": value} for name, value in fixed.items()]
        + [
            {
                "name": name,
                "valueFrom": {
                    "secretKeyRef": {"name": spec.secret, "key": field, **({"optional": True} if optional else {})}
                },
            }
            for name, field, optional in secrets
        ],
        "ports": [{"name": "http", "containerPort": spec.port}],
        # Weights are fetched and read, graphs compiled: half an hour for large ones.
        "startupProbe": {**health, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 180},
        "readinessProbe": {**health, "periodSeconds": 10, "timeoutSeconds": 5},
        # It answers 503 when its engine has died, which it does not get over.
        "livenessProbe": {**health, "periodSeconds": 15, "timeoutSeconds": 10, "failureThreshold": 4},
        "resources": {
            "requests": {"cpu": compute.cpu, "memory": compute.memory, "ephemeral-storage": compute.storage},
            "limits": {
                "memory": compute.memory,
                "ephemeral-storage": compute.storage,
                **({compute.gpu_resource: str(compute.gpu)} if compute.gpu else {}),
            },
        },
        "securityContext": _restricted(),
        "volumeMounts": [
            {"name": "cache", "mountPath": CACHE},
            {"name": "scratch", "mountPath": SCRATCH},
            {"name": "shared-memory", "mountPath": SHARED_MEMORY},
        ],
    }


def _restricted() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _policies(spec: VllmSpec, where: Platform, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return who may ask it (steps, and pods that are labelled so), and where it may go: for weights, else nowhere."""
    steps = where.kubernetes.namespace
    unit = {"matchExpressions": [{"key": "orrery/unit", "operator": "Exists"}]}
    ports = [{"protocol": "TCP", "port": spec.port}]
    own = {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [
                    {"podSelector": {"matchLabels": {ASKS: "true"}}},
                    {"namespaceSelector": _namespace(steps), "podSelector": unit},
                ],
                "ports": ports,
            }
        ],
        "egress": [] if spec.model.startswith("/") else [_names(), _internet()],
    }
    towards = {
        "podSelector": unit,
        "policyTypes": ["Egress"],
        "egress": [
            {
                "to": [{"namespaceSelector": _namespace(NAMESPACE), "podSelector": {"matchLabels": labels}}],
                "ports": ports,
            }
        ],
    }
    kind = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    return [
        {**kind, "metadata": {"name": spec.name, "namespace": NAMESPACE}, "spec": own},
        {**kind, "metadata": {"name": f"steps-{spec.name}", "namespace": steps}, "spec": towards},
    ]


def _namespace(name: str) -> dict[str, Any]:
    return {"matchLabels": {"kubernetes.io/metadata.name": name}}


def _names() -> dict[str, Any]:
    dns = {"namespaceSelector": _namespace("kube-system"), "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}
    return {"to": [dns], "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}


def _internet() -> dict[str, Any]:
    """TLS to anywhere but private networks and the machine's metadata: a hub and a bucket have no fixed address."""
    private = ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"]
    return {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": private}}], "ports": [{"protocol": "TCP", "port": 443}]}
