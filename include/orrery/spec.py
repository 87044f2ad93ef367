"""What a user may declare in `include/projects/<name>/spec.yaml`. Light: no ML library, no Airflow.

Every model here is frozen and refuses unknown keys; an error names file, line, field, value and what is
allowed (`orrery check`). `orrery check --schema` prints the JSON schema for an editor.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from orrery import yamlfile
from orrery.errors import RequestError, SpecError, nearest
from orrery.fields import (
    COLUMN,
    NAME,
    SCHEDULES,
    UNITS,
    Column,
    ComputeName,
    Cron,
    Duration,
    Frozen,
    Name,
    part,
    seconds,
)
from orrery.partitions import Grain, parse
from orrery.rag.spec import KnowledgeBaseSpec
from orrery.uri import has_secret

__all__ = [
    "COLUMN",
    "NAME",
    "UNITS",
    "Column",
    "ComputeName",
    "Cron",
    "Duration",
    "Frozen",
    "KnowledgeBaseSpec",
    "Name",
    "seconds",
]


class Label(Frozen):
    """What the model predicts, and when the truth is known."""

    column: Name = Field(description="The name of the label, for people: on plots and in the registry.")
    delay: Duration = Field(
        "1d", description="How long after a partition ends its last labels are known: monitoring waits for it."
    )


class Source(Frozen):
    """One source of raw data: Parquet or CSV at a URI, or a table of a database."""

    uri: str | None = Field(None, description="URI with {partition}, and ${data} for the platform's data root.")
    table: str | None = Field(None, description="`schema.table` or `table`; needs `connection` and `time_column`.")
    connection: str | None = Field(None, description="Airflow connection id; its URL reaches only the ingest step.")
    time_column: Column | None = Field(
        None, description="The table's timestamp column that assigns rows to partitions."
    )
    partition: Grain | Literal["none"] = Field("month", description="How it lands; `none`: one file, whole each time.")
    format: Literal["parquet", "csv"] | None = Field(None, description="By the file's ending when not given.")

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.uri is None) == (self.table is None):
            raise ValueError("give exactly one of `uri` and `table`")
        if self.table is not None:
            if not self.connection or not self.time_column:
                raise ValueError("`table` needs `connection` and `time_column`")
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?", self.table):
                raise ValueError("`table` is `table` or `schema.table`, letters, digits and _ only")
        if self.uri is not None:
            if has_secret(self.uri):
                raise ValueError(
                    "a password must not stand in `uri`: give it in the environment of the steps "
                    "(AWS_ACCESS_KEY_ID, …), or read a `table` by an Airflow `connection`"
                )
            names = set(re.findall(r"(?<!\$)\{([^}]*)\}", self.uri))
            if names - {"partition"}:
                raise ValueError(f"unknown placeholder {sorted(names - {'partition'})}; allowed: {{partition}}")
            if self.partition != "none" and "partition" not in names:
                raise ValueError("a partitioned source needs {partition} in its uri (or `partition: none`)")
        return self


class ColumnCheck(Frozen):
    """What one column must be. A row that breaks it is quarantined with the reason, never lost."""

    type: Literal["string", "number", "integer", "timestamp", "boolean"] | None = Field(
        None, description="The type's family."
    )
    nulls: float | None = Field(
        None, ge=0, le=1, description="Largest share of missing values; no row is quarantined for it."
    )
    required: bool = Field(False, description="A missing value quarantines its row.")
    between: tuple[float | None, float | None] | None = Field(
        None, description="[low, high], both included; null: open."
    )
    values: tuple[str | int | float | bool, ...] | None = Field(
        None, alias="in", description="The only values allowed."
    )
    matches: str | None = Field(None, description="A regular expression that the whole value must match.")
    mostly: float = Field(0.99, ge=0, le=1, description="The check fails when a smaller share of rows keeps it.")
    severity: Literal["error", "warning"] = Field("error", description="error: the step ends 64; warning: a note.")
    model_config = ConfigDict(populate_by_name=True)

    @field_validator("between")
    @classmethod
    def _ordered(cls, value: tuple[float | None, float | None] | None) -> tuple[float | None, float | None] | None:
        if value and value[0] is not None and value[1] is not None and value[0] > value[1]:
            raise ValueError(f"low {value[0]} is above high {value[1]}")
        return value

    @field_validator("matches")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as e:
                raise ValueError(f"not a regular expression: {e}") from None
        return value


class RawExpectation(Frozen):
    """A Great Expectations expectation, passed through as it is."""

    type: Annotated[str, StringConstraints(pattern=r"^expect_[a-z0-9_]+$")]
    kwargs: dict[str, Any] = Field(default_factory=dict)
    severity: Literal["error", "warning"] = "error"


class Checks(Frozen):
    """Checks of one source: about the table, its columns, and raw Great Expectations."""

    unique: tuple[Column, ...] = Field(
        (), description="The key: a row that repeats it is quarantined (the first stays)."
    )
    min_rows: int | None = Field(None, ge=0, description="Fewest rows in a partition.")
    max_rows: int | None = Field(None, ge=0, description="Most rows in a partition.")
    min_class_share: dict[Column, Annotated[float, Field(gt=0, le=0.5)]] = Field(
        default_factory=dict, description="Per column: the smallest share that its rarest value may have."
    )
    columns: dict[Column, ColumnCheck] = Field(default_factory=dict)
    expectations: tuple[RawExpectation, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        """Lift `distance: {between: [0, 6000]}` into `columns`, and a single `unique: id` into a list."""
        if not isinstance(data, dict):
            return data
        own = set(cls.model_fields)
        columns = data.get("columns") or {}
        if not isinstance(columns, dict):
            raise ValueError(f"`columns` is a mapping of columns to their checks, not {columns!r}")
        out: dict[str, Any] = {"columns": dict(columns)}
        for key, value in data.items():
            if key == "unique" and isinstance(value, str):
                out["unique"] = (value,)
            elif key == "columns":
                continue
            elif key in own:
                out[key] = value
            elif isinstance(value, dict) or value is None:
                out["columns"][key] = value or {}
            else:
                options = nearest(str(key), own)
                raise yamlfile.Inside((key,), f"unknown check {key!r}; {options}; or a column with its checks")
        return out


class Bound(Frozen):
    """A floor or a ceiling of one metric."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _some(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("give `min`, `max` or both")
        return self


class Disparity(Frozen):
    """How far apart the groups of one attribute may be.

    `error`: in mean error (prediction less label; multiclass: the share that is wrong), so that no group is served
    worse than another. `flagged` (binary): in the share flagged, whatever the groups' true rates are.
    """

    by: Column
    max: float = Field(gt=0, description="Largest difference between two groups of at least `min_rows` rows.")
    of: Literal["error", "flagged"] = "error"
    min_rows: int = Field(200, ge=1)


class Checkpoint(Frozen):
    """When a training saves what it needs to go on after an interruption, and how much of it is kept."""

    every: Literal["auto"] | Duration | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="A time (`5m`), a number of optimiser steps (`500`), or `auto`: Young's and Daly's interval, from "
        "the measured cost of a save and `interruptions`.",
    )
    keep: int = Field(2, ge=1, le=100, description="The newest checkpoints that are kept, beside the best weights'.")
    interruptions: Duration = Field(
        "15m", description="Mean time between interruptions that `auto` expects until it has seen this project's own."
    )
    within: Duration = Field("25s", description="What saving may take after SIGTERM; Kubernetes gives 30 s in all.")


class Spot(Frozen):
    """How long a training may stay on interruptible machines."""

    deadline: Duration | None = Field(None, description="From the run's first attempt until the model must be there.")
    max_interruptions: int = Field(20, ge=0, le=1000, description="After these the next attempt asks for `fallback`.")
    fallback: ComputeName | None = Field(
        None, description="On-demand compute class; none: the training fails when a limit is reached."
    )


class Tune(Frozen):
    """How parameters declared `tunable` are searched (Optuna)."""

    trials: int = Field(20, ge=1, le=1000)
    parallel: int = Field(2, ge=1, le=100, description="Trials at a time; the compute class's pool bounds them too.")
    prune: bool = Field(True, description="Stop a trial whose loss is above the median of the others at that epoch.")
    compute: ComputeName | None = Field(None, description="Compute class of a trial; by default that of `train`.")
    seed: int = Field(0, ge=0, le=2**31 - 1)


class Train(Frozen):
    """How the model is fitted."""

    window: int = Field(3, ge=1, le=400, description="How many partitions a training reads.")
    longest: int | None = Field(
        None, ge=1, le=400, description="Also read the partitions before, as far as there are, up to this many in all."
    )
    compute: ComputeName = Field("cpu-small", description="Compute class of platform.yaml.")
    processes: int = Field(1, ge=1, le=64, description="Processes that torchrun starts (data parallel).")
    strategy: Literal["auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero3"] = Field(
        "auto",
        description="What the processes share: ddp: each has all weights; fsdp: each a part of everything (FSDP2); "
        "zero1/2/3: DeepSpeed, optimizer state / and gradients / and weights in parts. auto: single or ddp.",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: the forward pass in bfloat16 (autocast).")
    microbatch: int | None = Field(
        None,
        ge=1,
        description="Most rows of one forward pass per process; the gradients of several make one step of the global "
        "batch. None: a process's whole share at once.",
    )
    clip: float | None = Field(None, gt=0, description="Largest norm of all gradients together.")
    compile: bool = Field(False, description="torch.compile the module (a minute or more once, for large models).")
    patience: int = Field(3, ge=1, le=1000, description="Epochs without a better loss on the tune part.")
    checkpoint: Checkpoint = Checkpoint()
    spot: Spot = Spot()
    budget: float | None = Field(
        None, gt=0, description="Most that one run's attempts may cost, in the platform's currency."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1)
    params: dict[str, Any] = Field(default_factory=dict, description="Values for model.py's Params, over its defaults.")

    @model_validator(mode="after")
    def _strategy_fits(self) -> Train:
        if self.strategy == "single" and self.processes != 1:
            raise ValueError(f"`strategy: single` has one process, `processes` is {self.processes}")
        return self

    @model_validator(mode="after")
    def _longest_is_longer(self) -> Train:
        if self.longest is not None and self.longest < self.window:
            raise ValueError(f"`longest` {self.longest} is below `window` {self.window}")
        return self


class Split(Frozen):
    """Shares of the window, in time order: what is left before them is fitted on."""

    tune: float = Field(0.10, gt=0, lt=0.5, description="Early stopping and calibration.")
    holdout: float = Field(0.15, gt=0, lt=0.5, description="Evaluation: later than all the rest, seen by nothing else.")


class Approval(Frozen):
    """A person says yes before a promotion: one of the spec's `approvers`, in Airflow's UI or by REST."""

    within: Duration = Field("2d", description="How long the question stands.")
    otherwise: Literal["keep", "promote"] = Field("keep", description="What happens when nobody has answered by then.")


class Retrain(Frozen):
    """What asks for a new training by itself; a person can at any time."""

    on: tuple[Literal["drift", "each", "quarterly", "manual"], ...] = Field(
        ("manual",),
        description="drift: the monitor's verdict; each: every partition that completes a window; quarterly: the three "
        "months of a quarter; manual: nothing.",
    )
    cron: Cron | None = Field(
        None, description="A cron (UTC) that asks as well, for the window that ends with the partition just ended."
    )

    @model_validator(mode="after")
    def _one_calendar(self) -> Retrain:
        calendars = [name for name in ("each", "quarterly") if name in self.on] + (["cron"] if self.cron else [])
        if len(calendars) > 1:
            raise ValueError(f"{' and '.join(calendars)} are two calendars: give one")
        return self


class Monitor(Frozen):
    """When the monitor's verdict is `watch` or `retrain`. The defaults are measured: orrery/monitoring/README.md."""

    effect: float | None = Field(
        None,
        gt=0,
        description="Smallest loss of the primary metric that a training is worth: in its own unit (auc 0.0125, "
        "log_loss 0.0125); rmse: as a share of the promise (0.05).",
    )
    persistence: int = Field(2, ge=1, le=6, description="Partitions in a row that must show it.")
    cooldown: int = Field(3, ge=0, le=6, description="Partitions after a verdict `retrain` before the next one.")
    labelled: float = Field(0.8, gt=0, le=1, description="Smallest share of rows with a label; below: no verdict.")


class Alerts(Frozen):
    """What the owner is told of, by the channels of platform.yaml."""

    late: Duration = Field("6h", description="A partition's scores are late when its run has not ended by then.")
    quarantine: float = Field(0.02, gt=0, le=1, description="Largest share of a partition's rows in quarantine.")
    stale: int = Field(12, ge=1, description="Partitions that a champion may be in use without a newer one.")
    refused: int = Field(3, ge=1, description="Candidates refused in a row.")


class Features(Frozen):
    """How far back features look, and where they go."""

    history: int = Field(1, ge=0, le=60, description="Earlier partitions whose rows feed the views (when they exist).")
    online: bool = Field(False, description="Push the views' latest rows to the online store whenever they are made.")


class ModelSpec(Frozen):
    """A model: `kind: model`."""

    version: Literal[1]
    kind: Literal["model"]
    owner: str = Field(min_length=1, max_length=100, description="The team that is called when it is red.")
    description: str = ""
    task: Literal["binary", "multiclass", "regression"]
    label: Label
    sources: dict[Name, Source] = Field(min_length=1, description="The first one is the rows' source.")
    checks: dict[str, Any] = Field(
        default_factory=dict, description="Of the rows' source; under a source's name, of that."
    )
    features: Features = Features()
    train: Train = Train()
    tune: Tune | None = Field(None, description="Search model.py's tunable parameters: adds the Dag `<project>.tune`.")
    split: Split = Split()
    gate: dict[str, Any] = Field(
        default_factory=dict, description="Bounds per metric, `disparity`, and `approval` (`human`, or its terms)."
    )
    retrain: Retrain = Retrain()
    monitor: Monitor = Monitor()
    alerts: Alerts = Alerts()
    approvers: tuple[Annotated[str, StringConstraints(min_length=1, max_length=100)], ...] = Field(
        (), description="User names in Airflow of the people who may approve a promotion (`gate.approval`)."
    )
    runbook: Annotated[str, StringConstraints(pattern=r"^https?://[^\s<>\"']+$")] | None = Field(
        None, description="Where an alert sends its reader; by default the Dag's page, which shows the Dag file's text."
    )
    watch: Duration | None = Field(
        None, description="Look at the sources this often for partitions that landed, and ingest them; none: by cron."
    )
    ends: str | None = Field(None, description="The last partition that will ever land: no schedule goes on after it.")
    schedule: Cron | None = Field(
        None,
        description="Cron of ingest (UTC), one tick per partition; the partition is the one just ended. By default at "
        "6:00 of the second day after a month or year, at 6:00 after a day, 15 minutes after an hour.",
    )

    @field_validator("sources")
    @classmethod
    def _one_grain(cls, value: dict[str, Source]) -> dict[str, Source]:
        grains = {s.partition for s in value.values()} - {"none"}
        if len(grains) != 1:
            raise ValueError(f"the sources must share one partition size; found {sorted(grains) or 'only `none`'}")
        if next(iter(value.values())).partition == "none":
            raise ValueError("the first source is the rows' and must be partitioned")
        return value

    @field_validator("gate")
    @classmethod
    def _gate(cls, value: dict[str, Any]) -> dict[str, Any]:
        for metric, bound in value.items():
            if metric not in METRICS and metric not in GATE_EXTRAS:
                options = nearest(str(metric), [*METRICS, *GATE_EXTRAS])
                raise yamlfile.Inside((metric,), f"unknown metric {metric!r}; {options}")
            if metric == "approval" and bound == "human":
                continue
            part(GATE_EXTRAS.get(metric, Bound), bound, metric)
        return value

    @model_validator(mode="after")
    def _checks_parse(self) -> ModelSpec:
        for name in self.sources:
            self.checks_of(name)
        return self

    @model_validator(mode="after")
    def _gate_is_of_the_task(self) -> ModelSpec:
        """Refuse a bound on a number that this task never has: no candidate could keep it."""
        allowed = [*TASK_METRICS[self.task], *EXPORT_METRICS, *GATE_EXTRAS]
        for metric in self.gate:
            if metric not in allowed:
                text = f"a {self.task} task has no {metric!r}; {nearest(metric, allowed)}"
                raise yamlfile.Inside(("gate", metric), text)
        return self

    @model_validator(mode="after")
    def _quarters_are_of_months(self) -> ModelSpec:
        if "quarterly" in self.retrain.on and self.grain != "month":
            raise yamlfile.Inside(("retrain", "on"), f"`quarterly` is for sources by month, these are by {self.grain}")
        return self

    @model_validator(mode="after")
    def _approval_has_approvers(self) -> ModelSpec:
        if "approval" in self.gate and not self.approvers:
            text = "nobody may approve: name the people in `approvers: [...]`, by their user names in Airflow"
            raise yamlfile.Inside(("gate", "approval"), text)
        return self

    @model_validator(mode="after")
    def _watch_has_files(self) -> ModelSpec:
        if self.watch and not any(s.uri and s.partition != "none" for s in self.sources.values()):
            text = "only sources with a `uri` by partition can be watched, and there is none"
            raise yamlfile.Inside(("watch",), text)
        return self

    @model_validator(mode="after")
    def _ends_with_a_partition(self) -> ModelSpec:
        if self.ends is not None:
            try:
                parse(self.ends, self.grain)
            except RequestError as e:
                raise yamlfile.Inside(("ends",), f"{e.message}; {e.hint}") from None
        return self

    @model_validator(mode="after")
    def _flagged_is_binary(self) -> ModelSpec:
        if self.task != "binary" and self.disparity is not None and self.disparity.of == "flagged":
            raise ValueError(f"gate.disparity.of: `flagged` is for a binary task, this one is {self.task}")
        return self

    @property
    def grain(self) -> Grain:
        """The partition size that the sources share."""
        return next(s.partition for s in self.sources.values() if s.partition != "none")

    @property
    def cron(self) -> str:
        """The cron of ingest, given or by the partition size."""
        return self.schedule or SCHEDULES[self.grain]

    @property
    def rows_source(self) -> str:
        """The source whose rows are predicted on."""
        return next(iter(self.sources))

    def checks_of(self, source: str) -> Checks:
        """Return the checks of one source (see `checks`)."""
        if source == self.rows_source:
            flat = {k: v for k, v in self.checks.items() if k not in self.sources}
            nested = self.checks.get(source) or {}
            if isinstance(nested, dict):
                return part(Checks, {**flat, **nested}, "checks", *([source] if nested else []))
        return part(Checks, self.checks.get(source) or {}, "checks", source)

    @property
    def bounds(self) -> dict[str, Bound]:
        """The gate's bounds by metric."""
        return {m: Bound.model_validate(b) for m, b in self.gate.items() if m not in GATE_EXTRAS}

    @property
    def approval(self) -> Approval | None:
        """How a person is asked before a promotion, or None."""
        if "approval" not in self.gate:
            return None
        asked = self.gate["approval"]
        return Approval() if asked == "human" else Approval.model_validate(asked)

    @property
    def disparity(self) -> Disparity | None:
        """The gate's bound on differences between groups."""
        return Disparity.model_validate(self.gate["disparity"]) if "disparity" in self.gate else None


# Metric -> True when higher is better. `p50_ms`, `p99_ms`: latency of one row; `size_mb`: of the export.
METRICS: dict[str, bool] = {
    "auc": True,
    "average_precision": True,
    "accuracy": True,
    "r2": True,
    "log_loss": False,
    "brier": False,
    "calibration_error": False,
    "rmse": False,
    "mae": False,
    "p50_ms": False,
    "p99_ms": False,
    "size_mb": False,
}
# What every export is measured by, and what each task's predictions are.
EXPORT_METRICS = ("p50_ms", "p99_ms", "size_mb")
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "binary": ("auc", "average_precision", "log_loss", "brier", "calibration_error", "accuracy"),
    "multiclass": ("log_loss", "accuracy"),
    "regression": ("rmse", "mae", "r2"),
}
# What `gate` may hold beside the bounds of metrics.
GATE_EXTRAS: dict[str, type[Disparity] | type[Approval]] = {"disparity": Disparity, "approval": Approval}
PRIMARY: dict[str, str] = {"binary": "auc", "multiclass": "log_loss", "regression": "rmse"}


Spec = ModelSpec | KnowledgeBaseSpec
KINDS: dict[str, type[ModelSpec] | type[KnowledgeBaseSpec]] = {
    "model": ModelSpec,
    "knowledge_base": KnowledgeBaseSpec,
}


def load(folder: Path) -> Spec:
    """Read and check `<folder>/spec.yaml`. Raises `SpecError` with file, line, field, value and what is allowed."""
    file = folder / "spec.yaml"
    data, lines = yamlfile.read(file)
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        shown = "is missing" if kind is None else f"is {kind!r}"
        raise SpecError(f"{file}:{lines.get(('kind',), 1)}: kind {shown}", hint=nearest(str(kind), KINDS))
    return yamlfile.validate(KINDS[kind], data, lines, file)


def load_model(folder: Path) -> ModelSpec:
    """Like `load`, for a project that must be a model."""
    spec = load(folder)
    if not isinstance(spec, ModelSpec):
        raise SpecError(f"{folder / 'spec.yaml'}: this is a {spec.kind}, not a model")
    return spec


def load_knowledge(folder: Path) -> KnowledgeBaseSpec:
    """Like `load`, for a project that must be a knowledge base."""
    spec = load(folder)
    if not isinstance(spec, KnowledgeBaseSpec):
        raise SpecError(f"{folder / 'spec.yaml'}: this is a {spec.kind}, not a knowledge base")
    return spec
