"""Reads, decides, refuses what looks wrong, removes: the part of housekeeping that touches the store.

One at a time (a lease), bounded in memory (one listing, folded; documents in batches), idempotent: what a killed run
left, the next one finds again. Nothing is removed that was written after it was listed: each unit is listed anew
just before it goes. References go before what they refer to, so that a reader who finds a manifest finds its files.

Ages are told by the store's own clock, as our lease shows it; where this machine's differs much, nothing is removed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from orrery.errors import OrreryError, UserError
from orrery.housekeeping.decisions import Kind, Removal, decide, refusals
from orrery.housekeeping.inventory import (
    BUNDLES,
    LEASE,
    MANIFEST,
    OWN,
    WITHDRAWN,
    Inventory,
    Object,
    empty_folders,
    listing,
    taken,
)
from orrery.housekeeping.references import DAY, Marks, Recorded, mark, named
from orrery.lease import Lease
from orrery.ledger import Ledger, Phase
from orrery.platform import Retention
from orrery.rag import pointer
from orrery.store import Manifest, Store, trouble

BATCH = 256  # documents read at once
SLICE = 200  # units between two looks at our lease and the clock
THREADS = 16
PAGE = 1000  # ledger entries, and objects of one deletion
CLOCKS_S = 600.0  # how far this machine's clock and the store's may be apart
HELD_BYTES = 64 << 20  # of bundles that may have to come back
# What of the ledger names outputs that must stay for ever, wherever in an entry.
FOREVER = frozenset({"promotion", "rollback", "approval", "request"})


@dataclass
class Report:
    """What was found and done. `removed` counts only what is gone; `kept` says what was spared, and why."""

    dry_run: bool
    objects: int = 0
    size: int = 0
    planned: list[Removal] = field(default_factory=list)
    removed: list[Removal] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    studies: dict[str, set[str]] = field(default_factory=dict)  # project -> the searches that something refers to
    seconds: float = 0.0


@dataclass
class Sweep:
    """Housekeeping of one store. `only`: of one project; `share`: instead of the platform's."""

    store: Store
    ledger: Ledger
    terms: Retention
    run: str
    only: str | None = None
    share: float | None = None
    dry_run: bool = False
    actor: str = "housekeeping"
    held: Path | None = None  # a folder for bundles that may have to come back; without one they stay
    patience: float = 12.0  # for another run; one that was killed is waited for ten seconds
    most_s: float = 1200.0  # what removing may take; the rest goes with the next run
    ahead: float = 0.0  # seconds to look ahead: what would go by then
    _lease: Lease | None = field(default=None, init=False)

    def __call__(self) -> Report:
        """Do it. Raises `LeaseHeld` while another run is at it, `UserError` for what looks wrong (see `refusals`)."""
        began = time.monotonic()
        report = Report(self.dry_run)
        lease = Lease(self.store, f"{OWN}/{LEASE}", f"housekeeping/{self.run}", self.run, patience=self.patience)
        with lease:
            self._lease = lease
            inventory, marks, records, now = self._look()
            report.objects, report.size = inventory.whole.count, inventory.whole.size
            report.planned = decide(inventory, marks, records, self.terms, now)
            report.notes += _notes(inventory, marks)
            report.studies = {n: needed.studies for n, needed in marks.projects.items() if not needed.unreadable}
            share = self.terms.share if self.share is None else self.share
            report.refused = refusals(inventory, marks, records, report.planned, share)
            if not report.refused and not self.dry_run:
                self._remove(report, lease, now)
        report.seconds = time.monotonic() - began
        return report

    # -- looking -----------------------------------------------------------------------------------

    def _look(self) -> tuple[Inventory, Marks, dict[str, Recorded], float]:
        inventory = taken(self._listed(), self.only)
        now = self._now()
        self._refuse_another_ledger()
        records = {name: self._recorded(name, now) for name in inventory.projects}
        self._refuse_half_a_listing(inventory, records)
        marks = mark(inventory, records, self.terms, now, self.read)
        return inventory, marks, records, now

    def _listed(self) -> Iterator[Object]:
        if self.only is None:
            return listing(self.store)
        return listing(self.store, self.only)

    def _now(self) -> float:
        """Return the time by the store's clock: when our own lease was renewed last."""
        assert self._lease is not None
        path = f"{self._lease.folder}/{self._lease.token:06d}.json"
        found = {o.path: o.at for o in listing(self.store, self._lease.folder)}
        if path not in found:
            raise UserError(
                f"{self.store.uri}: its listing lacks {path}, which has just been written",
                hint="nothing was removed; may these credentials list the whole store?",
            )
        off = found[path] - time.time()
        if abs(off) > CLOCKS_S:
            raise UserError(
                f"{self.store.uri}: its clock and this machine's differ by {off:+.0f} s",
                hint="nothing was removed: set the clock that is wrong",
            )
        return found[path] + self.ahead

    def _refuse_another_ledger(self) -> None:
        """A ledger that cannot be read raises by itself; see `refusals` for one that is another store's."""
        self.ledger.count("orrery")

    def _recorded(self, project: str, now: float) -> Recorded:
        """Return what the ledger says of a project, read in pages from the newest entry on."""
        found, before = Recorded(), None
        while entries := self.ledger.recent(project, before=before, limit=PAGE):
            before = entries[-1].id
            for entry in entries:
                found.entries += 1
                p = entry.payload
                if entry.kind in FOREVER:
                    found.forever |= set(named(p))
                if entry.kind == "run":
                    if entry.phase == "done":
                        folder = str(p.get("folder") or entry.key)
                        found.attempts.add(folder.partition("/runs/")[2])
                    if "version" in p:
                        found.forever |= set(named(p.get("model")))
                if entry.kind in ("run", "decision") and (output := p.get("output")):
                    at = _seconds(entry.at)
                    found.used[str(output)] = max(found.used.get(str(output), 0.0), at)
        found.forever = self._kept_generations(project, found.forever)
        found.forever = {path for path in found.forever if path.startswith(f"{project}/")}
        return found

    def _kept_generations(self, project: str, forever: set[str]) -> set[str]:
        """Return what is kept for ever; of a knowledge base, which has a new generation a night, what is or was live.

        A rollback goes back to those that `live.json` names; older ones go by `retention.outputs` like any output.
        """
        live = pointer.read(self.store, project)
        # A model has none; of one that cannot be read nobody knows what it named.
        return set(named(live)) if live else forever

    def _refuse_half_a_listing(self, inventory: Inventory, records: dict[str, Recorded]) -> None:
        """Raise `UserError` where the store has what the ledger names and the listing lacks it."""
        for name, record in records.items():
            outputs = inventory.projects[name].outputs
            for path in sorted(record.forever):
                key = "/".join(path.split("/")[1:3])
                listed = outputs.get(key)
                if (listed is None or listed.manifest is None) and self.store.exists(path):
                    raise UserError(
                        f"{self.store.uri}/{path} is there, and the listing lacks it",
                        hint="nothing was removed; may these credentials list the whole store?",
                    )

    def read(self, paths: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield documents by path, some hundred at a time; None for one that is gone. Raises for any other trouble."""
        batch: list[str] = []
        for path in paths:
            batch.append(path)
            if len(batch) == BATCH:
                yield from self._batch(batch)
                batch = []
        if batch:
            yield from self._batch(batch)

    def _batch(self, paths: list[str]) -> Iterator[tuple[str, bytes | None]]:
        if self.store.is_local:
            for path in paths:
                try:
                    yield path, self.store.read(path)
                except FileNotFoundError:
                    yield path, None
            return
        full = {self.store.full(path): path for path in paths}
        with trouble(self.store.uri):
            found = self.store.fs.cat(list(full), on_error="return")
        for where, path in full.items():
            data = found.get(where)
            if isinstance(data, FileNotFoundError):
                yield path, None
            elif isinstance(data, Exception) or data is None:
                with trouble(f"{self.store.uri}/{path}"):
                    raise data if isinstance(data, Exception) else OSError("no answer")
            else:
                yield path, bytes(data)

    # -- removing ----------------------------------------------------------------------------------

    def _remove(self, report: Report, lease: Lease, now: float) -> None:
        self._record("intent", f"{self.run}/{lease.token}", report.planned)
        held: dict[str, Path] = {}
        until = time.monotonic() + self.most_s
        try:
            for kind, group in itertools.groupby(report.planned, key=lambda r: r.kind):
                for removals in _slices(list(group), SLICE):
                    lease.check()
                    if time.monotonic() > until:
                        report.notes.append(f"{self.most_s:.0f} s are over: the rest goes with the next run")
                        break
                    self._some(kind, removals, report, held)
            if held or any(r.kind == "output" for r in report.removed):
                self._look_again(report, held)
        except BaseException:
            for path, bundle in held.items():  # nobody has looked whether they were taken up
                with contextlib.suppress(OrreryError, OSError):
                    self.store.put_if_absent(path, bundle.read_bytes())
            report.removed = [r for r in report.removed if r.path not in held]
            raise
        finally:
            for bundle in held.values():
                bundle.unlink(missing_ok=True)
            self._record("done", f"{self.run}/{lease.token}", report.removed)
        if self.only is None:
            self._empty_folders(now)

    def _some(self, kind: Kind, removals: list[Removal], report: Report, held: dict[str, Path]) -> None:
        """Remove some of one kind: files in one call, units side by side where each is a few calls to a bucket."""
        one = getattr(self, f"_of_{kind}", None)
        if kind == "bundle":
            there = [r for r in removals if self._hold(r, held)]
            if len(there) < len(removals):
                report.notes.append(f"{len(removals) - len(there)} bundles are left for the next run")
            removals = there
        if one is None:
            self._delete([r.path for r in removals])
            spared = [""] * len(removals)
        elif self.store.is_local:
            spared = [one(r) for r in removals]
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                spared = list(pool.map(one, removals))
        for removal, why in zip(removals, spared, strict=True):
            if why:
                report.kept.append(f"{removal.path}: {why}")
            else:
                report.removed.append(removal)

    def _of_attempt(self, removal: Removal) -> str:
        return self._folder(removal, ("config.json", "attempt.json"))

    def _of_log(self, removal: Removal) -> str:
        return self._folder(removal, ())

    def _of_checkpoints(self, removal: Removal) -> str:
        """Documents first: who finds one finds its files, or falls back on an earlier one."""
        above = removal.path.rpartition("/")[0]
        if any(o.at > removal.newest for o in listing(self.store, above) if f"/{LEASE}/" in o.path):
            return "the training goes on"
        return self._folder(
            removal, tuple(o.path for o in listing(self.store, removal.path) if o.path.endswith(".json"))
        )

    def _of_output(self, removal: Removal) -> str:
        """Withdraw: from here on it is not there, and its files are for a day."""
        manifest, withdrawn = f"{removal.path}/{MANIFEST}", f"{removal.path}/{WITHDRAWN}"
        try:
            data = self.store.read(manifest)
        except FileNotFoundError:
            return "it is gone"
        self.store.put(withdrawn, data)
        self.store.remove(manifest)
        return ""

    def _of_restore(self, removal: Removal) -> str:
        manifest, withdrawn = f"{removal.path}/{MANIFEST}", f"{removal.path}/{WITHDRAWN}"
        try:
            data = self.store.read(withdrawn)
        except FileNotFoundError:
            return "it is gone"
        found = Manifest.model_validate_json(data)
        if missing := self.store.missing_files(found):
            return f"it cannot come back: {missing[0]}"
        self.store.put_if_absent(manifest, data)
        self.store.remove(withdrawn)
        return ""

    def _of_withdrawn(self, removal: Removal) -> str:
        """The document first: without it nobody brings the output back, and what is left is a leftover."""
        if self.store.exists(f"{removal.path}/{MANIFEST}"):
            return "it is committed again"
        writers = {o.path.split("/")[3] for o in self._below(removal.path)}
        self.store.remove(f"{removal.path}/{WITHDRAWN}")
        self._delete([o.path for o in self._below(removal.path) if o.path.split("/")[3] in writers])
        return ""

    def _below(self, folder: str) -> list[Object]:
        """Return the writers' files at an address: neither documents nor leases nor checkpoints."""
        aside = (MANIFEST, WITHDRAWN, LEASE, "checkpoints")
        return [o for o in listing(self.store, folder) if o.path.split("/")[3] not in aside]

    def _of_leftover(self, removal: Removal) -> str:
        """Take the next lease number first: a writer that only sleeps must not commit what is not there any more."""
        address, _, writer = removal.path.rpartition("/")
        if spared := self._newer(removal):
            return spared
        before = self._manifest(address)
        if before is not None and _names(before, writer):
            return "it is committed"
        self._fence(address)
        self._delete([o.path for o in listing(self.store, removal.path)])
        after = self._manifest(address)
        if after is not None and _names(after, writer):  # its last look at the lease was before ours
            self.store.remove(f"{address}/{MANIFEST}")
            return "it was committed while its files went, which is undone: its step will run again"
        return ""

    def _fence(self, address: str) -> None:
        folder = f"{address}/{LEASE}"
        numbers = [int(name[:6]) for name in self.store.names(folder) if name[:6].isdecimal()]
        if numbers:  # an output that is written under another lease (`ingest`) has none here
            document = {"owner": "housekeeping", "attempt": self.run, "renewed": 0, "done": True}
            self.store.put_if_absent(f"{folder}/{max(numbers) + 1:06d}.json", json.dumps(document).encode())

    def _manifest(self, address: str) -> Manifest | None:
        with contextlib.suppress(UserError):
            return self.store.manifest(f"{address}/{MANIFEST}")
        return None

    def _of_marker(self, removal: Removal) -> str:
        self.store.remove(removal.path)
        parent, _, child = removal.path.rpartition("/")
        verb, _, address = child.partition(".")
        project = parent.partition("/")[0]
        if self.store.exists(f"{project}/{verb}/{address}/{MANIFEST}"):
            self.store.put_if_absent(removal.path, b"")
            return "it has come back"
        return ""

    def _hold(self, removal: Removal, held: dict[str, Path]) -> bool:
        """Keep a bundle's bytes until it is sure that nobody has taken it up meanwhile."""
        if self.held is None or sum(p.stat().st_size for p in held.values()) + removal.size > HELD_BYTES:
            return False
        path = self.held / removal.path.rpartition("/")[2]
        try:
            path.write_bytes(self.store.read(removal.path))
        except FileNotFoundError:
            return True
        held[removal.path] = path
        return True

    def _newer(self, removal: Removal) -> str:
        newest = max((o.at for o in listing(self.store, removal.path)), default=0.0)
        return "it was written in since" if newest > removal.newest else ""

    def _folder(self, removal: Removal, first: tuple[str, ...]) -> str:
        """Remove a folder's objects, those in `first` before the others, unless anything is newer than it was."""
        objects = list(listing(self.store, removal.path))
        if any(o.at > removal.newest for o in objects):
            return "it was written in since"
        ahead = {name if "/" in name else f"{removal.path}/{name}" for name in first}
        self._delete([o.path for o in objects if o.path in ahead])
        self._delete([o.path for o in objects if o.path not in ahead])
        return ""

    def _delete(self, paths: list[str]) -> None:
        """Remove files; one that is gone is fine."""
        if self.store.is_local:
            for path in paths:
                with trouble(path), contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.store.root}/{path}")
            return
        for i in range(0, len(paths), PAGE):
            with trouble(self.store.uri):
                self.store.fs.rm([f"{self.store.root}/{path}" for path in paths[i : i + PAGE]])

    def _look_again(self, report: Report, held: dict[str, Path]) -> None:
        """Bring back what somebody has taken up between our look and now."""
        inventory, marks, records, now = self._look()
        for removal in decide(inventory, marks, records, self.terms, now):
            if removal.kind == "restore" and not self._of_restore(removal):
                report.kept.append(f"{removal.path}: it was taken up meanwhile and is back")
                report.removed = [r for r in report.removed if r.path != removal.path]
        for path, bytes_ in held.items():
            if path.removeprefix(f"{BUNDLES}/").removesuffix(".tar") in marks.bundles:
                self.store.put_if_absent(path, bytes_.read_bytes())
                report.kept.append(f"{path}: it was taken up meanwhile and is back")
                report.removed = [r for r in report.removed if r.path != path]

    def _empty_folders(self, now: float) -> None:
        for path in empty_folders(self.store, now - DAY):
            with contextlib.suppress(OSError):  # somebody has put something into it
                Path(f"{self.store.root}/{path}").rmdir()

    # -- the record --------------------------------------------------------------------------------

    def _record(self, phase: Phase, key: str, removals: list[Removal]) -> None:
        """Append what is about to go, and what has gone, to the ledger, project by project."""
        for project in sorted({r.project for r in removals}):
            told = {"removed": counts(r for r in removals if r.project == project)}
            self.ledger.record(project or OWN, "housekeeping", key, phase, self.actor, told)


def counts(removals: Iterable[Removal]) -> dict[Kind, dict[str, int]]:
    """Return how many of each kind, of how many objects and bytes."""
    found: dict[Kind, dict[str, int]] = {}
    for one in removals:
        told = found.setdefault(one.kind, {"units": 0, "objects": 0, "bytes": 0})
        told["units"] += 1
        told["objects"] += one.count
        told["bytes"] += one.size
    return found


def _names(manifest: Manifest, writer: str) -> bool:
    return any(file.path.startswith(f"{writer}/") for file in manifest.files.values())


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def _notes(inventory: Inventory, marks: Marks) -> list[str]:
    """Return what a person should know of, beside what is removed."""
    notes = []
    if inventory.unknown.count:
        u = inventory.unknown
        notes.append(f"{u.count:,} objects ({u.size:,} bytes) are none of Orrery's, and are left alone")
    for name, needed in sorted(marks.projects.items()):
        if needed.unreadable:
            first, many = needed.unreadable[0], len(needed.unreadable)
            notes.append(
                f"{name}: {many} documents cannot be read ({first}): its outputs and all bundles stay till then"
            )
        if needed.dangling:
            first = min(needed.dangling)
            notes.append(f"{name}: {len(needed.dangling)} outputs that something refers to are gone, such as {first}")
    return notes


def _slices(removals: list[Removal], size: int) -> Iterator[list[Removal]]:
    for i in range(0, len(removals), size):
        yield removals[i : i + size]
