"""What one listing of the store says, folded by unit as it comes: a hundred thousand objects are a few thousand units.

Pure but for `listing`. What has no place in the store's layout is counted as unknown, and never touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orrery.store import SEGMENT, Store, trouble

PAGE = 1000  # objects in one answer of a bucket: the most that S3 gives
# Beside the projects in a store. A project's name begins with a letter, so ours cannot be one.
OWN = "_housekeeping"
LOGS = "_airflow/logs"  # Airflow's task logs: <dag>/<run>/<task>/<attempt>
BUNDLES = "bundles"
MANIFEST, WITHDRAWN, CONFIG = "manifest.json", "withdrawn.json", "config.json"
CHECKPOINTS, LEASE = "checkpoints", "lease"
PROJECT = re.compile(r"[a-z][a-z0-9_]{0,62}", re.ASCII)
NUMBERED = re.compile(r"(\d{6})\.json", re.ASCII)
BUNDLE = re.compile(r"([0-9a-f]{64})\.tar", re.ASCII)
ADDRESS = re.compile(r"[0-9a-f]{16,64}", re.ASCII)
WRITER = re.compile(r"a\d+-[0-9a-f]{8}", re.ASCII)
# What a file is called while it is written beside its place (see `Store.put`).
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}", re.ASCII)


class Object(NamedTuple):
    """One object of the store: its path, bytes, and when it was written (seconds since 1970, by the store's clock)."""

    path: str
    size: int
    at: float


@dataclass
class Group:
    """Objects that come and go together: how many, how many bytes, when the last one was written."""

    count: int = 0
    size: int = 0
    newest: float = 0.0

    def add(self, size: int, at: float) -> None:
        """Count one more."""
        self.count += 1
        self.size += size
        self.newest = max(self.newest, at)

    def __add__(self, other: Group) -> Group:
        return Group(self.count + other.count, self.size + other.size, max(self.newest, other.newest))


@dataclass
class Output:
    """One address of a verb: what is committed there, who wrote, who may be writing."""

    manifest: float | None = None  # when it was put
    withdrawn: float | None = None
    writers: dict[str, Group] = field(default_factory=dict)
    checkpoints: Group = field(default_factory=Group)
    leases: dict[int, float] = field(default_factory=dict)
    whole: Group = field(default_factory=Group)

    @property
    def renewed(self) -> float:
        """When a lease of it was renewed last; 0 without any."""
        return max(self.leases.values(), default=0.0)


@dataclass
class Project:
    """All that one project has in the store. Keys of `outputs` are `<verb>/<address>`."""

    outputs: dict[str, Output] = field(default_factory=dict)
    pointers: dict[str, dict[int, float]] = field(default_factory=dict)  # <dataset>/<key> -> number -> when
    markers: dict[str, tuple[int, float]] = field(default_factory=dict)  # <address>/<verb>.<address>
    attempts: dict[str, Group] = field(default_factory=dict)  # <run>/<task>/<number>
    planned: set[str] = field(default_factory=set)  # those of them that have a config
    leases: dict[str, dict[int, float]] = field(default_factory=dict)  # folder -> number -> when
    whole: Group = field(default_factory=Group)

    @property
    def committed(self) -> int:
        """How many outputs there are."""
        return sum(output.manifest is not None for output in self.outputs.values())


@dataclass
class Inventory:
    """A whole store. `only`: of one project alone; then nothing is known of who else uses a bundle."""

    only: str | None = None
    projects: dict[str, Project] = field(default_factory=dict)
    bundles: dict[str, Group] = field(default_factory=dict)
    temporary: list[Object] = field(default_factory=list)
    reports: list[Object] = field(default_factory=list)
    logs: dict[str, Group] = field(default_factory=dict)  # folder of a run -> its tasks' logs
    own: dict[int, float] = field(default_factory=dict)  # leases of housekeeping itself
    unknown: Group = field(default_factory=Group)
    whole: Group = field(default_factory=Group)

    def add(self, found: Object) -> None:
        """Fold one object in."""
        self.whole.add(found.size, found.at)
        parts = found.path.split("/")
        if TEMPORARY.fullmatch(parts[-1]) and all(SEGMENT.fullmatch(p) for p in parts[:-1]):
            self.temporary.append(found)
        elif not all(SEGMENT.fullmatch(p) for p in parts) or not self._place(parts, found):
            self.unknown.add(found.size, found.at)

    def _place(self, parts: list[str], found: Object) -> bool:
        """Put an object where it belongs; tell whether there is such a place."""
        if parts[0] == OWN:
            return self._own(parts, found)
        if parts[:2] == LOGS.split("/"):
            if len(parts) < 5:
                return False
            self.logs.setdefault("/".join(parts[:4]), Group()).add(found.size, found.at)
            return True
        if len(parts) == 2 and parts[0] == BUNDLES and (bundle := BUNDLE.fullmatch(parts[1])):
            self.bundles[bundle[1]] = Group(1, found.size, found.at)
            return True
        if len(parts) < 4 or not PROJECT.fullmatch(parts[0]):
            return False
        project = self.projects.setdefault(parts[0], Project())
        project.whole.add(found.size, found.at)
        return _of_project(project, parts[1], parts[2:], found)

    def _own(self, parts: list[str], found: Object) -> bool:
        if len(parts) == 3 and parts[1] == LEASE and (number := NUMBERED.fullmatch(parts[2])):
            self.own[int(number[1])] = found.at
        elif len(parts) == 3 and parts[1] == "reports":
            self.reports.append(found)
        else:
            return False
        return True


def _of_project(project: Project, room: str, rest: list[str], found: Object) -> bool:
    number = NUMBERED.fullmatch(rest[-1])
    if room == "datasets":
        if len(rest) != 3 or not number:
            return False
        project.pointers.setdefault(f"{rest[0]}/{rest[1]}", {})[int(number[1])] = found.at
    elif room == "dependents":
        if len(rest) != 2:
            return False
        project.markers["/".join(rest)] = (found.size, found.at)
    elif room == "runs":
        if len(rest) < 4 or not rest[2].isdecimal():
            return False
        folder = "/".join(rest[:3])
        project.attempts.setdefault(folder, Group()).add(found.size, found.at)
        if rest[3:] == [CONFIG]:
            project.planned.add(folder)
    elif len(rest) == 2 and rest[0] == LEASE and number:  # champion/lease
        project.leases.setdefault(f"{room}/{LEASE}", {})[int(number[1])] = found.at
    elif len(rest) == 3 and rest[1] == LEASE and number and not ADDRESS.fullmatch(rest[0]):  # ingest/at-2013-03/lease
        project.leases.setdefault(f"{room}/{rest[0]}/{LEASE}", {})[int(number[1])] = found.at
    elif ADDRESS.fullmatch(rest[0]):
        return _of_output(project.outputs.setdefault(f"{room}/{rest[0]}", Output()), rest[1:], found)
    else:
        return False
    return True


def _of_output(output: Output, rest: list[str], found: Object) -> bool:
    if not rest:
        return False
    if rest == [MANIFEST]:
        output.manifest = found.at
    elif rest == [WITHDRAWN]:
        output.withdrawn = found.at
    elif rest[0] == CHECKPOINTS:
        output.checkpoints.add(found.size, found.at)
    elif rest[0] == LEASE and len(rest) == 2 and (number := NUMBERED.fullmatch(rest[1])):
        output.leases[int(number[1])] = found.at
    elif WRITER.fullmatch(rest[0]) and len(rest) > 1:
        output.writers.setdefault(rest[0], Group()).add(found.size, found.at)
    else:
        return False
    output.whole.add(found.size, found.at)
    return True


def taken(objects: Iterable[Object], only: str | None = None) -> Inventory:
    """Return the inventory of a listing."""
    found = Inventory(only)
    for one in objects:
        found.add(one)
    return found


# -- the listing ---------------------------------------------------------------------------------------


def listing(store: Store, folder: str = "") -> Iterator[Object]:
    """Yield every object below a folder (the whole store without one), as it comes: one call per thousand of a bucket.

    Raises what `trouble` makes of a listing that breaks off: half of one must not be taken for all.
    """
    root = f"{store.root}/{folder}" if folder else store.root
    with trouble(f"{store.uri}/{folder}".rstrip("/")):
        if store.is_local:
            yield from _walk(Path(root), f"{folder}/" if folder else "")
        else:
            yield from _pages(store, f"{root}/")


def _walk(folder: Path, prefix: str) -> Iterator[Object]:
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except FileNotFoundError:  # gone since it was seen
        return
    for entry in entries:
        path = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{path}/")
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        yield Object(path, status.st_size, status.st_mtime)


def _pages(store: Store, root: str) -> Iterator[Object]:
    bucket, _, prefix = root.partition("/")
    base = store.root.partition("/")[2]
    cut = len(base) + 1 if base else 0
    more: dict[str, Any] = {}
    while True:
        page = store.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=PAGE, **more)
        for one in page.get("Contents", ()):
            if not one["Key"].endswith("/"):
                yield Object(one["Key"][cut:], int(one["Size"]), one["LastModified"].timestamp())
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def empty_folders(store: Store, before: float) -> list[str]:
    """Return folders of a local store that hold nothing and have not changed since `before`, the deepest first."""
    if not store.is_local:
        return []
    found: list[str] = []

    def look(folder: Path, path: str) -> bool:
        empty = True
        try:
            for entry in sorted(os.scandir(folder), key=lambda e: e.name):
                below = f"{path}/{entry.name}" if path else entry.name
                if not entry.is_dir(follow_symlinks=False) or not look(Path(entry.path), below):
                    empty = False
            # A step makes its folder first and its file then: only what nobody has touched for long is nobody's.
            old = folder.stat().st_mtime < before
        except OSError:
            return False
        if empty and old and path:
            found.append(path)
            return True
        return False

    look(Path(store.root), "")
    return found
