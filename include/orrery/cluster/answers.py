"""What it means when the cluster refuses a request: wait, or have somebody act. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

QUOTA = "exceeded quota"


@dataclass(frozen=True)
class Answer:
    """A refused request. `exists`: it is there already; `absent`: it is not there; `wait`: ask again later."""

    kind: Literal["exists", "absent", "wait", "user"]
    message: str
    hint: str = ""


def read(status: int, body: str | bytes | None, what: str) -> Answer:
    """Return what an answer says: its HTTP status and its body, a `Status` document. `what`: what was asked for.

    A status of 0 is a cluster that could not be reached at all.
    """
    reason, message = _told(body)
    said = f"{what}: {message or f'HTTP {status}' if status else message or 'the cluster cannot be reached'}"
    if status == 409 and (reason == "AlreadyExists" or "already exists" in message):
        return Answer("exists", said)
    if status == 404:
        return Answer("absent", said, "kubernetes.namespace in platform.yaml; is what is named there in the cluster?")
    if status == 403 and QUOTA in message:
        return Answer("wait", said, "it is created as soon as others have ended; or a larger ResourceQuota")
    # 409 with any other reason: two creations have met at a quota's counter.
    if status in (0, 401, 408, 409, 429) or status >= 500:
        return Answer("wait", said)
    if status == 403 and "cannot" in message and "forbidden" in message:
        return Answer("user", said, "the Role of Airflow's service account; docker/kubernetes/ has the one it needs")
    return Answer("user", said, "the compute class in platform.yaml, or what the cluster allows in this namespace")


def _told(body: str | bytes | None) -> tuple[str, str]:
    """Return reason and message of a Status document; of anything else, its beginning."""
    try:
        found = json.loads(body or "")
    except ValueError:
        text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
        return "", " ".join(text.split())[:1000]
    if not isinstance(found, dict):
        return "", ""
    return str(found.get("reason") or ""), str(found.get("message") or "")
