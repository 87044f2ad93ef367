"""What may go, and why: a pure function of the inventory, of what is needed, and of the terms. Each has its reason.

What looks wrong is refused as a whole (`refusals`): a listing that lacks what is there, a ledger that is another
one's, a share that is too large. A wrong clock or a missing permission must not empty a store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from orrery.housekeeping.inventory import (
    BUNDLES,
    CHECKPOINTS,
    OWN,
    WITHDRAWN,
    Group,
    Inventory,
    Output,
    Project,
)
from orrery.housekeeping.references import DAY, Marks, Needed, Recorded
from orrery.platform import Retention
from orrery.spec import seconds

Kind = Literal[
    "attempt",  # an attempt's folder
    "checkpoints",  # of a training
    "output",  # a committed output: its manifest is withdrawn, its files stay a day longer
    "withdrawn",  # the files of one that was withdrawn by an earlier run
    "restore",  # one that was withdrawn and is asked for: it comes back. Removes nothing
    "leftover",  # a writer's files that no manifest names
    "pointer",  # an older version of a partition, whose output is withdrawn
    "marker",  # a note "was made from" of an output that is gone
    "lease",  # lease files below the highest number
    "bundle",  # a project's code
    "temporary",  # a file whose writer died before it had its name
    "report",  # what housekeeping wrote about itself
    "log",  # Airflow's logs of a run's tasks
]
COUNTED: tuple[Kind, ...] = ("output", "attempt")  # what the share is a bound of
FEW = 10  # so many may always go: shares of small numbers say nothing
WITHDRAWN_FOR = DAY
LEASES_FOR = 90 * DAY  # an orphan that sleeps for so long is none; until then its number must be known


@dataclass(frozen=True)
class Removal:
    """One thing that may go. `path` is a file or a folder of the store, `newest` when it was written last."""

    kind: Kind
    project: str
    path: str
    why: str
    count: int
    size: int
    newest: float


def decide(
    inventory: Inventory, marks: Marks, records: Mapping[str, Recorded], terms: Retention, now: float
) -> list[Removal]:
    """Return what may go, in the order in which it should: references before what they refer to."""
    found: list[Removal] = []
    for name, project in sorted(inventory.projects.items()):
        one = _Project(name, project, marks.projects[name], records.get(name, Recorded()), terms, now)
        found += one.removals()
    unclear = any(needed.unreadable for needed in marks.projects.values())
    if inventory.only is None and not unclear:
        found += _bundles(inventory, marks, terms, now)
    if inventory.only is None:
        old = now - seconds(terms.leftovers)
        for temporary in inventory.temporary:
            if temporary.at < old:
                why = f"written {_ago(now, temporary.at)} and never given its name"
                found.append(Removal("temporary", "", temporary.path, why, 1, temporary.size, temporary.at))
        for report in inventory.reports:
            if now - report.at > LEASES_FOR:
                found.append(Removal("report", "", report.path, _ago(now, report.at), 1, report.size, report.at))
        found += _logs(inventory, terms, now)
        found += _lower("", f"{OWN}/lease", inventory.own, now - DAY)
    return found


def _logs(inventory: Inventory, terms: Retention, now: float) -> Iterator[Removal]:
    for folder, group in sorted(inventory.logs.items()):
        if terms.logs is not None and now - group.newest > seconds(terms.logs):
            why = f"logs of a run, the last of them written {_ago(now, group.newest)}"
            yield Removal("log", "", folder, why, group.count, group.size, group.newest)


def _bundles(inventory: Inventory, marks: Marks, terms: Retention, now: float) -> Iterator[Removal]:
    for digest, group in sorted(inventory.bundles.items()):
        if digest not in marks.bundles and now - group.newest > seconds(terms.leftovers):
            why = "no output and no attempt that is kept was made with this code"
            yield Removal("bundle", "", f"{BUNDLES}/{digest}.tar", why, 1, group.size, group.newest)


class _Project:
    """One project's removals."""

    def __init__(
        self, name: str, project: Project, needed: Needed, record: Recorded, terms: Retention, now: float
    ) -> None:
        self.name, self.project, self.needed, self.record = name, project, needed, record
        self.terms, self.now = terms, now
        self.old = now - seconds(terms.leftovers)

    def removals(self) -> list[Removal]:
        """Return all of them."""
        found = [*self._restored(), *self._attempts(), *self._pointers(), *self._outputs()]
        for key, output in sorted(self.project.outputs.items()):
            found += self._of_output(key, output)
        found += self._markers()
        for folder, leases in sorted(self.project.leases.items()):
            found += _lower(self.name, f"{self.name}/{folder}", leases, self.now - DAY)
        return found

    def _restored(self) -> Iterator[Removal]:
        for key, output in sorted(self.project.outputs.items()):
            if output.manifest is None and output.withdrawn is not None and key in self.needed.outputs:
                why = "it was withdrawn, and something refers to it"
                yield Removal("restore", self.name, f"{self.name}/{key}", why, 0, 0, output.withdrawn)

    def _gone(self) -> list[str]:
        """Return the committed outputs that nothing needs. Where a document is unreadable nobody knows: none."""
        if self.needed.unreadable or self.terms.outputs is None:
            return []
        there = (key for key, output in self.project.outputs.items() if output.manifest is not None)
        return sorted(key for key in there if key not in self.needed.outputs)

    def _outputs(self) -> Iterator[Removal]:
        for key in self._gone():
            output = self.project.outputs[key]
            assert output.manifest is not None
            old = key in self.needed.superseded
            why = "superseded" if old else "published nowhere"
            why += f", made {_ago(self.now, output.manifest)}, and nothing that is kept refers to it"
            whole = output.whole
            yield Removal("output", self.name, f"{self.name}/{key}", why, whole.count, whole.size, output.manifest)

    def _pointers(self) -> Iterator[Removal]:
        for key in self._gone():
            for path in self.needed.superseded.get(key, ()):
                yield Removal("pointer", self.name, path, f"an older version, {key}, which goes", 1, 0, 0.0)

    def _attempts(self) -> Iterator[Removal]:
        for folder, group in sorted(self.project.attempts.items()):
            if folder not in self.needed.attempts:
                recorded = folder in self.record.attempts
                why = f"ended {_ago(self.now, group.newest)}" if recorded else "nobody has recorded its end; "
                why += "" if recorded else f"last written {_ago(self.now, group.newest)}"
                path = f"{self.name}/runs/{folder}"
                yield Removal("attempt", self.name, path, why, group.count, group.size, group.newest)

    def _of_output(self, key: str, output: Output) -> Iterator[Removal]:
        yield from self._checkpoints(key, output)
        if output.manifest is None and output.withdrawn is not None:
            yield from self._withdrawn(key, output)
        else:
            yield from self._leftovers(key, output)
        yield from self._leases(key, output)

    def _alive(self, key: str, output: Output) -> float:
        """Return the last sign of life at an address: a lease renewed, an attempt's folder written in."""
        return max(output.renewed, self.needed.busy.get(key, 0.0))

    def _checkpoints(self, key: str, output: Output) -> Iterator[Removal]:
        saved = output.checkpoints
        if not saved.count:
            return
        newest = max(saved.newest, self._alive(key, output))
        path = f"{self.name}/{key}/{CHECKPOINTS}"
        if output.manifest is not None:
            if newest < self.old:
                why = "the training is done, and was killed before it could tidy up"
                yield Removal("checkpoints", self.name, path, why, saved.count, saved.size, newest)
        elif self.terms.checkpoints and self.now - newest > seconds(self.terms.checkpoints):
            why = f"the training has not finished, its last sign of life was {_ago(self.now, newest)}"
            yield Removal("checkpoints", self.name, path, why, saved.count, saved.size, newest)

    def _withdrawn(self, key: str, output: Output) -> Iterator[Removal]:
        assert output.withdrawn is not None
        due = self.now - output.withdrawn > WITHDRAWN_FOR
        if due and key not in self.needed.outputs and not self.needed.unreadable:
            files = sum(output.writers.values(), Group(1, 0, output.withdrawn))
            why = f"withdrawn {_ago(self.now, output.withdrawn)}, and nothing has asked for it since"
            yield Removal("withdrawn", self.name, f"{self.name}/{key}", why, files.count, files.size, files.newest)

    def _leftovers(self, key: str, output: Output) -> Iterator[Removal]:
        if output.manifest is not None and key not in self.needed.writers:
            return  # its manifest was not read, so nobody knows whose files it names
        for writer, group in sorted(output.writers.items()):
            if writer in self.needed.writers.get(key, ()):
                continue
            newest = max(group.newest, self._alive(key, output))
            if newest < self.old:
                why = f"half-written by an attempt whose last sign of life was {_ago(self.now, newest)}"
                path = f"{self.name}/{key}/{writer}"
                yield Removal("leftover", self.name, path, why, group.count, group.size, newest)
        if output.manifest is not None and output.withdrawn is not None and output.withdrawn < self.old:
            path, why = f"{self.name}/{key}/{WITHDRAWN}", "the output has come back since"
            yield Removal("temporary", self.name, path, why, 1, 0, output.withdrawn)

    def _leases(self, key: str, output: Output) -> Iterator[Removal]:
        folder = f"{self.name}/{key}/lease"
        yield from _lower(self.name, folder, output.leases, self.now - DAY)
        bare = output.manifest is None and output.withdrawn is None and not output.writers
        if bare and not output.checkpoints.count and output.leases:
            number, at = max(output.leases.items())
            if self.now - max(at, self._alive(key, output)) > LEASES_FOR:
                why = f"nothing is there, and nobody has written {_ago(self.now, at)}"
                yield Removal("lease", self.name, f"{folder}/{number:06d}.json", why, 1, 0, at)

    def _markers(self) -> Iterator[Removal]:
        for name, (size, at) in sorted(self.project.markers.items()):
            child = name.partition("/")[2].replace(".", "/", 1)
            output = self.project.outputs.get(child, Output())
            # It is written before the manifest: a writer at work needs it.
            gone = output.manifest is None and output.withdrawn is None and not output.writers
            if gone and max(at, self._alive(child, output), output.checkpoints.newest) < self.old:
                path, why = f"{self.name}/dependents/{name}", f"{child} is not there"
                yield Removal("marker", self.name, path, why, 1, size, at)


def _lower(project: str, folder: str, leases: Mapping[int, float], before: float) -> Iterator[Removal]:
    """Return lease files below the highest number, which alone says who may commit."""
    for number, at in sorted(leases.items())[:-1]:
        if at < before:
            path = f"{folder}/{number:06d}.json"
            yield Removal("lease", project, path, f"number {max(leases)} counts", 1, 0, at)


def refusals(
    inventory: Inventory,
    marks: Marks,
    records: Mapping[str, Recorded],
    removals: list[Removal],
    share: float,
) -> list[str]:
    """Return why nothing must be removed, in sentences; none where all looks right."""
    found = []
    for name, project in sorted(inventory.projects.items()):
        mine = [r for r in removals if r.project == name]
        if not any(r.kind in COUNTED for r in mine):
            continue
        record = records.get(name, Recorded())
        known = sum(folder in record.attempts for folder in project.attempts)
        if 2 * known < len(project.attempts):
            of = f"{known:,} of the {len(project.attempts):,} attempts in the store"
            found.append(f"{name}: the ledger knows {of}: is it this store's ledger?")
        there = {"output": project.committed, "attempt": len(project.attempts)}
        for kind in COUNTED:
            goes = sum(r.kind == kind for r in mine)
            if goes > FEW and goes > share * there[kind]:
                found.append(
                    f"{name}: {goes:,} of {there[kind]:,} {kind}s ({goes / there[kind]:.0%}) would go, "
                    f"and one run may remove {share:.0%}"
                )
    return found


def _ago(now: float, at: float) -> str:
    hours = max(now - at, 0.0) / 3600
    return f"{hours / 24:.0f} days ago" if hours >= 48 else f"{hours:.0f} hours ago"
