"""Which failures are worth another attempt: decided by the kind of error and by how often it came, never by its text.

Airflow asks a policy in the worker alone: when the worker itself is killed it counts retries, and nothing else. So a
step's task is given the sum of its budgets as retries, and both ends look at the ledger: the policy when an attempt
has failed, and the operator before it starts another (`StepOperator`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule
from airflow.sdk.definitions.retry_policy import RetryDecision, RetryPolicy

from orrery import budgets, platform
from orrery.attempts import Attempt, Budget
from orrery.budgets import Budgets
from orrery.errors import Interrupted, OrreryError, UserError
from orrery.ledger import Ledger
from orrery.orchestration.params import run_name, task_name
from orrery.runner import StepVanished, recorded

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger("orrery.retry")
# Of tasks that are no step. Airflow's back-off waits between one and two times 20, 40, 80, 160 and 320 s: ten to
# twenty minutes in all, then a person is asked.
RETRIES = budgets.CODE
DELAY = timedelta(seconds=budgets.FIRST_S)
MAX_DELAY = timedelta(seconds=budgets.LONGEST_S)
MUST_ACT = "64: someone must act, see the message"


def policy() -> ExceptionRetryPolicy:
    """Return the retry policy of tasks that are no step: 64 fails at once, the rest is tried again (`RETRIES`)."""
    return ExceptionRetryPolicy(
        rules=[
            RetryRule("orrery.errors.UserError", RetryAction.FAIL, reason=MUST_ACT),
            RetryRule("orrery.errors.TryAgain", RetryAction.RETRY, reason="75: something outside was not available"),
            RetryRule("orrery.errors.Interrupted", RetryAction.RETRY, DELAY, reason="143: interrupted"),
        ]
    )


def defaults(owner: str) -> dict[str, Any]:
    """Return the `default_args` of every Dag: whose it is, and how tasks that are no step are tried again."""
    return {
        "owner": owner,
        "retries": RETRIES,
        "retry_delay": DELAY,
        "retry_exponential_backoff": 2,
        "max_retry_delay": MAX_DELAY,
        "retry_policy": policy(),
    }


class BudgetPolicy(RetryPolicy):
    """Tries a step again as long as the budget of the failure's kind lasts, counted in the ledger.

    64 (someone must act) fails at once; 143 is tried again after 30 s; 75 and bugs wait longer each time.
    """

    def __init__(self, project: str, most: Budgets) -> None:
        self.project, self.most = project, most

    def evaluate(
        self, exception: BaseException, try_number: int, max_tries: int, context: Context | None = None
    ) -> RetryDecision:
        """Return whether there is another attempt, when, and in which words that is told."""
        if isinstance(exception, UserError):
            return RetryDecision.fail(MUST_ACT)
        last = kind(exception)
        history, name = self._history(context)
        if over := self.most.over(history):
            log.error("no further attempt: %s; what failed last: %s", over, exception)
            return RetryDecision.fail(over)
        wait = budgets.delay(last, history, name)
        told = ", ".join(part for part in (self.most.told(history), budgets.goes_on(history)) if part)
        show(context, self.most, history)
        return RetryDecision.retry(
            timedelta(seconds=wait), f"{told or 'failed'}; the next attempt comes in {wait:.0f} s"
        )

    def _history(self, context: Context | None) -> tuple[Sequence[Attempt], str]:
        """Return the task's attempts on record in this run, or none: without a ledger Airflow's own count remains."""
        if context is None:
            return (), ""
        run = run_name(context["dag_run"])
        task = task_name(context["ti"])
        try:
            return recorded(Ledger(platform.load().ledger), self.project, run, task), f"{run}/{task}"
        except OrreryError as e:
            log.warning("the attempts on record cannot be counted: %s", e)
            return (), f"{run}/{task}"


def kind(exception: BaseException) -> Budget:
    """Return the budget that a failure uses up."""
    if isinstance(exception, Interrupted):
        return "interruptions"
    return "losses" if isinstance(exception, StepVanished) else "code"


def show(context: Any, most: Budgets, history: Sequence[Attempt], **more: str) -> None:
    """Show the counts in Airflow's UI, as keys of the task's state store; the ledger is what is counted by."""
    used = budgets.spent(history)
    counts = {str(name): f"{used[name]} of {most.allowed(name)}" for name in budgets.SAID}
    note(context, **counts, **more)


def note(context: Any, **told: str) -> None:
    """Show values as keys of the task's state store. It outlives a clear, so the keys name the one they belong to."""
    generation = f"clear-{context['dag_run'].clear_number or 0}" if context else ""
    for name, value in told.items():
        try:
            context["task_state_store"].set(f"{generation}.{name}", value)
        except Exception as e:  # only to look at; `dag.test()` has none
            log.debug("the task's state store does not take %s: %s", name, e)
            return
