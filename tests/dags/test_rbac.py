"""What Airflow may do in the steps' namespace, proved against docker/kubernetes' own Roles on a server that enforces them.

The true operator, its trigger and the housekeeping live through all that they ask a cluster for, with the token of
Airflow's ServiceAccount: what they used is what the Role grants, and each verb that is taken away is missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.api import Cluster
from core_house import House
from test_pods import Task, _verbs, house, trigger_of

from orrery.errors import OrreryError
from orrery.orchestration import housekeeping
from orrery.orchestration.pod_trigger import PodTrigger
from orrery.orchestration.pods import PodStepOperator

__all__ = ["_verbs", "house"]  # fixtures

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "kubernetes"
NAMESPACE = "orrery"
LIMIT_S = 30.0
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
compute:
  cpu-light: {cpu: "1", memory: 1Gi}
  cpu-small: {cpu: "1", memory: 1Gi, wait: 60s}
  pair: {cpu: "1", memory: 1Gi, pods: 2, wait: 60s}
kubernetes: {connection: cluster, ranks: RANKS}
"""
Right = tuple[str, str, str]  # group, resource, verb


def rights(*files: str) -> tuple[list[dict[str, Any]], set[Right]]:
    """Return the documents of RBAC in files, and all that their Roles grant."""
    documents = [d for f in files for d in yaml.safe_load_all((FOLDER / f).read_text())]
    found = [d for d in documents if d["kind"] in ("Role", "RoleBinding", "ServiceAccount")]
    rules = [r for d in found if d["kind"] == "Role" for r in d["rules"]]
    return found, {
        (g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]
    }


def without(documents: list[dict[str, Any]], taken: Right) -> list[dict[str, Any]]:
    """Return the documents with one right taken away."""
    group, resource, verb = taken
    left = copy.deepcopy(documents)
    for role in (d for d in left if d["kind"] == "Role"):
        rules = []
        for rule in role["rules"]:
            for g in rule["apiGroups"]:
                for r in rule["resources"]:
                    verbs = [v for v in rule["verbs"] if (g, r, v) != (group, resource, verb)]
                    rules.append({"apiGroups": [g], "resources": [r], "verbs": verbs})
        role["rules"] = rules
    return left


class Stage:
    """A cluster that enforces the Roles, and all that has been said to whoever looks at Airflow."""

    def __init__(self, house: House, cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
        self.house, self.cluster, self.caplog = house, cluster, caplog
        self.told: list[str] = []
        self.refused: set[Right] = set()
        self.one = (house.folder / "spec.yaml").read_text()
        self.pair = self.one.replace("compute: cpu-small", "compute: pair, processes: 2")
        self.busy = False  # containers run on until they are told to stop
        check = cluster.rbac.check

        def noted(user: str, asked: Any) -> None:
            try:
                check(user, asked)
            except Exception:
                self.refused.add((asked.group, asked.resource, asked.verb))
                raise

        cluster.rbac.check = noted  # type: ignore[method-assign]

    def used(self) -> set[Right]:
        return {(a.group, a.resource, a.verb) for a in self.cluster.asked if a.namespace == NAMESPACE}

    def noticed(self) -> bool:
        """Tell whether a refusal has been said to whoever looks."""
        said = "\n".join([self.caplog.text, *self.told])
        return bool(self.refused) and ("forbidden" in said.lower() or "403" in said)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what a person would be told by an error."""
        try:
            yield
        except OrreryError as e:
            self.told.append(str(e))
        except Exception as e:
            self.told.append(f"{type(e).__name__}: {e}")

    def wait(
        self, trigger: PodTrigger, then: Callable[[], None] | None = None, until: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """Be the triggerer until it fires, has said what it may not do, or `until`. `then`: once the pod runs."""

        async def first() -> dict[str, Any] | None:
            waiting = asyncio.create_task(trigger.wait())
            left = then
            async with asyncio.timeout(LIMIT_S):
                while not waiting.done():
                    await asyncio.wait([waiting], timeout=0.05)
                    if left is not None and "runs on node" in self.caplog.text:
                        left()
                        left = None
                    if not waiting.done() and (until() or self.noticed()):
                        waiting.cancel()
                        return None
            return waiting.result()

        event = asyncio.run(first())
        if event is not None:
            self.told.append(str(event["ending"]))
        return event

    def life(self, task: Task) -> None:
        """Carry a task from its start to its end."""
        with self.listening():
            deferral = task.attempt()
            event = self.wait(trigger_of(deferral))
            if event is not None:
                task.go_on(deferral, event)

    def run(self, scenes: list[Scene]) -> None:
        for scene in scenes:
            scene(self)


Scene = Callable[[Stage], None]


class Own(Task):
    """A task of a run of its own."""

    compute = "cpu-small"
    name = ""

    def context(self) -> Any:
        return {**super().context(), "run_id": self.name}

    def operator(self) -> PodStepOperator:
        return PodStepOperator(task_id="train", project="delays", verb="train", compute=self.compute)


def tasks(stage: Stage, scene: str) -> Iterator[Own]:
    """Yield a task of one pod, and one of two, which is a Job."""
    spec = stage.house.folder / "spec.yaml"
    for compute, text in (("cpu-small", stage.one), ("pair", stage.pair)):
        spec.write_text(text)
        task = Own(stage.house, stage.cluster)
        task.compute, task.name = compute, f"{scene}-{compute}"
        yield task
    spec.write_text(stage.one)


def runs(stage: Stage) -> None:
    """Created, watched, read, removed; the next attempt looks at what the first has left."""
    for task in tasks(stage, "runs"):
        stage.life(task)
        stage.life(task)


def is_stopped(stage: Stage) -> None:
    """A person fails the waiting task, and what it waits for is deleted."""
    for task in tasks(stage, "stopped"):
        with stage.listening():
            asyncio.run(trigger_of(task.attempt()).on_kill())


def vanishes(stage: Stage) -> None:
    """Somebody removes the pod without a word: its events are asked for."""
    stage.busy = True
    task = next(tasks(stage, "vanishes"))
    with stage.listening():
        deferral = task.attempt()
        stage.wait(trigger_of(deferral), then=lambda: stage.cluster.nodes.delete(task.unit(), grace=0))
    stage.busy = False


def is_created_twice(stage: Stage) -> None:
    """A server in trouble keeps it from being created; the triggerer that creates it dies, the next meets what is there."""
    for task in tasks(stage, "twice"):
        stage.cluster.answer(503, "create (pods|jobs)", reason="ServiceUnavailable")
        with stage.listening():
            deferral = task.attempt()
            stage.wait(trigger_of(deferral))
            stage.wait(trigger_of(deferral))


def has_no_pods_yet(stage: Stage) -> None:
    """A Job whose pods a quota refuses: is it there at all?"""
    *_, pair = tasks(stage, "no-pods")
    (stage.house.folder / "spec.yaml").write_text(stage.pair)
    stage.cluster.nodes.quota({"pods": "0"})
    with stage.listening():
        stage.wait(trigger_of(pair.attempt()), until=lambda: ("batch", "jobs", "get") in stage.used())
    stage.cluster.nodes.no_quota()
    (stage.house.folder / "spec.yaml").write_text(stage.one)


def is_tidied_up(stage: Stage) -> None:
    """The housekeeping lists what is there, and removes what nobody waits for."""
    stage.busy = True
    for task in tasks(stage, "tidied"):
        with stage.listening():
            task.attempt()
        with stage.listening():
            cluster = housekeeping.Cluster()
            for unit in cluster.units():
                cluster.remove(unit)
    stage.busy = False


SCENES: list[Scene] = [runs, is_stopped, vanishes, is_created_twice, has_no_pods_yet, is_tidied_up]


@pytest.fixture
def cluster(tmp_path: Path, house: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    stages: list[Stage] = []

    def busy() -> bool:
        return any(s.busy for s in stages)

    async def play(pod: dict[str, Any], say: Callable[[str], None]) -> int:
        say("at work")
        while busy():
            await asyncio.sleep(0.02)
        return 0

    (house.home / "include" / "platform.yaml").write_text(PLATFORM.replace("RANKS", "indexed-job"))
    with Cluster(
        tmp_path / "cluster", pace=0.01, play=play, namespaces=("default", NAMESPACE, "orrery-platform")
    ) as served:
        token = served.token("orrery-airflow", "orrery-platform")
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", served.connection(token))
        served.rbac.on = True
        served.stages = stages  # type: ignore[attr-defined]
        yield served


@pytest.fixture
def stage(house: House, cluster: Cluster, caplog: pytest.LogCaptureFixture) -> Stage:
    caplog.set_level("DEBUG")
    made = Stage(house, cluster, caplog)
    cluster.stages.append(made)  # type: ignore[attr-defined]
    return made


def test_what_airflow_uses_is_what_its_role_grants(stage: Stage) -> None:
    documents, granted = rights("rbac.yaml")
    stage.cluster.apply(*documents)
    stage.run(SCENES)
    assert stage.refused == set()
    assert stage.used() - granted == set()
    assert granted - stage.used() == set(), "granted, and used by nobody"


# Which scene misses a right first; all of them in a row would take a minute for each.
MISSED: dict[Right, Scene] = {
    ("", "pods", "create"): runs,
    ("", "pods", "list"): runs,
    ("", "pods", "watch"): vanishes,
    ("", "pods", "delete"): is_stopped,
    ("", "pods", "get"): is_created_twice,
    ("", "pods/log", "get"): runs,
    ("", "events", "list"): vanishes,
    ("", "services", "create"): runs,
    ("", "services", "get"): is_created_twice,
    ("batch", "jobs", "create"): runs,
    ("batch", "jobs", "list"): is_tidied_up,
    ("batch", "jobs", "get"): is_created_twice,
    ("batch", "jobs", "delete"): is_stopped,
}


def test_each_right_has_a_scene_that_misses_it() -> None:
    assert set(MISSED) == rights("rbac.yaml")[1]


@pytest.mark.parametrize("taken", sorted(MISSED), ids=lambda r: " ".join(filter(None, reversed(r))))
def test_a_right_that_is_taken_away_is_noticed(stage: Stage, taken: Right) -> None:
    documents, _ = rights("rbac.yaml")
    stage.cluster.apply(*without(documents, taken))
    MISSED[taken](stage)
    assert taken in stage.refused
    assert stage.refused == {taken}
    assert stage.noticed(), "nobody would know what is missing"


def test_a_step_may_do_nothing() -> None:
    """No binding names its account, and no token is mounted for it."""
    documents, _ = rights("rbac.yaml", "spark/spark.yaml", "pytorchjob/pytorchjob.yaml")
    bound = {(s["namespace"], s["name"]) for d in documents if d["kind"] == "RoleBinding" for s in d["subjects"]}
    assert bound == {("orrery-platform", "orrery-airflow"), ("orrery", "orrery-spark")}
    (step,) = (d for d in documents if d["kind"] == "ServiceAccount" and d["metadata"]["name"] == "orrery-step")
    assert step["automountServiceAccountToken"] is False
    assert step["metadata"]["namespace"] == NAMESPACE
