"""How an alert leaves the house: a webhook (JSON by POST) and e-mail, each by an Airflow connection.

Nothing here raises: a channel answers with None (delivered) or with what is wrong, in words that hold no
address and no secret. Addresses are read on the caller's thread, since Airflow answers only that; sending is done
on another that is left behind when it takes longer than `BUDGET` (a name server that hangs, an answer byte by byte).
"""

from __future__ import annotations

import html
import json
import queue
import smtplib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from orrery import platform
from orrery.alerts import Told, clean

TIMEOUT = 5.0  # seconds, for each step of a try
TRIES = 2
# Seconds for all that is told at one occasion, on all channels: a webhook that hangs twice leaves a third of it to
# the e-mail. Airflow kills what a task still does 20 s after it has ended (`[core] task_success_overtime`).
BUDGET = 15.0

Send = Callable[[Told], str | None]


def channels() -> tuple[str, ...]:
    """Return the names of the channels that platform.yaml configures."""
    alerts = platform.load().alerts
    return tuple(name for name, given in (("webhook", alerts.webhook), ("email", alerts.email)) if given)


def open_channel(name: str) -> Send:
    """Return how to send by a channel. Where its connection is wrong, sending says so."""
    alerts = platform.load().alerts
    try:
        if name == "webhook" and alerts.webhook:
            return _webhook(_connection(alerts.webhook))
        if name == "email" and alerts.email:
            return _email(_connection(alerts.email.connection), list(alerts.email.to))
        problem = "it is not in platform.yaml any more"
    except Exception as e:
        problem = f"its Airflow connection cannot be used ({type(e).__name__})"
    return lambda told: problem


def within(seconds: float, send: Callable[[], str | None]) -> str | None:
    """Return what a sending came to, or that it took too long; it is then left behind and ends with the process."""
    answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answer.put(_safe(send)), daemon=True, name="orrery-alert").start()
    try:
        return answer.get(timeout=max(seconds, 0.01))
    except queue.Empty:
        return "no answer within the time"


def _safe(send: Callable[[], str | None]) -> str | None:
    try:
        return send()
    except Exception as e:
        # An exception's text may hold an address, a login, or what the server said; its kind is enough to act on.
        return _kind(e)


def _kind(error: BaseException) -> str:
    """Return an error's kind, with the system's own words where it has some."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror and cause.errno:
            return f"{type(error).__name__}: {clean(cause.strerror, 100)}"
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__


def _connection(conn_id: str) -> Any:
    from airflow.sdk import BaseHook

    return BaseHook.get_connection(conn_id)


# -- what is said ---------------------------------------------------------------------------------------


def title(told: Told) -> str:
    """Return an alert's headline: one line, at most 150 characters, no control characters."""
    a = told.alert
    return clean(f"[{a.severity}] {a.project}: {a.kind} {a.subject}", 150)


def document(told: Told) -> dict[str, Any]:
    """Return what a webhook is told. `text` alone is what chat services show."""
    a = told.alert
    return {
        "text": f"{title(told)}: {a.reason} (owner: {a.owner}; {a.runbook})",
        "key": told.key,
        "kind": a.kind,
        "subject": a.subject,
        "severity": a.severity,
        "project": a.project,
        "owner": a.owner,
        "reason": a.reason,
        "runbook": a.runbook,
        "facts": dict(a.facts),
        "at": told.at,
        "stage": platform.load().stage,
    }


def page(told: Told) -> str:
    """Return an e-mail's body: HTML in which everything is escaped."""
    a = told.alert
    rows = {"Project": a.project, "Owner": a.owner, "About": f"{a.kind} {a.subject}", "Since": told.at}
    rows |= {str(k): str(v) for k, v in a.facts.items()}
    cells = "".join(
        f"<tr><th align='left'>{html.escape(clean(k, 100))}</th><td>{html.escape(clean(v, 300))}</td></tr>"
        for k, v in rows.items()
    )
    link = html.escape(a.runbook, quote=True)
    return f"<p>{html.escape(a.reason)}</p><table>{cells}</table><p>What to do: <a href='{link}'>{link}</a></p>"


# -- webhook --------------------------------------------------------------------------------------------


def address(connection: Any) -> str:
    """Return a webhook's URL: the host where that is one, else put together as Airflow's http connections are."""
    host, extra = str(connection.host or ""), connection.extra_dejson
    if "://" not in host:
        scheme = connection.schema if connection.schema in ("http", "https") else "http"
        host = f"{scheme}://{host}"
    if connection.port and ":" not in host.partition("://")[2].partition("/")[0]:
        scheme, _, rest = host.partition("://")
        name, slash, path = rest.partition("/")
        host = f"{scheme}://{name}:{connection.port}{slash}{path}"
    path = str(extra.get("path", ""))
    return f"{host.rstrip('/')}/{path.lstrip('/')}" if path else host


def _webhook(connection: Any) -> Send:
    import httpx

    url = address(connection)
    headers: Mapping[str, str] = {str(k): str(v) for k, v in (connection.extra_dejson.get("headers") or {}).items()}
    auth: tuple[str, str] | None = None
    if connection.login:
        auth = (connection.login, connection.password or "")
    elif connection.password:
        headers = {"Authorization": f"Bearer {connection.password}", **headers}

    def send(told: Told) -> str | None:
        body = json.dumps(document(told), allow_nan=False, default=str).encode()
        problem: str | None = None
        for _ in range(TRIES):
            try:
                # Not followed: a redirect could lead a token anywhere. Not read: only the status counts.
                with httpx.stream(
                    "POST",
                    url,
                    content=body,
                    headers={"Content-Type": "application/json", **headers},
                    auth=auth,
                    timeout=TIMEOUT,
                    follow_redirects=False,
                ) as response:
                    if response.is_success:
                        return None
                    problem = f"it answered {response.status_code}"
                    if response.is_client_error and response.status_code != 429:
                        return problem  # the same again would be refused again
            except Exception as e:
                problem = _kind(e)
        return problem

    return send


# -- e-mail ---------------------------------------------------------------------------------------------


def _email(connection: Any, to: list[str]) -> Send:
    from airflow.providers.smtp.hooks.smtp import SmtpHook

    class Hook(SmtpHook):
        """Airflow's mail, with a connection that was read already, and with our timeout and tries."""

        timeout = int(TIMEOUT)
        smtp_retry_limit = TRIES - 1

        @classmethod
        def get_connection(cls, conn_id: str) -> Any:
            return connection

    def send(told: Told) -> str | None:
        hook = Hook(smtp_conn_id="orrery", auth_type=connection.extra_dejson.get("auth_type", "basic"))
        try:
            with hook as mail:
                mail.send_email_smtp(to=to, subject=title(told), html_content=page(told))
        except smtplib.SMTPRecipientsRefused:
            return "the server refuses the recipients"
        except smtplib.SMTPResponseException as e:
            return f"the server answered {int(e.smtp_code)}"
        return None

    return send
