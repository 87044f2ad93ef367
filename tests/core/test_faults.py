"""What is rehearsed on a laptop: the language, and each fault on a real step with a real ledger."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_house import DRIVE, House, build, environment, go
from core_verbs import wait_for

from orrery import attempts, budgets, cli, faults, platform, runner
from orrery.attempts import Attempt
from orrery.contract import Result
from orrery.endings import Ending, without_result
from orrery.errors import Interrupted, OrreryError, RequestError, TryAgain, UserError
from orrery.faults import parse
from orrery.ledger import Ledger
from orrery.local import LocalProcess
from orrery.plan import grace
from orrery.runner import StepFailed, StepVanished
from orrery.twin import Twin

# -- the language --------------------------------------------------------------------------------------


def test_a_text_is_read_whatever_its_spaces_and_order() -> None:
    text = " train :preempt@ times=2, step = 120;\n*: quota@for=20s ;score: node_lost@time=1.5m,partition=2013-07;"
    first, second, third = parse(text)
    assert first.text == "train: preempt@step=120,times=2"
    assert (first.target, first.kind, first.step, first.times) == ("train", "preempt", 120, 2)
    assert (second.text, second.lasts, second.times) == ("*: quota@for=20s", 20.0, 1)
    assert (third.time, third.partition) == (90.0, "2013-07")
    assert second.meets("gate", "2013-01") and not first.meets("score", "2013-07")
    assert third.meets("score", "2013-07") and not third.meets("score", "2013-08")
    assert parse("tune: image")[0].text == "tune: image"
    for fault in (first, second, third):
        assert parse(fault.text) == (fault,)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("train preempt", "in 'train preempt': it names no step", "such as train: preempt@step=120"),
        ("trian: preempt@step=1", "unknown step 'trian'", "did you mean 'trial'?"),
        ("train: preemt@step=1", "unknown kind 'preemt'", "did you mean 'preempt'?"),
        ("train: node-lost@time=1s", "unknown kind 'node-lost'", "did you mean 'node_lost'?"),
        ("train: preempt@stpe=1", "preempt takes no option 'stpe'", "did you mean 'step'?"),
        ("train: oom@time=1s,grace=2s", "oom takes no option 'grace'", "allowed: partition, random, seed, step, time, times"),
        ("train: quota@step=1", "quota takes no option 'step'", "allowed: for, partition, times, wait"),
        ("train: preempt@120", "'120' is not NAME=VALUE", "preempt takes step, time"),
        ("train: preempt@", "'' is not NAME=VALUE", "preempt takes step, time"),
        ("train: preempt", "preempt needs a moment", "such as preempt@time=30s"),
        ("train: store@time=1s", "store needs a moment", "such as store@time=30s,for=10s"),
        ("train: preempt@step=1,time=1s", "step and time are two moments", "give one, or two faults"),
        ("train: preempt@step=1,step=2", "step stands there twice", "give it once"),
        ("train: preempt@step=0", "step=0 is not a number", "a whole one, at least 1"),
        ("train: preempt@step=1e3", "step=1e3 is not a number", "a whole one, at least 1"),
        ("*: preempt@step=5", "not every step has optimiser steps", "step= is for train and trial"),
        ("score: oom@step=5", "score has no optimiser steps", "step= is for train and trial"),
        ("train: preempt@time=30", "time=30 is not a duration", "such as 500ms, 30s"),
        ("*: quota@for=long", "for=long is not a duration", "such as 500ms, 30s"),
        ("train: evict@random=5s", "random=5s is not a rate", "such as random=1/600s"),
        ("train: evict@random=0/5s", "random=0/5s is not a rate", "such as random=1/600s"),
        ("train: evict@time=5s,seed=1", "seed is of random moments", "such as random=1/600s,seed=7"),
        ("train: image; train: image", "'train: image' stands there twice", "times=2"),
        (" ; ", "holds no fault", "such as"),
    ],
)  # fmt: skip
def test_an_error_names_the_token_and_what_is_allowed(text: str, what: str, hint: str) -> None:
    with pytest.raises(RequestError) as e:
        parse(text, "the text")
    assert e.value.message.startswith("the text") and what in e.value.message
    assert hint in e.value.hint


def test_random_moments_are_drawn_by_seed_and_told_again() -> None:
    fault, other = parse("train: preempt@random=1/600s,seed=7; train: preempt@random=1/600s,seed=8")
    assert fault.times is None
    drawn = [fault.moment("train", "2013-01", attempt) for attempt in range(1, 2001)]
    assert drawn == [fault.moment("train", "2013-01", attempt) for attempt in range(1, 2001)]
    assert 550 < sum(t or 0.0 for t in drawn) / len(drawn) < 650
    assert len({fault.moment("train", "2013-01", 1), other.moment("train", "2013-01", 1), drawn[1]}) == 3
    assert not fault.spent([fault.text] * 20)
    assert parse("train: preempt@random=1/600s,times=3")[0].spent(["train: preempt@random=1/600s,times=3"] * 3)


@pytest.mark.parametrize("kind", faults.KINDS)
def test_every_kind_says_what_it_does(kind: faults.Kind) -> None:
    how = faults.KINDS[kind]
    options = "@time=1s,for=1s" if kind == "store" else "@time=1s" if how.needs else ""
    (fault,) = parse(f"*: {kind}{options}")
    assert fault.said().startswith(f"every step: {how.does}")


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [("ORRERY_STAGE", "prod", "nothing is rehearsed in stage prod"), ("ORRERY_PROFILE", "kubernetes", "local profile alone")],
)  # fmt: skip
def test_nothing_is_rehearsed_in_production_or_on_a_cluster(
    house: House, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, why: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"ORRERY_FAULTS is set, and .*{why}"):
        faults.read("*: image", platform.load(), platform.profile())
    assert faults.read("  ", platform.load(), platform.profile()) == ()


# -- what befalls a step -------------------------------------------------------------------------------

SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {{column: late}}
sources:
  flights: {{uri: "${{data}}/flights/{{partition}}.parquet", partition: month}}
gate: {{auc: {{min: 0.7}}}}
train: {{window: 1, compute: spot, checkpoint: {{within: 5s}}, params: {{marks: "{marks}"}}}}
"""
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
compute:
  cpu-light: {cpu: "1", memory: 3Gi}
  spot: {spot: true, memory: 5Gi, grace: 45s}
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    made = build(tmp_path / "home")
    (made.folder / "spec.yaml").write_text(SPEC.format(marks=made.marks))
    (made.home / "include" / "platform.yaml").write_text(PLATFORM)
    for name in ("ORRERY_PROFILE", "ORRERY_STAGE", "ORRERY_MLFLOW", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(made).items():
        monkeypatch.setenv(name, value)
    clean = made.commit("validate", "clean", "2013-01")
    made.commit("materialize", "features", "2013-01", inputs={"clean": (clean.ref,)})
    return made


class Rehearsal:
    """Steps with faults, and what was said of them."""

    def __init__(self, house: House, text: str) -> None:
        self.house, self.said, self.log = house, list[str](), list[str]()
        self.twin = Twin(LocalProcess(on_line=self.log.append), parse(text), platform.load(), self.said.append)

    def go(self, attempt: int = 1, **options: object) -> Result:
        return go(self.house, self.twin, attempt, **options)

    def train(self, attempt: int = 1) -> Result:
        request = self.house.request("train", "2013-01", attempt=attempt)
        return runner.run(self.house.planner(), request, self.twin)

    def attempts(self) -> list[Attempt]:
        return attempts.of(Ledger(f"sqlite:///{self.house.home}/ledger.db").find("delays", "run"))


def finish(house: House) -> None:
    (house.marks / "go").touch()


def test_a_training_is_preempted_at_a_step_once_and_goes_on(house: House) -> None:
    rehearsal = Rehearsal(house, "train: preempt@step=20; *: quota@for=100ms; train: evict@step=100000; score: image")
    with pytest.raises(Interrupted, match="SIGTERM: saved at step") as e:
        rehearsal.train()
    committed = e.value.details["committed"]
    assert isinstance(committed, int) and 20 <= committed < 1000
    assert (e.value.details["ended"], e.value.details["by"]) == ("interrupted", "TerminationByKubelet")
    assert e.value.details["exit_code"] == 143
    finish(house)
    assert rehearsal.train(2).status == "done"
    first, second = rehearsal.attempts()
    assert first.injected == ("*: quota@for=100ms", "train: preempt@step=20")
    assert (first.cause, first.spent, first.committed) == ("interrupted", "interruptions", committed)
    assert (second.cause, second.injected) == (None, ())
    assert wait_for(house.marks / "started") == str(committed)
    assert rehearsal.said[-1] == "rehearsal: train: evict@step=100000 has not come: the step ended before"
    assert any(
        line.startswith("rehearsal: train: preempt@step=20: its spot node is shut down") for line in rehearsal.said
    )


def test_a_fault_comes_as_often_as_it_is_asked_for(house: House) -> None:
    rehearsal = Rehearsal(house, "probe: node_lost@time=0s,times=2")
    for attempt in (1, 2):
        with pytest.raises(Interrupted, match="its node has been silent for 0 s"):
            rehearsal.go(attempt, mode="wait")
    finish(house)
    assert rehearsal.go(3, mode="wait").status == "done"
    assert [a.cause for a in rehearsal.attempts()] == ["interrupted", "interrupted", None]


def test_another_partition_has_faults_of_its_own(house: House) -> None:
    rehearsal = Rehearsal(house, "*: image")
    for key in ("2013-01", "2013-02"):
        with pytest.raises(UserError, match="ErrImagePull: .*not found"):
            runner.run(house.planner(), house.request("probe", key), rehearsal.twin)


@pytest.mark.parametrize(
    ("fault", "by"),
    [("preempt", "TerminationByKubelet"), ("evict", "EvictionByEvictionAPI"), ("taint", "DeletionByTaintManager")],
)
def test_a_step_that_heeds_no_sigterm_is_killed_after_the_grace(house: House, fault: str, by: str) -> None:
    rehearsal = Rehearsal(house, f"probe: {fault}@time=0s,grace=200ms")
    hit_once_started(rehearsal)
    with pytest.raises(Interrupted) as e:
        rehearsal.go(mode="deaf")
    assert (e.value.details["by"], e.value.details["exit_code"]) == (by, 137)
    assert "this was a rehearsal: probe: " in e.value.hint and "pod delays-probe-" in e.value.message
    assert not house.store.exists(f"{house.config().folder}/result.json")
    (attempt,) = rehearsal.attempts()
    assert attempt.spent == "interruptions"


def hit_once_started(rehearsal: Rehearsal) -> None:
    """Let a moment of time count from when the verb has begun: a machine's speed decides nothing."""
    twin_, marks = rehearsal.twin, rehearsal.house.marks
    whole = LocalProcess.pid

    class Begun(LocalProcess):
        @property
        def pid(self) -> int | None:
            return whole.fget(self) if (marks / "started").exists() else None  # type: ignore[attr-defined]

    twin_.local = Begun(on_line=twin_.local.on_line)


@pytest.mark.parametrize(
    ("text", "mode", "error", "kind", "spent", "message"),
    [
        ("oom@time=0s", "wait", StepFailed, "OutOfMemory", "code", "the limit is 3.00 GiB, "),
        ("node_lost@time=0s", "wait", Interrupted, "NodeLost", "interruptions", "its node has been silent"),
        ("delete@time=0s,grace=200ms", "deaf", StepVanished, "StepVanished", "losses", "was deleted, and killed when its time to end was over"),
        ("deadline@time=0s,grace=200ms", "deaf", StepFailed, "DeadlineExceeded", "code", "longer than the specified"),
        ("deadline@time=0s", "wait", StepFailed, "DeadlineExceeded", "code", "longer than the specified"),
        ("quota@wait=100ms", "done", TryAgain, "Unplaced", "code", "was not created within 0 s: "),
        ("quota@for=1h,wait=100ms", "done", TryAgain, "Unplaced", "code", "is forbidden: exceeded quota: rehearsal"),
        ("unschedulable@wait=100ms", "done", TryAgain, "Unplaced", "code", "0/1 nodes are available"),
        ("image", "done", UserError, "ImageError", "code", 'failed to pull and unpack image "orrery/airflow:1"'),
        ("config", "done", UserError, "PodConfigError", "code", 'CreateContainerConfigError: secret "rehearsal" not found'),
    ],
)  # fmt: skip
def test_each_fault_ends_a_step_as_a_cluster_does(
    house: House, text: str, mode: str, error: type[OrreryError], kind: str, spent: str, message: str
) -> None:
    rehearsal = Rehearsal(house, f"probe: {text}")
    hit_once_started(rehearsal)
    with pytest.raises(error) as e:
        rehearsal.go(mode=mode)
    assert message in e.value.message
    (entry,) = Ledger(f"sqlite:///{house.home}/ledger.db").find("delays", "run")
    (attempt,) = rehearsal.attempts()
    assert attempt.spent == spent
    assert attempt.injected == (f"probe: {text}",)
    assert house.manifests() == []
    assert entry.payload["attempt"]["injected"] == [f"probe: {text}"]
    finish(house)
    assert rehearsal.go(2, mode=mode).status == "done"


def once(true: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    """Do something as soon as something is so."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_store_that_is_away_at_the_commit_is_tried_again_although_nothing_could_be_written_down(house: House) -> None:
    rehearsal = Rehearsal(house, "probe: store@time=0s,for=1h")
    hit_once_started(rehearsal)
    thread = once(lambda: bool(rehearsal.said), lambda: finish(house))
    with pytest.raises(TryAgain, match=r"left no result \(exit code 75\)"):
        rehearsal.go(mode="wait")
    thread.join()
    assert any("the store does not answer" in line for line in rehearsal.log)
    (attempt,) = rehearsal.attempts()
    assert (attempt.cause, attempt.spent) == ("try_again", "code")
    assert not house.store.exists(f"{house.config().folder}/result.json") and house.manifests() == []
    assert rehearsal.go(2, mode="wait").status == "done"
    assert without_result(Ending(kind="exited", code=75), house.config()).status == "try_again"  # a pod's, too


def test_a_store_that_is_away_meanwhile_costs_a_step_nothing(house: House) -> None:
    rehearsal = Rehearsal(house, "probe: store@time=0s,for=300ms")
    hit_once_started(rehearsal)
    thread = once(lambda: len(rehearsal.said) == 2, lambda: finish(house))
    assert rehearsal.go(mode="wait").status == "done"
    thread.join()
    assert rehearsal.said[-1] == "rehearsal: the store answers again"
    assert rehearsal.attempts()[0].injected == ("probe: store@time=0s,for=300ms",)


def test_a_training_is_preempted_while_its_store_is_away(house: House) -> None:
    """Two faults at once: it cannot save any more, and goes on from its last checkpoint."""
    rehearsal = Rehearsal(house, "train: store@step=25,for=1h; train: preempt@step=25")
    with pytest.raises(Interrupted):
        rehearsal.train()
    (step,) = (house.home / "store" / "delays" / "train").glob("*/checkpoints/step")
    kept = int(step.read_text())
    assert kept >= 20 and kept % 10 == 0  # what it would have saved at its end did not get there
    finish(house)
    assert rehearsal.train(2).status == "done"
    assert int(wait_for(house.marks / "started")) == kept


# -- what is remembered --------------------------------------------------------------------------------


def test_an_attempt_that_nobody_saw_the_end_of_is_still_known_as_a_rehearsal(house: House) -> None:
    """Its worker dies with it: it is recorded by the next one, from its document."""
    rehearsal = Rehearsal(house, "probe: node_lost@time=0s")
    hit_once_started(rehearsal)
    planner, request = house.planner(), house.request(options={"mode": "wait", "marks": str(house.marks)})

    class Killed(BaseException):
        """In the place of SIGKILL."""

    def record(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runner, "_record", record)
        runner.run(planner, request, rehearsal.twin)
    assert rehearsal.attempts() == []
    again = house.request(attempt=2, options=request.options)
    (lost,) = runner.history(house.planner(), again)
    assert lost.injected == ("probe: node_lost@time=0s",)
    finish(house)
    assert runner.run(house.planner(), again, rehearsal.twin).status == "done"


def test_a_rehearsal_does_not_tell_how_often_machines_are_taken_away(house: House) -> None:
    rehearsal = Rehearsal(house, "train: preempt@step=1")
    with pytest.raises(Interrupted):
        rehearsal.train()
    assert attempts.observed(house.planner().ledger, "delays", "spot") == {"interruptions": 0, "observed_s": 0}


def test_a_wait_for_a_place_is_not_paid_for_and_a_rehearsal_is_told_as_one(house: House) -> None:
    rehearsal = Rehearsal(house, "*: quota@wait=300ms")
    began = time.monotonic()
    with pytest.raises(TryAgain):
        rehearsal.go()
    took = time.monotonic() - began
    (attempt,) = rehearsal.attempts()
    assert attempt.queued_s >= 0.3
    assert attempt.wall_s <= took - attempt.queued_s + 0.01  # the wait is no part of it, however slow the machine is
    assert budgets.summary([attempt]) == "1 attempts: failed 1 time, 1 of them a rehearsal"


def test_a_wait_ends_when_the_task_is_stopped(house: House) -> None:
    rehearsal = Rehearsal(house, "probe: quota")
    thread = once(lambda: bool(rehearsal.said), rehearsal.twin.stop)
    with pytest.raises(Interrupted, match="told to stop while it waited"):
        rehearsal.go()
    thread.join()
    assert rehearsal.log == []  # nothing was started


def test_the_class_decides_how_long_a_pod_waits_and_may_take_to_end(house: House) -> None:
    rehearsal = Rehearsal(house, "train: preempt@step=1; train: evict@step=1,grace=3s; probe: taint@time=1s")
    own, given, plain = rehearsal.twin.faults
    train = house.planner().plan(house.request("train", "2013-01"))
    probe = house.planner().plan(house.request())
    assert rehearsal.twin.grace(own, train) == 45.0
    assert rehearsal.twin.grace(given, train) == 3.0
    for plan in (train, probe):
        free = replace(plan, compute="cpu-light")
        assert rehearsal.twin.grace(plain, free) == grace(rehearsal.twin.compute(free), free.outlive)


# -- the command line ----------------------------------------------------------------------------------

Told = tuple[int, str]


def test_orrery_run_rehearses_and_goes_on_as_airflow_would(house: House) -> None:
    argv = ("orrery", "run", "delays", "train", "--window", "2013-01..2013-01")
    env = {**os.environ, "ORRERY_FAULTS": "train: preempt@step=3; train: node_lost@step=30"}

    def third() -> bool:
        return any(house.store.exists(f"delays/runs/{r}/train-2013-01..2013-01/3/progress.json") for r in runs())

    def runs() -> list[str]:
        return house.store.names("delays/runs")

    thread = once(third, lambda: finish(house))
    done = subprocess.run([sys.executable, str(DRIVE), *argv], env=env, capture_output=True, text=True, check=False)
    thread.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal: train: preempt@step=3: its spot node is shut down" in done.stdout
    assert "rehearsal: SIGTERM: saved at step" in done.stdout
    assert "rehearsal: attempt 3: interrupted 2 of 20 times, goes on from step" in done.stdout
    found = attempts.of(Ledger(f"sqlite:///{house.home}/ledger.db").find("delays", "run"))
    assert [(a.number, a.cause, a.injected) for a in found] == [
        (1, "interrupted", ("train: preempt@step=3",)),
        (2, "interrupted", ("train: node_lost@step=30",)),
        (3, None, ()),
    ]


@pytest.fixture
def shell(house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Call the command line as the shell does, with variables; return exit code and what was printed."""

    def call(*argv: str, **variables: str) -> Told:
        with monkeypatch.context() as patch:
            for name, value in {"COLUMNS": "200", **variables}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["orrery", *argv])
            try:
                cli.main()
            except SystemExit as e:
                code = e.code or 0
            caught = capsys.readouterr()
        assert isinstance(code, int)
        return code, caught.out + caught.err

    return call


def test_orrery_run_refuses_to_rehearse_in_production(house: House, shell: Callable[..., Told]) -> None:
    argv = ("run", "delays", "train", "--window", "2013-01..2013-01")
    code, said = shell(*argv, ORRERY_FAULTS="train: preempt@step=3", ORRERY_STAGE="prod")
    assert code == 64 and "ORRERY_FAULTS is set, and nothing is rehearsed in stage prod" in said
    code, said = shell(*argv, ORRERY_FAULTS="train: preemt@step=3")
    assert code == 64 and "did you mean 'preempt'?" in said
    assert house.store.names("delays/runs") == []


def test_orrery_faults_lists_and_explains(shell: Callable[..., Told]) -> None:
    code, said = shell("faults")
    assert code == 0 and all(word in said for word in (*faults.KINDS, *faults.OPTIONS))
    code, said = shell("faults", "train: preempt@step=120; *: quota@for=20s,times=2")
    assert said.splitlines()[::2] == ["✓ train: preempt@step=120", "✓ *: quota@for=20s,times=2"]
    assert "once optimiser step 120 is done, the first attempt of a run's task and partition" in said
    code, said = shell("faults", "train: oom", ORRERY_STAGE="prod")
    assert code == 64 and "oom needs a moment" in said and "off: nothing is rehearsed in stage prod" in said
