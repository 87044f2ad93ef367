"""How far a training attempt came: `progress.json` in its folder, written while it goes on, read afterwards. Light.

A killed attempt leaves no result document. What it did up to its end is known from this one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

NAME = "progress.json"
# Seconds between two looks, each of which is written; only the twin sets it, to meet an optimiser step.
OFTEN = "ORRERY_PROGRESS_S"


class Progress(BaseModel):
    """One attempt's training as far as it has come. Moments are seconds since 1970, of the machine that trains."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    began: float = Field(description="When the first step could be taken: data, processes and state were there.")
    now: float = Field(description="When this was written.")
    resumed: int = Field(0, description="The optimiser step that the attempt went on from; 0: from the start.")
    step: int = Field(0, description="Optimiser steps done, those of earlier attempts included.")
    committed: int = Field(0, description="Of these, the ones in a committed checkpoint, or in the finished model.")
    total: int = Field(0, description="Steps of the whole training; patience may end it sooner.")
    step_s: float = Field(0.0, description="Median seconds of one step of this attempt.")
    seconds: dict[str, float] = Field(
        default_factory=dict,
        description="Since `began`: `step`, `evaluate`, `checkpoint` (the training stood still for it).",
    )
