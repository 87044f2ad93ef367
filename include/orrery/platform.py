"""Where things run: `include/platform.yaml`, the platform team's file, and the `ORRERY_*` variables over it.

Steps never read this: what they need is in their config, and secrets are in their environment.
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from orrery import yamlfile
from orrery.errors import SpecError, UserError, nearest
from orrery.spec import NAME, ComputeName, Duration, Frozen, Name, seconds
from orrery.uri import absolute, has_secret

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$")]
Profile = Literal["local", "kubernetes"]
# The platform's addresses; each one's variable wins over the file.
ADDRESSES = {
    "store": "ORRERY_STORE",
    "ledger": "ORRERY_LEDGER",
    "mlflow": "ORRERY_MLFLOW",
    "data": "ORRERY_DATA",
    "tuning": "ORRERY_TUNING",
}
# Addresses that may be none.
OPTIONAL = {"qdrant": "ORRERY_QDRANT"}


def pinned(image: str) -> str:
    """Return an image's name. Raises `ValueError` when it has neither tag nor digest, or is `:latest`."""
    name = image.rsplit("/", 1)[-1]
    if not re.fullmatch(r"[^\s:@]+[:@][^\s]+", name) or name.endswith(":latest"):
        raise ValueError("an image needs a tag or a digest, and not :latest")
    return image


RoleArn = Annotated[str, StringConstraints(pattern=r"^arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9_+=,.@/-]{1,512}$")]


class SageMaker(Frozen):
    """A training job of Amazon SageMaker instead of a pod. With `spot` of its class it is a managed spot job."""

    role: RoleArn = Field(description="The job's execution role; it reads and writes the store, and pulls the image.")
    instance_type: Annotated[str, StringConstraints(pattern=r"^ml\.[a-z0-9-]+\.[a-z0-9]+$")]
    instance_count: Literal[1] = Field(1, description="One machine: a step's processes do not span several yet.")
    volume_gb: int = Field(30, ge=1, le=16384, description="Disk of the machine.")
    max_run: Duration = Field("24h", description="What all of the job's running may take, interruptions left out.")
    max_wait: Duration | None = Field(
        None, description="Spot: from the start to the end, waiting for machines included; none: twice `max_run`."
    )
    region: Annotated[str, StringConstraints(pattern=r"^[a-z]{2}(-[a-z]+)+-[0-9]$")] | None = Field(
        None, description="None: that of Airflow's AWS environment."
    )
    subnets: tuple[str, ...] = Field((), max_length=16)
    security_groups: tuple[str, ...] = Field((), max_length=5)
    poll: Duration = Field("30s", description="How often the triggerer asks how the job is.")

    @model_validator(mode="after")
    def _consistent(self) -> SageMaker:
        if self.max_wait is not None and seconds(self.max_wait) < seconds(self.max_run):
            raise ValueError(f"`max_wait` {self.max_wait} is below `max_run` {self.max_run}: it includes the running")
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("`subnets` and `security_groups` come together: a VPC needs both")
        return self


class Toleration(Frozen):
    """Which taint of a node a pod bears, in Kubernetes' own words."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    seconds: int | None = Field(None, alias="tolerationSeconds", ge=0, description="NoExecute: how long it is borne.")

    @model_validator(mode="after")
    def _consistent(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("`operator: Exists` takes no `value`")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("`operator: Equal` needs a `key`")
        if self.seconds is not None and self.effect != "NoExecute":  # Kubernetes refuses such a pod when it is made
            raise ValueError("`tolerationSeconds` needs `effect: NoExecute`")
        return self


class Compute(Frozen):
    """One compute class: what a step's pod asks for, and what it costs."""

    cpu: Quantity = "1"
    memory: Quantity = "2Gi"
    gpu: int = Field(0, ge=0, description="Per pod.")
    gpu_resource: str = Field("nvidia.com/gpu", description="What the cluster calls them.")
    image: str | None = Field(None, description="Instead of the environment's image.")
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    priority_class: str | None = Field(None, description="A PriorityClass of the cluster.")
    storage: Quantity = Field("10Gi", description="Of the node's disk, for /tmp: data on their way, torch's caches.")
    shared_memory: Quantity = Field("1Gi", description="Of /dev/shm, which ranks talk through; counts as memory.")
    service_account: str | None = None
    pods: int = Field(1, ge=1, le=64, description="Over how many pods `train.processes` are spread, alike on each.")
    spot: bool = Field(False, description="Interruptible machines.")
    grace: Duration | None = Field(
        None, description="From SIGTERM to SIGKILL. None: what the step needs to save its state, at least 30 s."
    )
    wait: Duration = Field("1h", description="How long it may wait for a machine, or for quota.")
    price_per_hour: float = Field(0.0, ge=0, description="In the platform's currency, for the ledger; 0: not known.")
    on_demand_price_per_hour: float | None = Field(
        None,
        gt=0,
        description="What the same machine costs when it is not `spot`; none: the fallback's price is taken.",
    )
    pool: Name | Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")] = "orrery-light"
    timeout: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(s|m|h)$")] = "2h"
    sagemaker: SageMaker | None = Field(None, description="Train as a SageMaker job, whatever the profile is.")

    @field_validator("image")
    @classmethod
    def _image_pinned(cls, value: str | None) -> str | None:
        return value if value is None else pinned(value)


class Environment(Frozen):
    """One set of dependencies: a virtual environment on a laptop, an image on a cluster."""

    image: str = Field(description="With a tag or digest; `:latest` is refused.")

    @field_validator("image")
    @classmethod
    def _pinned(cls, value: str) -> str:
        return pinned(value)


class Placement(Frozen):
    """Where pods may go."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()


class Kubernetes(Frozen):
    """How pods are made."""

    namespace: str = "orrery"
    connection: str | None = Field(None, description="Airflow connection of the cluster; none: in-cluster.")
    secret: str | None = Field(None, description="Name of the Secret whose keys become the steps' environment.")
    service_account: str = "orrery-step"
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    pull_secrets: tuple[str, ...] = Field((), description="Secrets of registries that want a password.")
    spot: Placement = Field(Placement(), description="Added to every compute class with `spot: true`.")
    silent_node: Duration = Field(
        "60s", description="A pod is given up when its node has been silent for so long (Kubernetes' default: 5 min)."
    )
    ranks: Literal["indexed-job", "pytorchjob"] = Field(
        "indexed-job", description="What a training over several pods is made of; pytorchjob needs Kubeflow's operator."
    )


class Spark(Frozen):
    """Where scoring runs."""

    master: str = "local[*]"
    conf: dict[str, str] = Field(default_factory=dict)


class Feast(Frozen):
    """The feature store's homes. SQLite under var/ by default; PostgreSQL or Redis by URL."""

    registry: str = Field("${root}/var/feast", description="Folder of the registry, or a SQLAlchemy URL.")
    online: str = Field("sqlite", description="`sqlite`, a postgresql:// URL or a redis:// URL.")

    @field_validator("registry", "online")
    @classmethod
    def _no_secret(cls, value: str) -> str:
        """These travel in a step's config, so a password is written as $NAME and read from the step's environment."""
        if has_secret(value, references=True):
            raise ValueError("a password must be written as $NAME, the name of a variable in the steps' environment")
        return value


ConnectionId = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,200}$")]
Address = Annotated[str, StringConstraints(pattern=r"^[^\s@<>,;:\"\\]{1,64}@[A-Za-z0-9.-]{1,190}$")]


class Email(Frozen):
    """Alerts by e-mail: an Airflow connection of type smtp (its extra holds `from_email`), and who reads them."""

    connection: ConnectionId
    to: tuple[Address, ...] = Field(min_length=1, max_length=50)


class Alerts(Frozen):
    """Where alerts go beside the ledger, the log and the run's note. What is secret of it is in the connections."""

    webhook: ConnectionId | None = Field(None, description="Airflow connection that each alert is POSTed to, as JSON.")
    email: Email | None = None


class Wandb(Frozen):
    """Weights & Biases beside MLflow. Its key comes from the steps' environment alone (WANDB_API_KEY)."""

    project: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]{0,127}$")]
    mode: Literal["offline", "online"] = Field(
        "offline", description="offline: files in the attempt's evidence, for `wandb sync`; online: sent as it goes."
    )
    entity: Annotated[str, StringConstraints(pattern=r"^[\w-]{1,128}$")] | None = None


class LanguageModel(Frozen):
    """A language model that speaks OpenAI's protocol: vLLM, TGI, Ollama, llama.cpp, or a hosted one."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$")] = Field(
        description="Its base, such as http://127.0.0.1:8090/v1."
    )
    model: str = Field(min_length=1, max_length=200, description="What the server calls it.")
    key_env: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]{0,100}$")] | None = Field(
        None, description="The environment variable that holds its key; none: it wants no key."
    )
    timeout: float = Field(20.0, gt=0, le=600, description="Seconds until an answer must be there.")
    context: int = Field(2048, ge=256, description="Tokens of prompt and answer together that it takes.")


class Retention(Frozen):
    """How long what is no longer needed stays, for `orrery housekeeping`. None: for ever."""

    attempts: Duration | None = Field(
        "90d", description="Config, result and pages of an attempt that has ended, since anything was written in it."
    )
    checkpoints: Duration | None = Field(
        "14d", description="Of a training that never finished, since its last sign of life."
    )
    outputs: Duration | None = Field(
        None,
        description="Outputs that nothing refers to: superseded ones, samples, repeats, trials of no search. Counted "
        "since they were made, used or superseded.",
    )
    leftovers: Duration = Field("2d", description="Half-written files of a step that is gone, since the last of them.")
    logs: Duration | None = Field(None, description="Airflow's task logs on this machine and in the store.")
    pods: Duration = Field("1h", description="Pods, Jobs and Services that no attempt will ask for again.")
    share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Of a project's outputs, or attempts, one run may remove. Of more: none, and it says so.",
    )

    @model_validator(mode="after")
    def _not_too_short(self) -> Retention:
        """A step lives for hours and a laptop sleeps for a night: what is younger may be in use."""
        for name, least in {
            "attempts": "7d",
            "checkpoints": "1d",
            "outputs": "7d",
            "leftovers": "1d",
            "pods": "10m",
        }.items():
            given = getattr(self, name)
            if given is not None and seconds(given) < seconds(least):
                raise ValueError(f"`{name}` {given} is below {least}: what is younger may still be used")
        return self


class Platform(Frozen):
    """The whole of platform.yaml."""

    version: Literal[1]
    stage: Literal["dev", "staging", "prod"] = "dev"
    store: str = "file://${root}/var/store"
    ledger: str = "sqlite:///${root}/var/ledger.db"
    mlflow: str = "http://127.0.0.1:${mlflow_port}"
    data: str = Field("file://${root}/var/upstream", description="What ${data} means in a source's uri.")
    tuning: str = Field(
        "${root}/var/tuning",
        description="Where searches keep their studies: a folder of this machine, or a postgresql:// URL.",
    )
    wandb: Wandb | None = None
    environments: dict[Name, Environment]
    compute: dict[ComputeName, Compute] = Field(min_length=1)
    kubernetes: Kubernetes = Kubernetes()
    spark: Spark = Spark()
    feast: Feast = Feast()
    qdrant: str | None = Field(
        None,
        description="URL of a Qdrant server, its key in ORRERY_QDRANT_KEY; none: generations are folders in the store.",
    )
    llms: dict[Name, LanguageModel] = Field(default_factory=dict, description="Language models by name.")
    alerts: Alerts = Alerts()
    retention: Retention = Retention()

    def compute_class(self, name: str) -> Compute:
        """Return a compute class. Raises `SpecError` that lists what there is."""
        if name not in self.compute:
            raise SpecError(f"compute class {name!r} is not in platform.yaml", hint=nearest(name, self.compute))
        return self.compute[name]


def home() -> Path:
    """Return the folder that holds include/, dags/ and var/: `ORRERY_HOME`, or where this package was cloned."""
    given = os.environ.get("ORRERY_HOME")
    if given:
        return Path(given).resolve()
    for folder in [*Path(__file__).resolve().parents, Path.cwd()]:
        if (folder / "include" / "platform.yaml").is_file():
            return folder
    raise UserError("cannot find include/platform.yaml", hint="set ORRERY_HOME to the folder that holds include/")


def projects_folder() -> Path:
    """Return the folder of the projects: `ORRERY_PROJECTS`, or include/projects."""
    given = os.environ.get("ORRERY_PROJECTS")
    return Path(given).resolve() if given else home() / "include" / "projects"


def project_folder(name: str) -> Path:
    """Return one project's folder. Raises `SpecError` for a name that is malformed or unknown."""
    folder = projects_folder()
    if not re.fullmatch(NAME, name, flags=re.ASCII) or not (folder / name / "spec.yaml").is_file():
        raise SpecError(f"there is no project {name[:80]!r} in {folder}", hint=nearest(name[:80], project_names()))
    return folder / name


def project_names() -> list[str]:
    """Return the names of all projects, sorted."""
    folder = projects_folder()
    if not folder.is_dir():
        return []
    return sorted(
        p.name
        for p in folder.iterdir()
        if re.fullmatch(r"[a-z][a-z0-9_]{0,62}", p.name) and (p / "spec.yaml").is_file()
    )


def profile() -> Profile:
    """Return how steps run: `ORRERY_PROFILE`, local by default."""
    value = os.environ.get("ORRERY_PROFILE", "local")
    if value not in ("local", "kubernetes"):
        raise SpecError(f"ORRERY_PROFILE is {value!r}", hint=nearest(value, ("local", "kubernetes")))
    return value  # type: ignore[return-value]


def substitute(text: str, values: dict[str, str], where: str) -> str:
    """Replace ${name} by `values`. Raises `SpecError` for a name that is not there."""

    def one(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in values:
            raise SpecError(f"{where}: ${{{name}}} is unknown", hint=nearest(name, values))
        return values[name]

    return re.sub(r"\$\{([^}]*)\}", one, text)


def load(file: Path | None = None) -> Platform:
    """Read platform.yaml (`ORRERY_PLATFORM` or include/platform.yaml) and apply the `ORRERY_*` variables."""
    file = file or Path(os.environ.get("ORRERY_PLATFORM") or home() / "include" / "platform.yaml")
    key = (
        str(file),
        str(home()),
        _port_of("mlflow", "5500"),
        _port_of("llm", "8090"),
        *(os.environ.get(v) for v in (*ADDRESSES.values(), *OPTIONAL.values(), "ORRERY_FEAST", "ORRERY_STAGE")),
    )
    try:
        return _load(key, file.stat().st_mtime_ns)
    except OSError as e:
        raise SpecError(f"{file}: {e.strerror}", hint="set ORRERY_PLATFORM") from None


def _port_of(server: str, otherwise: str) -> str:
    """Return where a local server listens: as it was started, from whatever shell is asked; else as it would be."""
    try:
        running = json.loads((home() / "var" / "run" / f"{server}.json").read_bytes())
        otherwise = str(int(running["port"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return os.environ.get(f"ORRERY_{server.upper()}_PORT") or otherwise


@lru_cache(maxsize=8)
def _load(key: tuple[str | None, ...], mtime: int) -> Platform:
    file, root = Path(str(key[0])), str(key[1])
    data, lines = yamlfile.read(file)
    for field, variable in {**ADDRESSES, **OPTIONAL, "stage": "ORRERY_STAGE"}.items():
        if os.environ.get(variable):
            data[field] = os.environ[variable]
    if os.environ.get("ORRERY_FEAST"):
        data["feast"] = {**(data.get("feast") or {}), "registry": os.environ["ORRERY_FEAST"]}
    platform = yamlfile.validate(Platform, data, lines, file)
    values = {"root": root, "mlflow_port": str(key[2]), "llm_port": str(key[3])}
    fields = {f: substitute(getattr(platform, f), values, f"{file}: {f}") for f in ADDRESSES}
    for field in ("store", "data"):
        if has_secret(fields[field]):
            where = ADDRESSES[field] if os.environ.get(ADDRESSES[field]) else f"{file}: {field}"
            raise SpecError(
                f"{where}: a password must not stand in it: it is written into configs, logs and the ledger",
                hint="give the credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
    if has_secret(fields["tuning"], references=True):
        raise SpecError(
            f"{file}: tuning: a password must be written as $NAME, a variable in the steps' environment",
            hint="such as postgresql://orrery:$TUNING_PASSWORD@host/optuna",
        )
    # The command line runs anywhere, a step runs in the home: both must mean the same place.
    fields |= {f: absolute(fields[f], Path(root)) for f in ("store", "data", "ledger", "tuning")}
    llms = {
        name: llm.model_copy(update={"url": substitute(llm.url, values, f"{file}: llms.{name}.url")})
        for name, llm in platform.llms.items()
    }
    registry = substitute(platform.feast.registry, values, f"{file}: feast.registry")
    feast = Feast(
        registry=registry if "://" in registry else str(Path(root) / registry),
        online=substitute(platform.feast.online, values, f"{file}: feast.online"),
    )
    return platform.model_copy(update={**fields, "feast": feast, "llms": llms})
