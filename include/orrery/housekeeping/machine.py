"""What lies on this machine: temporary folders of steps that are gone, studies of searches that are, old logs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from orrery import local, platform
from orrery.platform import Retention
from orrery.spec import seconds

STUDY = re.compile(r"([0-9a-f]{32})\.journal(\.lock)?", re.ASCII)
# Of another machine nobody here knows which processes live.
ELSEWHERE_S = 90 * 86400.0


@dataclass(frozen=True)
class Leftover:
    """A file or folder of this machine that may go."""

    path: Path
    why: str
    size: int


def temporary() -> list[Leftover]:
    """Return the temporary folders of steps that have ended, below var/tmp."""
    home, found = platform.home() / "var" / "tmp", []
    for folder in sorted(home.iterdir()) if home.is_dir() else ():
        machine, number, *_ = f"{folder.name}--".split("-")
        if machine == local._machine():
            if not local._runs(number) and not local._in_use(folder):
                found.append(Leftover(folder, "its step has ended", _size(folder)))
        elif re.fullmatch("[0-9a-f]{6}", machine) and time.time() - _newest(folder) > ELSEWHERE_S:
            found.append(Leftover(folder, "of another machine, and not touched for 90 days", _size(folder)))
    return found


def studies(needed: Mapping[str, set[str]], terms: Retention) -> list[Leftover]:
    """Return the journals of searches that have left no output and no attempt; `needed`: those that have, by project.

    A study in a database is left alone.
    """
    where = platform.load().tuning
    if ("://" in where and not where.startswith("file://")) or terms.checkpoints is None:
        return []
    folder, found = Path(where.removeprefix("file://")).expanduser(), []
    before = time.time() - seconds(terms.checkpoints)
    for project, keys in sorted(needed.items()):
        for file in sorted((folder / project).glob("*.journal*")):
            study = STUDY.fullmatch(file.name)
            if study and study[1] not in keys and file.stat().st_mtime < before:
                found.append(Leftover(file, "no trial of this search is left", file.stat().st_size))
    return found


def logs(folder: Path, terms: Retention) -> list[Leftover]:
    """Return Airflow's task logs below a folder that are older than they are kept."""
    if terms.logs is None or not folder.is_dir():
        return []
    before, found = time.time() - seconds(terms.logs), []
    for file in _files(folder):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat(follow_symlinks=False)
            if status.st_mtime < before and file.suffix == ".log" and not file.is_symlink():
                found.append(Leftover(file, f"older than {terms.logs}", status.st_size))
    return found


def remove(found: list[Leftover], say: Callable[[str], None]) -> list[Leftover]:
    """Remove them; return what is gone. What cannot be removed is told."""
    gone = []
    for one in found:
        try:
            if one.path.is_dir() and not one.path.is_symlink():
                shutil.rmtree(one.path)
            else:
                one.path.unlink(missing_ok=True)
        except OSError as e:
            say(f"{one.path} cannot be removed: {e.strerror or e}")
            continue
        gone.append(one)
    return gone


def _files(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        for name in sorted(names):
            yield Path(where) / name


def _size(path: Path) -> int:
    total = 0
    for file in _files(path):
        with contextlib.suppress(OSError):
            total += file.stat(follow_symlinks=False).st_size
    return total


def _newest(path: Path) -> float:
    found = path.stat().st_mtime
    for file in _files(path):
        with contextlib.suppress(OSError):
            found = max(found, file.stat(follow_symlinks=False).st_mtime)
    return found
