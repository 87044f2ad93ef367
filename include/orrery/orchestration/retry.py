"""Which failures are worth another attempt: decided by the kind of error, never by its text."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule

# Airflow's back-off waits between one and two times 20, 40, 80, 160 and 320 s: ten to twenty minutes in all,
# then a person is asked.
RETRIES = 5
DELAY = timedelta(seconds=20)
MAX_DELAY = timedelta(minutes=10)


def policy() -> ExceptionRetryPolicy:
    """Return the retry policy of every step.

    64 (someone must act) fails at once; 143 is tried again after 20 s; 75 and what is left, a bug or a
    process that vanished, are tried again with Airflow's back-off (`RETRIES`).
    """
    return ExceptionRetryPolicy(
        rules=[
            RetryRule("orrery.errors.UserError", RetryAction.FAIL, reason="64: someone must act, see the message"),
            RetryRule("orrery.errors.TryAgain", RetryAction.RETRY, reason="75: something outside was not available"),
            RetryRule("orrery.errors.Interrupted", RetryAction.RETRY, DELAY, reason="143: interrupted"),
        ]
    )
