"""How the machine ended a step: what its result document cannot say, because the step did not live to write it. Light.

A pod's conditions, a virtual machine's notice and the laptop's twin of both come down to one `Ending`, and from here
on they are judged alike. The result document wins where there is one: see `judged`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from orrery.attempts import VANISHED
from orrery.contract import Result, Status, StepConfig, StepError
from orrery.errors import TRY_AGAIN

Kind = Literal[
    "exited",  # by itself, with `code`
    "interrupted",  # told to go by who runs the machines: drain, taint, spot shutdown, a more important pod
    "node_lost",  # its machine is gone or silent, and nobody saw the step end
    "out_of_memory",
    "unplaced",  # no machine, or no quota, within the time that the compute class waits
    "image",  # it cannot be pulled
    "config",  # a Secret, a mount or a command that is not there
    "deadline",  # the compute class's `timeout`
    "gone",  # removed by somebody, without a word why
]
# What each means for the attempts after it (status), and what the ledger calls it.
JUDGED: dict[Kind, tuple[Status, str]] = {
    "exited": ("bug", "StepVanished"),
    "interrupted": ("interrupted", "Interrupted"),
    "node_lost": ("interrupted", "NodeLost"),
    "out_of_memory": ("bug", "OutOfMemory"),
    "unplaced": ("try_again", "Unplaced"),
    "image": ("user", "ImageError"),
    "config": ("user", "PodConfigError"),
    "deadline": ("bug", "DeadlineExceeded"),
    "gone": ("bug", "StepVanished"),
}
# Endings that explain why a step lost a peer, its disk or its network just before.
TAKEN_AWAY = frozenset({"interrupted", "node_lost"})


class Ending(BaseModel):
    """One end of one attempt's process or pods."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    message: str = Field("", description="A whole sentence, with what was seen: limit and use, the scheduler's words.")
    hint: str = ""
    code: int | None = Field(None, description="The exit code, where anybody saw it.")
    by: str = Field("", description="Who ended it, in Kubernetes' words: EvictionByEvictionAPI, OOMKilled, …")


def without_result(ending: Ending, config: StepConfig) -> Result:
    """Return how an attempt ended that left no result document and committed nothing."""
    if ending.kind == "exited" and ending.code == 143:
        ending = ending.model_copy(update={"kind": "interrupted"})
    status, kind = JUDGED[ending.kind]
    if ending.kind == "exited" and ending.code == TRY_AGAIN:
        status = "try_again"  # it could not reach the store, and so could not write that down either
    code = "" if ending.code is None else f"exit code {ending.code}"
    how = ending.message or f"{config.verb} {config.key} left no result ({code or ending.kind})"
    return Result(status=status, error=StepError(kind=kind, message=how, hint=ending.hint, details=_details(ending)))


def judged(result: Result, ending: Ending) -> Result:
    """Return a result document seen together with how the machine ended its process.

    What is done is done, and what is for the user to mend stays that. A bug that ends with the machine being taken
    away is the interruption's doing: a rank that lost its peer, a store that could not be reached any more. And who
    says that it was told to go does not know why: its time was up, or another node of the training had failed.
    """
    if result.status in ("done", "user") or result.error is None:
        return result
    status, kind = JUDGED[ending.kind]
    if result.status == "interrupted":
        if not _failed(ending):
            result.error.details = {**_details(ending), **result.error.details}
            return result
        result.status, result.error.kind = status, kind
    elif ending.kind in TAKEN_AWAY:
        result.status = status
    elif ending.kind == "out_of_memory" and result.error.kind in VANISHED:
        result.error.kind = kind
    else:
        return result
    result.error.message = f"{ending.message or ending.by or ending.kind}: {result.error.message}"
    result.error.details = {**_details(ending), **result.error.details}
    return result


def _failed(ending: Ending) -> bool:
    """Tell whether the unit ended by a failure of its own; 137 and 143 are how an interruption ends, too."""
    return ending.kind in ("deadline", "out_of_memory") or (
        ending.kind == "exited" and ending.code not in (None, 0, 137, 143)
    )


def _details(ending: Ending) -> dict[str, object]:
    told = {"ended": ending.kind, "by": ending.by, "exit_code": ending.code}
    return {k: v for k, v in told.items() if v not in ("", None)}
