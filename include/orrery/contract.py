"""The step contract: the config a step is given, the result it leaves, and the catalogue of verbs. Light.

`orrery step --config URI --result URI` is the same argv on a laptop and in a pod. The config holds no
secret; the result document is the truth and the exit code a hint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orrery.errors import RequestError
from orrery.store import Ref

Kind = Literal["model", "knowledge_base"]
Status = Literal["done", "user", "try_again", "interrupted", "bug"]
STATUS_OF_CODE: dict[int, Status] = {0: "done", 64: "user", 75: "try_again", 143: "interrupted"}


class Params(BaseModel):
    """Base of what one verb is told beyond its inputs; part of the fingerprint, but for the verb's `hints`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SourceRef(BaseModel):
    """One source of one partition, placeholders filled in. Credentials of a table come in the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    uri: str | None = None
    format: Literal["parquet", "csv"] | None = None
    table: str | None = None
    time_column: str | None = None
    secret_env: str | None = None


class IngestParams(Params):
    """`ingest`: where each source of the partition is."""

    sources: dict[str, SourceRef]


class ValidateParams(Params):
    """`validate` is told everything by the spec."""


class MaterializeParams(Params):
    """`materialize`: where the feature store is (a hint: it changes no feature); used when the spec says `online`."""

    feast_registry: str = ""
    feast_online: str = ""


class TrainParams(Params):
    """`train`: processes and seed are part of the weights; the rest comes from the spec and model.py."""

    processes: int = 1
    seed: int = 0
    overrides: dict[str, Any] = Field(default_factory=dict)
    interruptions: int = Field(0, ge=0, description="Of this project's newest trainings on this class (a hint).")
    observed_s: float = Field(0.0, ge=0, description="Seconds that these trainings ran (a hint).")


class TrialParams(Params):
    """`trial`: which one of its study. What it varies, and how often, the spec and model.py say.

    `storage` is where the study is kept, `trials` the addresses of the study's trials by number (hints).
    """

    number: int = Field(ge=0)
    study: str = Field(pattern=r"^[0-9a-f]{32}$")
    storage: str = ""
    trials: tuple[str, ...] = ()


class TuneParams(Params):
    """`tune`: the study it decides, and draws of the bootstrap."""

    study: str = Field(pattern=r"^[0-9a-f]{32}$")
    storage: str = ""
    trials: tuple[str, ...] = ()
    seed: int = 0
    draws: int = 1000


class EvaluateParams(Params):
    """`evaluate`: seed of the bootstrap and its number of draws."""

    seed: int = 0
    draws: int = 1000


class GateParams(Params):
    """`gate` is told everything by the spec and the evaluation."""


class RegisterParams(Params):
    """`register`: who and why, for the registry's tags."""

    actor: str = "unknown"
    reason: str = ""


class PromoteParams(Params):
    """`promote` and `rollback`: the version wanted, and the one before."""

    version: str
    previous: str | None = None
    actor: str = "unknown"
    reason: str = ""


class ScoreParams(Params):
    """`score`: the model version that is written beside every score, and where Spark runs (hints)."""

    model_version: str
    spark_master: str = "local[*]"
    spark_conf: dict[str, str] = Field(default_factory=dict)


# How many earlier partitions a monitor's verdict may look at.
LOOK_BACK = 6


class MonitorParams(Params):
    """`monitor` is told everything by the spec and its inputs."""


class ReportParams(Params):
    """`report`: how many rows of each side Evidently draws on, and the seed of that draw."""

    rows: int = Field(20_000, ge=100)
    seed: int = 0


@dataclass(frozen=True)
class Verb:
    """One kind of step.

    `module` holds `run(work, params)`; `effect` marks a step that drives something outside to a desired
    state and so is never skipped; `dataset` is what its output is published as, per partition or window;
    `scope` tells whether it works on a partition or a window; `hints` are params outside the fingerprint;
    `by_address`: its inputs count by their manifest and not by their content alone, since it reads what was
    measured beside the content (the gate: latency). `spreads`: it can work in several pods at once, see `Node`.
    """

    name: str
    module: str
    environment: str
    params: type[Params]
    scope: Literal["partition", "window"]
    dataset: str | None = None
    effect: bool = False
    observes: bool = False
    by_address: bool = False
    spreads: bool = False
    compute: str = "cpu-light"
    hints: frozenset[str] = field(default_factory=frozenset)


VERBS: dict[str, Verb] = {
    v.name: v
    for v in (
        Verb(
            "ingest",
            "orrery.data.ingest",
            "ml",
            IngestParams,
            "partition",
            "raw",
            observes=True,
            hints=frozenset({"sources"}),
        ),
        Verb("validate", "orrery.data.validate", "ml", ValidateParams, "partition", "clean"),
        Verb(
            "materialize",
            "orrery.features.materialize",
            "ml",
            MaterializeParams,
            "partition",
            "features",
            hints=frozenset({"feast_registry", "feast_online"}),
        ),
        Verb(
            "train",
            "orrery.training.train",
            "ml",
            TrainParams,
            "window",
            "candidate",
            spreads=True,
            compute="cpu-small",
            # They say how often to save, which changes no weight.
            hints=frozenset({"interruptions", "observed_s"}),
        ),
        Verb(
            "trial",
            "orrery.tuning.trial",
            "ml",
            TrialParams,
            "window",
            compute="cpu-small",
            hints=frozenset({"storage", "trials"}),
        ),
        Verb("tune", "orrery.tuning.tune", "ml", TuneParams, "window", "tuned", hints=frozenset({"storage", "trials"})),
        Verb("evaluate", "orrery.evaluation.evaluate", "ml", EvaluateParams, "window", "evaluation"),
        Verb("gate", "orrery.evaluation.gate", "ml", GateParams, "window", "verdict", by_address=True),
        Verb("register", "orrery.registry.register", "ml", RegisterParams, "window", effect=True),
        Verb("promote", "orrery.registry.promote", "ml", PromoteParams, "window", effect=True),
        Verb("rollback", "orrery.registry.rollback", "ml", PromoteParams, "window", effect=True),
        Verb(
            "score",
            "orrery.scoring.score",
            "spark",
            ScoreParams,
            "partition",
            "scores",
            compute="cpu-small",
            hints=frozenset({"spark_master", "spark_conf"}),
        ),
        Verb("monitor", "orrery.monitoring.monitor", "ml", MonitorParams, "partition", "health"),
        Verb("report", "orrery.monitoring.report", "ml", ReportParams, "partition", "report"),
    )
}


# How long the nodes of a training wait for each other where nobody says: machines may come minutes apart.
PATIENCE_S = 900


@dataclass(frozen=True)
class Node:
    """Which part of a step this process does, where the step has several pods: number `number` of `of`.

    Node 0 leads: it alone holds the lease, commits and writes result.json. The others work along with it and write
    `result-<number>.json`, which nobody waits for. `master` is node 0's address, host:port; `patience` the seconds that
    they wait for each other at the beginning.
    """

    number: int = 0
    of: int = 1
    master: str = ""
    patience: float = PATIENCE_S

    @property
    def leads(self) -> bool:
        """Whether this one commits."""
        return self.number == 0

    @classmethod
    def here(cls, given: Mapping[str, str]) -> Node:
        """Return what a process's environment says: ORRERY_NODES, ORRERY_NODE, ORRERY_MASTER and ORRERY_PATIENCE.

        Kubeflow's operator tells its pods RANK, MASTER_ADDR and MASTER_PORT, which are taken where ours are missing.
        Raises `RequestError` when they do not fit together.
        """
        of = _number(given, "ORRERY_NODES", "1")
        if of == 1:
            return cls()
        number = _number(given, "ORRERY_NODE", given.get("RANK", ""))
        master = given.get("ORRERY_MASTER") or ":".join(given.get(n, "") for n in ("MASTER_ADDR", "MASTER_PORT"))
        host, _, port = master.rpartition(":")
        if not 0 <= number < of or not host or not port.isdecimal():
            raise RequestError(
                f"ORRERY_NODES={of}, ORRERY_NODE={number}, ORRERY_MASTER={master!r} do not fit together",
                hint="a node is one of 0 to ORRERY_NODES - 1, and the master's address is host:port",
            )
        return cls(number, of, master, _number(given, "ORRERY_PATIENCE", str(PATIENCE_S)))


def refuse_uneven(processes: int, pods: int, compute: str = "") -> None:
    """Raise `RequestError`, with both fields, when a training's processes cannot be spread evenly over its pods."""
    if processes % pods:
        below, where = processes // pods * pods, f"of compute class {compute!r} " if compute else ""
        several = f"{below} or {below + pods}" if below else str(pods)
        raise RequestError(
            f"train.processes {processes} cannot be spread over the pods {where}({pods}): each has the same number",
            hint=f"train.processes: {several}, or another train.compute",
        )


def _number(given: Mapping[str, str], name: str, otherwise: str) -> int:
    text = given.get(name) or otherwise
    if not text.isdecimal():
        raise RequestError(f"{name} is {text!r}; it must be a whole number")
    return int(text)


class StepConfig(BaseModel):
    """Everything one attempt of a step is told. Frozen, small, no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    project: str
    kind: Kind = "model"
    verb: str
    key: str = Field(description="The partition, or the window as first..last.")
    partitions: tuple[str, ...] = Field(description="The partitions that the key covers.")
    sample: float = Field(
        1.0, gt=0, le=1, description="Share of the rows' keys, by hash; below 1 nothing is published."
    )
    publish: bool = Field(True, description="Make the output its dataset's partition; not for samples and repeats.")
    params: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, tuple[Ref, ...]] = Field(default_factory=dict)
    store: str
    bundle: str = Field(description="Digest of the project folder.")
    address: str | None = Field(None, description="Where the output is committed; none for effects and observations.")
    fingerprint: dict[str, str] = Field(default_factory=dict)
    run: str = Field(description="The Airflow run, or a name that the command line made.")
    task: str
    attempt: int = 1
    folder: str = Field(description="Of this attempt, in the store: config, result, evidence.")
    requested: str = Field("", description="When the run was asked for, ISO 8601; written down, never computed with.")


class StepError(BaseModel):
    """Why a step did not end well."""

    model_config = ConfigDict(extra="forbid")
    kind: str
    message: str
    hint: str = ""
    details: dict[str, Any] = Field(default_factory=dict)


class Result(BaseModel):
    """What a step leaves: small JSON. Numbers that are not finite are left out, and said in `reasons`."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    status: Status = "done"
    verdict: str | None = None
    reasons: list[str] = Field(default_factory=list)
    metrics: dict[str, float] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)
    links: dict[str, str] = Field(default_factory=dict, description="Store paths or URLs of what people would look at.")
    output: str | None = Field(None, description="Store path of the manifest.")
    digest: str | None = None
    skipped: str | None = Field(None, description="Why no work was done.")
    seconds: dict[str, float] = Field(default_factory=dict, description="start, import, work, commit, total.")
    error: StepError | None = None

    def drop_not_finite(self) -> None:
        """Leave out metrics that JSON cannot hold, and say so: nothing may read a missing number as a good one."""
        for name in [n for n, value in self.metrics.items() if not math.isfinite(value)]:
            self.reasons.append(f"metric {name} is not a finite number: {self.metrics.pop(name)}")
