"""What refers to what: from roots, over the documents of the store, to all that must stay. Pure: `read` is given.

Roots are: of each partition the version that counts; what the ledger names for ever (a registered or promoted model,
the evaluation and the verdict it was promoted on, what was approved); what was made, used or superseded not long ago;
and every attempt whose folder is kept, since it may be repeated, or is running. From there, everything that a kept
output was made from is kept, and so on down to the raw data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orrery.housekeeping.inventory import CONFIG, MANIFEST, WITHDRAWN, Inventory, Project
from orrery.platform import Retention
from orrery.spec import seconds

# Hands back documents by path, in any order; None for one that is gone by now.
Read = Callable[[Iterable[str]], Iterator[tuple[str, bytes | None]]]
OUTPUT = re.compile(r"[a-z][a-z0-9_]{0,62}/[a-z][a-z0-9_]*/[0-9a-f]{16,64}/manifest\.json", re.ASCII)
DAY = 86400.0


@dataclass
class Recorded:
    """What the ledger says of one project."""

    attempts: set[str] = field(default_factory=set)  # <run>/<task>/<number> of those whose end is on record
    forever: set[str] = field(default_factory=set)  # manifests
    used: dict[str, float] = field(default_factory=dict)  # manifest -> when a run last ended with it
    entries: int = 0


@dataclass
class Needed:
    """What must stay of one project. Outputs are `<verb>/<address>`, attempts `<run>/<task>/<number>`."""

    outputs: set[str] = field(default_factory=set)
    attempts: set[str] = field(default_factory=set)
    writers: dict[str, set[str]] = field(default_factory=dict)  # of a committed output: whose files it names
    busy: dict[str, float] = field(default_factory=dict)  # <verb>/<address> -> when an attempt at it last wrote
    studies: set[str] = field(default_factory=set)
    superseded: dict[str, list[str]] = field(default_factory=dict)  # output -> older versions of partitions that it is
    unreadable: list[str] = field(default_factory=list)
    dangling: set[str] = field(default_factory=set)


@dataclass
class Marks:
    """What must stay of a store."""

    projects: dict[str, Needed] = field(default_factory=dict)
    bundles: set[str] = field(default_factory=set)


def named(value: Any) -> Iterator[str]:
    """Yield every manifest that a document of the ledger names, wherever in it."""
    if isinstance(value, str):
        if OUTPUT.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from named(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from named(one)


def mark(inventory: Inventory, records: Mapping[str, Recorded], terms: Retention, now: float, read: Read) -> Marks:
    """Return what must stay."""
    marks = Marks()
    for name, project in inventory.projects.items():
        found = _Marking(name, project, records.get(name, Recorded()), terms, now, read, marks)
        found.run()
        marks.projects[name] = found.needed
    return marks


class _Marking:
    """One project's marking."""

    def __init__(
        self, name: str, project: Project, record: Recorded, terms: Retention, now: float, read: Read, marks: Marks
    ) -> None:
        self.name, self.project, self.record, self.terms = name, project, record, terms
        self.now, self.read, self.marks = now, read, marks
        self.needed = Needed()
        self._forever: set[str] = set()

    def run(self) -> None:
        """Mark. The order matters: which attempts are kept follows from what the ledger names."""
        self._follow({self._output(path) for path in self.record.forever}, forever=True)
        roots = self._attempts() | self._pointers()
        roots |= {output for output, at in self._ages().items() if self._young(at, self.terms.outputs)}
        self._follow(roots)

    def _young(self, at: float, keep: str | None) -> bool:
        return keep is None or self.now - at <= seconds(keep)

    def _output(self, path: str) -> str:
        return "/".join(path.split("/")[1:3])

    def _ages(self) -> dict[str, float]:
        """Return when each output was made, or used, last."""
        found = {}
        for key, output in self.project.outputs.items():
            used = self.record.used.get(f"{self.name}/{key}/{MANIFEST}", 0.0)
            if output.manifest is not None:
                found[key] = max(output.manifest, used)
            elif output.withdrawn is not None and (self.terms.outputs is None or used > output.withdrawn):
                found[key] = used  # a run has ended with it since; or outputs are kept for ever from now on
        return found

    def _attempts(self) -> set[str]:
        """Keep the attempts that may be repeated or are running; return the outputs that they read or make."""
        kept = set()
        for folder, group in self.project.attempts.items():
            # One whose end nobody recorded may be asked for when its run is cleared: it is given twice the time.
            keep = self.terms.attempts
            limit = None if keep is None else seconds(keep) * (1 if folder in self.record.attempts else 2)
            if limit is None or self.now - group.newest <= limit or folder in self._forever:
                kept.add(folder)
        self.needed.attempts = kept
        roots: set[str] = set()
        for path, config in self._documents(
            f"{self.name}/runs/{f}/{CONFIG}" for f in sorted(kept & self.project.planned)
        ):
            folder = path.removeprefix(f"{self.name}/runs/").removesuffix(f"/{CONFIG}")
            roots |= self._safely(path, lambda: self._config(folder, config))  # noqa: B023
        return roots

    def _config(self, folder: str, config: Mapping[str, Any]) -> set[str]:
        self.marks.bundles.add(str(config.get("bundle")))
        params = config.get("params") or {}
        verb, address = config.get("verb"), config.get("address")
        roots = {self._output(ref["path"]) for refs in (config.get("inputs") or {}).values() for ref in refs}
        if address:
            own, at = f"{verb}/{address}", self.project.attempts[folder].newest
            self.needed.busy[own] = max(self.needed.busy.get(own, 0.0), at)
            roots.add(own)
        if study := params.get("study"):
            self.needed.studies.add(str(study))
            roots |= {f"trial/{trial}" for trial in params.get("trials") or ()}
        return roots

    def _pointers(self) -> set[str]:
        """Return what partitions are, or were until not long ago; remember the older versions of the rest."""
        where: dict[str, float | None] = {}
        for key, numbers in self.project.pointers.items():
            order = sorted(numbers)
            for number, after in zip(order, [*order[1:], None], strict=True):
                path = f"{self.name}/datasets/{key}/{number:06d}.json"
                where[path] = None if after is None else numbers[after]
        roots = set()
        for path, pointer in self._documents(where):
            output, since = self._output(str(pointer.get("manifest"))), where[path]
            if since is None or self._young(since, self.terms.outputs):
                roots.add(output)
            else:
                self.needed.superseded.setdefault(output, []).append(path)
        return roots

    def _follow(self, roots: set[str], *, forever: bool = False) -> None:
        """Keep outputs and all that they were made from. `forever`: also the attempts that made the first of them."""
        frontier, first = roots - self.needed.outputs, True
        while frontier:
            self.needed.outputs |= frontier
            there = {path: output for output in frontier if (path := self._path(output))}
            self.needed.dangling |= frontier - set(there.values())
            frontier = set()
            for path, manifest in self._documents(there):
                frontier |= self._safely(path, lambda: self._manifest(there[path], manifest))  # noqa: B023
                if forever and first:
                    self._forever.add(str(manifest.get("attempt")).partition("/runs/")[2])
            frontier, first = frontier - self.needed.outputs, False

    def _safely(self, path: str, look: Callable[[], set[str]]) -> set[str]:
        """Return what a document refers to; one that is not as we write it is remembered as unreadable."""
        try:
            return look()
        except (KeyError, TypeError, AttributeError, ValueError):
            self.needed.unreadable.append(path)
            return set()

    def _path(self, output: str) -> str | None:
        found = self.project.outputs.get(output)
        if found is None or (found.manifest is None and found.withdrawn is None):
            return None
        return f"{self.name}/{output}/{WITHDRAWN if found.manifest is None else MANIFEST}"

    def _manifest(self, output: str, manifest: Mapping[str, Any]) -> set[str]:
        self.marks.bundles.add(str((manifest.get("fingerprint") or {}).get("project")))
        study = (manifest.get("facts") or {}).get("study")
        if study:
            self.needed.studies.add(str(study))
        files = manifest.get("files") or {}
        self.needed.writers[output] = {str(file["path"]).partition("/")[0] for file in files.values()}
        return {self._output(ref["path"]) for refs in (manifest.get("inputs") or {}).values() for ref in refs}

    def _documents(self, paths: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield documents; remember those that cannot be read, since nobody knows what they refer to."""
        for path, data in self.read(paths):
            if data is None:
                continue
            try:
                found = json.loads(data)
                if not isinstance(found, dict):
                    raise ValueError("it is no object")
            except ValueError:
                self.needed.unreadable.append(path)
                continue
            yield path, found
