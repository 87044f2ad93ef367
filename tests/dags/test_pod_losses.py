"""Every way to lose a pod, met by every kind of step: what it is taken for, which budget it costs, what is left of it.

A training saves its state and goes on; a partition step (as scoring) writes half of its output and begins again; a
light step learns only while it works what it makes. Each cell is a task carried as Airflow carries it, its pod a real
process on the test cluster (tests/cluster), and after the loss: one more attempt to the same result.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core_verbs
import pytest
from cluster.api import Cluster
from core_house import House
from test_pods import PLATFORM, Task, Waiting, _verbs, cluster, house, wait

from orrery import budgets
from orrery.attempts import Attempt
from orrery.cluster import judge
from orrery.endings import Ending
from orrery.errors import Interrupted, OrreryError, TryAgain, UserError
from orrery.orchestration import pod_trigger
from orrery.orchestration.pods import PodStepOperator
from orrery.orchestration.retry import BudgetPolicy
from orrery.plan import Planner
from orrery.runner import StepFailed, StepVanished

__all__ = ["_verbs", "cluster", "house"]

CLASSES = """\
  cpu-light: {cpu: "1", memory: 1Gi, wait: 3s, timeout: 10m}
  cpu-small: {cpu: "1", memory: 2Gi, spot: true, grace: 5s, wait: 3s, timeout: 10m}
"""
KINDS = {"train": "cpu-small", "probe": "cpu-small", "look": "cpu-light"}


class Loss(Task):
    """One cell: a task of one kind of step."""

    def __init__(self, house: House, cluster: Cluster, verb: str) -> None:
        super().__init__(house, cluster, verb)
        self.compute = KINDS[verb]
        if verb != "train":
            self.run.dag_id, self.params = "delays.score", {"partition": "2013-01"}

    def operator(self) -> PodStepOperator:
        operator = PodStepOperator(task_id=self.verb, project="delays", verb=self.verb, compute=self.compute)
        if self.verb != "train":
            mode = {"probe": "wait", "look": "observe"}[self.verb]
            operator._options = lambda _: {"mode": mode, "marks": str(self.house.marks)}  # type: ignore[method-assign]
        return operator

    def begun(self) -> None:
        """Wait until the step is at work; a training also for its first checkpoint."""
        core_verbs.wait_for(self.house.marks / "started")
        (self.house.marks / "started").unlink()
        if self.verb == "train":
            (folder,) = {str(p["metadata"]["annotations"]["orrery/folder"]) for p in self.cluster.pods()}
            core_verbs.wait_for(Path(self.house.store.full(f"{folder}/progress.json")))
            while json.loads(self.house.store.read(f"{folder}/progress.json"))["committed"] == 0:
                time.sleep(0.01)

    def judged(self, error: OrreryError) -> str:
        """Return what Airflow is told to do about a failure: RETRY or FAIL."""
        policy = BudgetPolicy("delays", budgets.of(self.verb, Planner("delays").spec))
        return policy.evaluate(error, self.number, 99, self.context()).action.name

    def finish(self) -> dict[str, Any]:
        """Make the next attempt, and let it end well."""
        (self.house.marks / "go").touch()
        deferral = self.attempt()
        return self.go_on(deferral, wait(deferral))

    def last(self) -> Attempt:
        """Return the newest attempt on record."""
        return Attempt.model_validate(self.entries()[-1]["attempt"])


@dataclass(frozen=True)
class Way:
    """A way to lose a pod, and what it must be taken for."""

    name: str
    lose: Callable[[Loss], None]
    ends: str  # Ending.kind
    by: str  # a pattern
    cause: str
    spent: str
    error: type[OrreryError]
    before: bool = False  # it befalls a pod that does not run yet
    dead: bool = False  # the step could not say anything


def drain(task: Loss) -> None:
    task.cluster.nodes.drain()


def secret(task: Loss) -> None:
    rewrite(task.house, "connection: cluster", "connection: cluster\n  secret: keys")


def image(policy: str) -> Callable[[Loss], None]:
    def lose(task: Loss) -> None:
        rewrite(task.house, "orrery/airflow:1", "orrery/none:1")
        rewrite(task.house, "connection: cluster", f"connection: cluster\n  pull_policy: {policy}")

    return lose


def rewrite(house: House, old: str, new: str) -> None:
    """Change platform.yaml; the time of the file is what it is read anew by."""
    file = house.home / "include" / "platform.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1_000_000))


MESSAGES = "interrupted", "interruptions", Interrupted
WAYS = [
    Way("drain", drain, "interrupted", "EvictionByEvictionAPI", *MESSAGES),
    Way("taint", lambda t: t.cluster.nodes.taint(), "interrupted", "DeletionByTaintManager", *MESSAGES),
    Way("preempted", lambda t: t.cluster.nodes.preempt(t.unit()), "interrupted", "PreemptionByScheduler", *MESSAGES),
    Way("shutdown", lambda t: t.cluster.nodes.shutdown(), "interrupted", "TerminationByKubelet", *MESSAGES),
    Way("pressure", lambda t: t.cluster.nodes.pressure(t.unit()), "interrupted", "TerminationByKubelet", *MESSAGES, dead=True),
    Way("deleted", lambda t: t.cluster.nodes.delete(t.unit()), "interrupted", "deleted", *MESSAGES),
    Way("node removed", lambda t: t.cluster.nodes.power_off(), "interrupted", "DeletionByPodGC", *MESSAGES, dead=True),
    Way("node silent", lambda t: t.cluster.nodes.power_off(deleted=False), "node_lost", "NodeNotReady|DeletionByTaintManager", *MESSAGES, dead=True),
    Way("node restarted", lambda t: t.cluster.nodes.reboot(), "node_lost", "Unknown", *MESSAGES, dead=True),
    Way("out of memory", lambda t: t.cluster.nodes.oom(t.unit()), "out_of_memory", "OOMKilled", "bug", "code", StepFailed, dead=True),
    Way("killed", lambda t: t.cluster.nodes.kill(t.unit()), "exited", "Error", "lost", "losses", StepVanished, dead=True),
    Way("exit code 0", lambda t: t.cluster.nodes.end(0, t.unit()), "exited", "", "lost", "losses", StepVanished, dead=True),
    Way("removed by force", lambda t: t.cluster.nodes.delete(t.unit(), grace=0), "gone", "", "lost", "losses", StepVanished, dead=True),
    Way("deadline", lambda t: None, "deadline", "DeadlineExceeded", "bug", "code", StepFailed),
    Way("no room", lambda t: t.cluster.nodes.cordon(), "unplaced", "Unschedulable", "try_again", "code", TryAgain, before=True),
    Way("quota", lambda t: t.cluster.nodes.quota(), "unplaced", "Refused", "try_again", "code", TryAgain, before=True),
    Way("image never pulled", image("Never"), "image", "ErrImageNeverPull", "user", "code", UserError, before=True),
    Way("image missing", image("IfNotPresent"), "image", "ErrImagePull|ImagePullBackOff", "user", "code", UserError, before=True),
    Way("secret missing", secret, "config", "CreateContainerConfigError", "user", "code", UserError, before=True),
]  # fmt: skip


@pytest.fixture
def quick(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is waited for only in case that more is told come sooner: a dead node's log never ends."""
    monkeypatch.setattr(judge, "SETTLE_S", 0.3)
    monkeypatch.setattr(pod_trigger, "LOG_S", 0.5)
    text = PLATFORM.partition("compute:\n")
    classes = CLASSES
    (house.home / "include" / "platform.yaml").write_text(
        f"{text[0]}{text[1]}{classes}kubernetes:\n  connection: cluster\n  silent_node: 1s\n"
    )


@pytest.mark.parametrize("verb", KINDS)
@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.name.replace(" ", "-"))
def test_a_lost_pod_is_told_for_what_it_is_and_the_next_attempt_makes_the_one_result(
    way: Way, verb: str, house: House, cluster: Cluster, quick: None
) -> None:
    if way.name == "deadline":
        rewrite(house, "timeout: 10m", "timeout: 6s")
    task = Loss(house, cluster, verb)
    if way.before:
        way.lose(task)
    deferral = task.attempt()
    waiting = Waiting(deferral)
    if not way.before:
        task.begun()
        way.lose(task)
    event = waiting.end()
    ending = Ending.model_validate(event["ending"])
    assert ending.kind == way.ends and re.fullmatch(way.by, ending.by), ending
    with pytest.raises(OrreryError) as raised:
        task.go_on(deferral, event)
    check(task, way, ending, raised.value)
    cluster.wait_for(lambda: not cluster.pods(), "an empty cluster")
    mend(task, way)
    summary = task.finish()
    cluster.wait_for(lambda: not cluster.pods(), "an empty cluster")
    (manifest,) = house.manifests(verb)
    assert (summary["digest"], summary["output"]) == (manifest.digest, manifest.path)
    assert [e["status"] for e in task.entries()].count("done") == 1 and len(task.entries()) == 2
    if verb == "train":
        assert (int((house.marks / "started").read_text()) > 0) is not way.before  # the step that it went on from


def check(task: Loss, way: Way, ending: Ending, error: OrreryError) -> None:
    """The cause on record, the budget, what Airflow is told to do, and that nothing half-made is to be seen."""
    attempt, trains = task.last(), task.verb == "train"
    assert type(error) is way.error, error
    assert attempt.cause == way.cause
    # A loss on a spot class whose checkpoints went on is one more interruption.
    spent = "interruptions" if way.cause == "lost" and trains else way.spent
    assert attempt.spent == spent
    assert task.judged(error) == ("FAIL" if way.error is UserError else "RETRY")
    if trains and not way.before:
        assert attempt.committed > attempt.resumed == 0
    assert task.house.manifests(task.verb) == []
    if way.dead or way.before:
        assert ending.message in error.message
    told = getattr(attempt, "pod", {})
    assert (told["ended"], told["by"]) == (ending.kind, ending.by)


def mend(task: Loss, way: Way) -> None:
    """Let there be a machine, quota, image and Secret for the next attempt."""
    nodes = task.cluster.nodes
    nodes.no_quota()
    nodes.add("node-b")
    if way.name == "no room":
        nodes.uncordon()
    if way.name == "deadline":
        rewrite(task.house, "timeout: 6s", "timeout: 10m")
    if way.name.startswith("image"):
        rewrite(task.house, "orrery/none:1", "orrery/airflow:1")
    if way.name == "secret missing":
        task.cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "data": {}})


@pytest.mark.parametrize("verb", KINDS)
def test_a_pod_that_vanished_after_its_commit_is_done(verb: str, house: House, cluster: Cluster, quick: None) -> None:
    task = Loss(house, cluster, verb)
    (house.marks / "go").touch()
    deferral = task.attempt()
    cluster.wait_for_end(task.unit())
    (folder,) = {str(p["metadata"]["annotations"]["orrery/folder"]) for p in cluster.pods()}
    if verb != "look":  # where the address is learned while it works, the result document alone tells it
        house.store.remove(f"{folder}/result.json")
    cluster.nodes.delete(task.unit(), grace=0)
    event = wait(deferral)
    assert event["ending"]["kind"] == "gone"
    summary = task.go_on(deferral, event)
    assert [m.path for m in house.manifests(verb)] == [summary["output"]]
    assert [e["status"] for e in task.entries()] == ["done"]


@pytest.mark.parametrize("verb", KINDS)
def test_a_quota_and_a_full_cluster_for_a_while_cost_no_attempt(
    verb: str, house: House, cluster: Cluster, quick: None, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(pod_trigger, "FIRST_S", 0.1)
    caplog.set_level("INFO")
    rewrite(house, "wait: 3s", "wait: 60s")
    (house.marks / "go").touch()
    task = Loss(house, cluster, verb)
    cluster.nodes.cordon()
    cluster.nodes.quota()
    deferral = task.attempt()
    waiting = Waiting(deferral)
    cluster.wait_for(lambda: cluster.requests["create pods"] >= 3)
    cluster.nodes.no_quota()
    cluster.wait_for(lambda: "waits: " in caplog.text)
    cluster.nodes.uncordon()
    assert task.go_on(deferral, waiting.end())["output"]
    assert "exceeded quota: team" in caplog.text and "node(s) were unschedulable" in caplog.text
    (entry,) = task.entries()
    assert entry["attempt"]["cause"] is None and entry["attempt"]["queued_s"] > 0
