"""The one exception tree, with the exit code that each kind of end has.

OrreryError                 1    a bug of ours, or one in a model's own code
├── RankLost               1    a process of a training died or had hung
├── UserError              64    someone must act: never retried
│   ├── SpecError                spec.yaml, platform.yaml or airflow_settings.yaml is wrong
│   ├── RequestError             a run was asked for something that cannot be
│   ├── DataError                the data fail a check
│   └── BudgetSpent              it was tried as often as it may be
├── TryAgain               75    the network, a quota, a server that is down: worth another attempt
│   └── LeaseHeld                another attempt is writing the same output
└── Interrupted           143    told to stop (SIGTERM)
    └── Fenced                   a newer attempt has taken over: nothing was committed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

DONE, BUG, USER, TRY_AGAIN, INTERRUPTED = 0, 1, 64, 75, 143
STOPPED = 130  # a command that was stopped from the keyboard, as shells say it


class OrreryError(Exception):
    """Base of all errors that Orrery raises on purpose: a message, and a hint that says what to do."""

    exit_code = BUG

    def __init__(self, message: str, *, hint: str = "", details: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class RankLost(OrreryError):
    """One of a training's processes died, or had hung: the machine's fault more often than the code's."""


class UserError(OrreryError):
    """Someone must act before another attempt can succeed."""

    exit_code = USER


class SpecError(UserError):
    """A file that a person wrote is wrong; the message names file, line, field, value and what is allowed."""


class RequestError(UserError):
    """A run was asked for something that is unknown, malformed or not there yet."""


class DataError(UserError):
    """The data fail a check of severity `error`."""


class BudgetSpent(UserError):
    """A step has failed, been interrupted or been lost as often as it may."""


class TryAgain(OrreryError):
    """Something outside was not available; the same attempt may succeed later."""

    exit_code = TRY_AGAIN


class LeaseHeld(TryAgain):
    """Another live attempt holds the lease on the same output."""


class Interrupted(OrreryError):
    """The step was told to stop before it was done."""

    exit_code = INTERRUPTED


class Fenced(Interrupted):
    """A newer attempt took the lease; this one must not commit."""


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return a sentence that lists what is allowed and, where one is close, the likely meaning."""
    options = sorted(allowed)
    close = difflib.get_close_matches(value, options, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(options) if options else 'nothing'}"
