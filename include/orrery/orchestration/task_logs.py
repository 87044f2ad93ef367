"""Airflow's task logs kept in the store: what a task said is there when its worker's disk is gone.

Airflow has this for S3 in its Amazon provider, which brings a hundred megabytes; the store is open already, whatever it
is. Named by `AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS=orrery.orchestration.task_logs.LOGGING_CONFIG`, on a cluster and in
docker/compose.yaml; a laptop keeps its logs where they are written.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from airflow.config_templates.airflow_local_settings import DEFAULT_LOGGING_CONFIG
from airflow.configuration import conf

from orrery import platform
from orrery.errors import OrreryError
from orrery.housekeeping.inventory import LOGS
from orrery.store import Store

if TYPE_CHECKING:
    from os import PathLike

LONGEST = 200
LOGGING_CONFIG: dict[str, Any] = DEFAULT_LOGGING_CONFIG
log = logging.getLogger(__name__)


class StoreLogs:
    """What Airflow calls a RemoteLogIO: it hands over a log when a task has ended, and asks for it to show it."""

    processors: tuple[Any, ...] = ()

    def upload(self, path: PathLike[str] | str, ti: Any = None) -> None:
        """Put one log into the store. A store that is down costs the log, never the task."""
        source = Path(conf.get("logging", "base_log_folder")) / path
        try:
            if new := source.read_bytes():
                store, place = _store(), _place(path)
                # A task that has waited goes on under the same name, on this machine (which has all of it) or another.
                before = store.read(place) if store.exists(place) else b""
                store.put(place, _joined(before, new))
        except (OrreryError, OSError) as e:
            log.warning("the log %s stays on this machine: %s", path, e)

    def read(self, relative_path: str, ti: Any) -> tuple[list[str], list[str] | None]:
        """Return where a log was found, and its text; `None` when there is none."""
        try:
            place, store = _place(relative_path), _store()
            # A deferred task has several: its own, and one of each triggerer that waited for it.
            folder, _, name = place.rpartition("/")
            found = [f"{folder}/{n}" for n in store.names(folder) if n == name or n.startswith(f"{name}.trigger.")]
            texts = [store.read(p).decode(errors="replace") for p in found]
        except (OrreryError, OSError) as e:
            return [f"the store could not be asked for the log: {e}"], None
        return [f"{store.uri}/{p}" for p in found], texts or None


def _joined(before: bytes, new: bytes) -> bytes:
    """Return a log with what is new in a machine's own.

    Of several machines each has a part: what it handed over before stands in the log in the same order, with the
    others' lines between. Airflow's lines carry their time, so that no two are alike.
    """
    if new.startswith(before):
        return new
    lines, known = new.splitlines(keepends=True), 0
    for line in before.splitlines(keepends=True):
        if known < len(lines) and line.rstrip(b"\n") == lines[known].rstrip(b"\n"):
            known += 1
    rest = b"".join(lines[known:])
    return before + (b"\n" if rest and not before.endswith(b"\n") else b"") + rest


def _store() -> Store:
    return Store(platform.load().store)


def _place(path: PathLike[str] | str) -> str:
    """Return a log's path in the store. Raises `OSError` for one that leaves the folder of the logs."""
    parts = PurePosixPath(os.fspath(path)).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise OSError(f"{path} is no path below the logs")
    return "/".join((LOGS, *map(_segment, parts)))


def _segment(name: str) -> str:
    """Return a name as the store takes it: a run's id holds colons, and may be longer. Two never become one."""
    plain = re.sub(r"[^A-Za-z0-9_.=+-]", lambda m: f",{ord(m[0]):x},", name)
    if len(plain) <= LONGEST:
        return plain
    return f"{plain[: LONGEST - 17]},{hashlib.sha256(name.encode()).hexdigest()[:16]}"


REMOTE_TASK_LOG = StoreLogs()

__all__ = ["LOGGING_CONFIG", "REMOTE_TASK_LOG", "StoreLogs"]
