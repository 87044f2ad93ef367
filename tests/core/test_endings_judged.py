"""How a machine's word and a step's own come together."""

from __future__ import annotations

from typing import Any

import pytest

from orrery.attempts import cause
from orrery.contract import Result, Status, StepConfig, StepError
from orrery.endings import JUDGED, Ending, judged, without_result

CONFIG = StepConfig(
    project="p",
    verb="train",
    key="2013-01",
    partitions=("2013-01",),
    store="s",
    bundle="b",
    run="r",
    task="t",
    folder="f",
)


def left(status: Status, kind: str = "OrreryError", **details: Any) -> Result:
    error = None if status == "done" else StepError(kind=kind, message="its own words", details=details)
    return Result(status=status, error=error)


@pytest.mark.parametrize("kind", JUDGED)
@pytest.mark.parametrize("status", ["done", "user"])
def test_what_is_done_or_for_the_user_stays_that(kind: Any, status: Status) -> None:
    assert judged(left(status), Ending(kind=kind, message="x")) == left(status)


@pytest.mark.parametrize("kind", ["interrupted", "node_lost"])
@pytest.mark.parametrize("own", ["bug", "try_again"])
def test_a_failure_on_a_machine_that_was_taken_away_is_an_interruption(kind: Any, own: Status) -> None:
    found = judged(
        left(own, "RankLost", committed=7), Ending(kind=kind, message="node-a is gone", by="DeletionByPodGC")
    )
    assert cause(found) == "interrupted" and found.error is not None
    assert found.error.message == "node-a is gone: its own words"
    assert found.error.details == {"ended": kind, "by": "DeletionByPodGC", "committed": 7}


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (Ending(kind="deadline", by="DeadlineExceeded"), "bug"),
        (Ending(kind="out_of_memory", by="OOMKilled", code=137), "bug"),
        (Ending(kind="exited", code=1, message="node 1 ended first, with exit code 1"), "lost"),
        (Ending(kind="exited", code=143), "interrupted"),
        (Ending(kind="exited", code=137), "interrupted"),
        (Ending(kind="interrupted", code=143), "interrupted"),
        (Ending(kind="node_lost"), "interrupted"),
        (Ending(kind="gone"), "interrupted"),
    ],
)
def test_who_was_told_to_go_does_not_know_why(ending: Ending, expected: str) -> None:
    found = judged(left("interrupted", "Interrupted", committed=7), ending)
    assert cause(found) == expected and found.error is not None
    assert found.error.details["committed"] == 7 and found.error.details["ended"] == ending.kind


def test_a_rank_that_was_killed_for_memory_is_no_lost_one() -> None:
    found = judged(left("bug", "RankLost"), Ending(kind="out_of_memory", by="OOMKilled"))
    assert cause(found) == "bug" and found.error is not None and found.error.kind == "OutOfMemory"


@pytest.mark.parametrize("kind", ["deadline", "exited", "gone"])
def test_a_bug_stays_a_bug(kind: Any) -> None:
    assert judged(left("bug"), Ending(kind=kind, code=1)) == left("bug")


@pytest.mark.parametrize("kind", JUDGED)
def test_an_ending_alone_says_what_it_was(kind: Any) -> None:
    found = without_result(Ending(kind=kind, by="x"), CONFIG)
    assert (found.status, found.error and found.error.kind) == JUDGED[kind]
    assert found.error is not None and found.error.message and found.error.details == {"ended": kind, "by": "x"}


def test_a_signal_that_was_heeded_is_an_interruption() -> None:
    assert without_result(Ending(kind="exited", code=143), CONFIG).status == "interrupted"
    assert without_result(Ending(kind="exited", code=0), CONFIG).status == "bug"
