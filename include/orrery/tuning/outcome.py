"""How one trial ended: `trial.json`, the truth about it. The study in Optuna's storage only follows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

NAME = "trial.json"
PREDICTIONS = "predictions.npy"
TRUTH = ("label.npy", "moment.npy")  # of the trial with the defaults: what all are measured on

# The first two trials are no draws: model.py's defaults (with the spec's params), and the champion's parameters.
DEFAULTS, CHAMPION = 0, 1
# Verdicts of `tune`.
TUNED, KEPT = "tuned", "defaults"

State = Literal["complete", "pruned", "failed"]


class Outcome(BaseModel):
    """One trial. `value` is the primary metric on the tune part; none when it was pruned or failed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    number: int
    state: State
    params: dict[str, Any] = Field(description="Of the searched ones, as model.py's Params takes them.")
    metric: str
    value: float | None = None
    epochs: tuple[float, ...] = Field((), description="Loss on the tune part after each epoch.")
    why: str = Field("", description="Why it has no value.")

    @property
    def named(self) -> str:
        """What people call it."""
        return f"trial {self.number}" + (" (defaults)" if self.number == DEFAULTS else "")
