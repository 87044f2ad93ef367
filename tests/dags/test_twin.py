"""The twin against the cluster: the same failure, met by a pod on the test cluster and by a process here.

What Airflow is told, what the ledger keeps, which budget it costs and where the next attempt goes must not differ.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cluster.api import Cluster
from core_house import House, build, environment
from core_verbs import mark, wait_for
from test_pods import SPEC, Task, Waiting, _verbs, cluster, house

from orrery import attempts, budgets
from orrery.attempts import Attempt
from orrery.errors import OrreryError, RequestError, UserError
from orrery.local import LocalProcess
from orrery.orchestration import params
from orrery.orchestration.operators import StepOperator
from orrery.orchestration.pods import PodStepOperator
from orrery.orchestration.retry import BudgetPolicy
from orrery.placement import placement
from orrery.plan import Planner

__all__ = ["_verbs", "cluster", "house"]

PLATFORM = """\
version: 1
environments:
  airflow: {{image: "orrery/airflow:1"}}
compute:
  cpu-light: {{cpu: "1", memory: 1Gi, wait: 2s, timeout: 10m}}
  cpu-small: {{cpu: "1", memory: 2Gi, spot: true, grace: {grace}, wait: 2s, timeout: {timeout}}}
  firm: {{cpu: "1", memory: 2Gi}}
kubernetes:
  connection: cluster
  silent_node: 1s
"""


def settle(house: House, grace: str = "5s", timeout: str = "10m") -> None:
    """Write platform.yaml, and let the training move to `firm` after one interruption."""
    (house.home / "include" / "platform.yaml").write_text(PLATFORM.format(grace=grace, timeout=timeout))
    spec = SPEC.format(marks=house.marks).replace(
        "compute: cpu-small", "compute: cpu-small, spot: {max_interruptions: 1, fallback: firm}"
    )
    (house.folder / "spec.yaml").write_text(spec)


@dataclass(frozen=True)
class Met:
    """What came of a failure."""

    error: type[OrreryError]
    said: str
    ended: object
    by: str
    cause: str | None
    budget: str | None
    decision: str
    next_class: str


class Pair(Task):
    """The task in its two forms: a pod of the test cluster, a process here."""

    mode = "wait"

    def __init__(self, house: House, cluster: Any, verb: str) -> None:
        super().__init__(house, cluster, verb)
        if verb == "probe":
            self.run.dag_id, self.params = "delays.score", {"partition": "2013-01"}

    def _make(self, kind: type[StepOperator]) -> Any:
        operator = kind(task_id=self.verb, project="delays", verb=self.verb, compute="cpu-small")
        if self.verb == "probe":
            options = {"mode": self.mode, "marks": str(self.house.marks)}
            operator._options = lambda _: options  # type: ignore[method-assign]
        return operator

    def operator(self) -> PodStepOperator:
        return self._make(PodStepOperator)  # type: ignore[no-any-return]

    def process(self, faults: str) -> dict[str, Any]:
        """Carry the next attempt as a process, with faults."""
        self.number += 1
        self.params = {**(self.params or {"window": "2013-01..2013-01"}), "faults": faults}
        return dict(self._make(StepOperator).execute(self.context()))

    def begun(self) -> None:
        """Wait until the step is at work; a training until it has saved."""
        wait_for(self.house.marks / "started")
        if self.verb == "train":
            (folder,) = {str(p["metadata"]["annotations"]["orrery/folder"]) for p in self.cluster.pods()}
            while not (progress := attempts.progress_of(self.house.store, folder)) or progress.committed == 0:
                time.sleep(0.01)

    def met(self, error: OrreryError) -> Met:
        planner = Planner("delays")
        (payload,) = self.entries()
        attempt = Attempt.model_validate(payload["attempt"])
        decision = BudgetPolicy("delays", budgets.of(self.verb, planner.spec)).evaluate(error, 1, 99, self.context())
        place = placement([attempt], planner.spec.train, planner.platform.compute, datetime.now(UTC))
        said, ended = plain(payload["error"]), error.details.get("ended")
        # A pod that waits for its image shows its reasons in turn; one on a silent node is told to go in the end.
        by = "" if ended in ("image", "node_lost") else str(error.details.get("by"))
        return Met(type(error), said, ended, by, attempt.cause, attempt.spent, decision.action.name, place.compute)


def plain(message: str) -> str:
    """Return how a message begins, without what differs between two clusters: names and numbers."""
    begins = ":".join(message.replace("ImagePullBackOff", "ErrImagePull").split(":")[:2])
    return re.sub(r"delays-[\w-]+|node-a|rehearsal|\d+", "…", begins)


@dataclass(frozen=True)
class Way:
    """One failure on the cluster, and the fault that rehearses it."""

    fault: str
    lose: Callable[[Pair], object]
    before: bool = False
    mode: str = "wait"
    timeout: str = "10m"
    grace: str = "5s"


def no_image(task: Pair) -> None:
    file = task.house.home / "include" / "platform.yaml"
    file.write_text(file.read_text().replace("orrery/airflow:1", "orrery/none:1"))


def no_secret(task: Pair) -> None:
    with (task.house.home / "include" / "platform.yaml").open("a") as file:
        file.write("  secret: keys\n")


WAYS = [
    Way("preempt", lambda t: t.cluster.nodes.shutdown()),
    Way("evict", lambda t: t.cluster.nodes.drain()),
    Way("taint", lambda t: t.cluster.nodes.taint()),
    Way("delete", lambda t: t.cluster.nodes.delete(t.unit())),
    Way("oom", lambda t: t.cluster.nodes.oom(t.unit())),
    Way("node_lost", lambda t: t.cluster.nodes.power_off(deleted=False)),
    Way("deadline", lambda t: None, timeout="6s"),
    Way("evict", lambda t: t.cluster.nodes.drain(), mode="deaf", grace="1s"),
    Way("delete", lambda t: t.cluster.nodes.delete(t.unit()), mode="deaf", grace="1s"),
    Way("quota", lambda t: t.cluster.nodes.quota(), before=True),
    Way("unschedulable", lambda t: t.cluster.nodes.cordon(), before=True),
    Way("image", no_image, before=True),
    Way("config", no_secret, before=True),
]


# What a training makes of it differs where it has saved something (one that heeds no SIGTERM ends itself).
SAVED = ("preempt", "oom", "node_lost", "deadline")
CELLS = [
    (way, verb)
    for way in WAYS
    for verb in ("train", "probe")
    if verb == "probe" or (way.fault.partition("@")[0] in SAVED and way.mode != "deaf")
]


@pytest.mark.parametrize(("way", "verb"), CELLS, ids=lambda v: v if isinstance(v, str) else f"{v.fault}-{v.mode}")
def test_a_rehearsal_ends_as_the_thing_itself(
    way: Way, verb: str, house: House, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = on_the_cluster(way, verb, house, cluster)
    monkeypatch.setenv("ORRERY_PROFILE", "local")
    laptop = build(tmp_path / "laptop", SPEC)
    for name, value in environment(laptop).items():
        monkeypatch.setenv(name, value)
    clean = laptop.commit("validate", "clean", "2013-01")
    laptop.commit("materialize", "features", "2013-01", inputs={"clean": (clean.ref,)})
    here, task = on_the_laptop(way, verb, laptop, monkeypatch)
    assert here == there
    assert here.next_class == ("firm" if here.budget == "interruptions" else "cpu-small")
    # Once only: the next attempt meets nothing.
    mark(laptop.marks, "go")
    assert task.process(task.params["faults"])["skipped"] is None
    first, second = [Attempt.model_validate(e["attempt"]) for e in task.entries()]
    assert first.injected == (task.params["faults"],) and second.injected == ()


def on_the_cluster(way: Way, verb: str, house: House, cluster: Cluster) -> Met:
    settle(house, way.grace, way.timeout)
    task = Pair(house, cluster, verb)
    task.mode = way.mode
    if way.before:
        way.lose(task)
    deferral = task.attempt()
    waiting = Waiting(deferral)
    if not way.before:
        task.begun()
        way.lose(task)
    with pytest.raises(OrreryError) as raised:
        task.go_on(deferral, waiting.end())
    return task.met(raised.value)


def on_the_laptop(way: Way, verb: str, house: House, monkeypatch: pytest.MonkeyPatch) -> tuple[Met, Pair]:
    settle(house, way.grace)
    task = Pair(house, None, verb)
    task.mode = way.mode
    whole = LocalProcess.pid
    monkeypatch.setattr(  # time counts from when the verb has begun: a busy machine decides nothing
        LocalProcess, "pid", property(lambda self: whole.fget(self) if (house.marks / "started").exists() else None)
    )
    moment = "" if way.before else "@step=10" if verb == "train" else "@time=0s"
    with pytest.raises(OrreryError) as raised:
        task.process(f"{verb}: {way.fault}{moment}")
    return task.met(raised.value), task


# -- what a run may ask for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "profile", "offered"), [("dev", "local", True), ("prod", "local", False), ("dev", "kubernetes", False)]
)
def test_a_form_offers_faults_where_something_may_be_rehearsed(
    house: House, monkeypatch: pytest.MonkeyPatch, stage: str, profile: str, offered: bool
) -> None:
    monkeypatch.setenv("ORRERY_STAGE", stage)
    monkeypatch.setenv("ORRERY_PROFILE", profile)
    planner = Planner("delays")
    fields = {dag: set(params.form(dag, planner.spec)) for dag in params.FIELDS}
    assert {dag for dag, names in fields.items() if "faults" in names} == (
        {"ingest", "train", "tune", "score", "monitor", "rollback", "reindex", "evaluate"} if offered else set()
    )
    # REST takes what no form offers: it is refused with the reason, and so is the variable.
    task = Pair(house, None, "probe")
    task.run.conf = {"faults": "score: image"}
    if offered:
        assert [f.text for f in params.read(task.context(), planner).faults] == ["score: image"]
    else:
        with pytest.raises(UserError, match="faults is set, and"):
            params.read(task.context(), planner)
    task.run.conf = {}
    monkeypatch.setenv("ORRERY_FAULTS", "*: quota@for=20s")
    if offered:
        assert [f.text for f in params.read(task.context(), planner).faults] == ["*: quota@for=20s"]
        task.params["faults"] = "scroe: image"
        with pytest.raises(RequestError, match="faults: in 'scroe: image': unknown step 'scroe'"):
            params.read(task.context(), planner)
    else:
        with pytest.raises(UserError, match="ORRERY_FAULTS is set, and"):
            params.read(task.context(), planner)
