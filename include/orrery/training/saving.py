"""Saving a training while it goes on, and taking it up again, with as many processes as there are now.

`begin` copies the state into host memory and returns; a thread of every process then writes its part, and rank 0
commits when all parts are in the store. A save that fails is a warning, and the training goes on.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
import weakref
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from orrery.errors import OrreryError
from orrery.store import File
from orrery.training import staging, tensorfiles
from orrery.training.background import TIMEOUT, Background, text
from orrery.training.checkpoints import Checkpoints
from orrery.training.place import Place
from orrery.training.staging import Staging, Stored

BEST = "best"
Versions: TypeAlias = dict[str, tuple[weakref.ref[Stored], int]]  # which tensors, how often changed in place


@dataclass(frozen=True)
class Loaded:
    """What was taken up. `own` is None when the number of processes has changed; `path` is the document's."""

    step: int
    shared: dict[str, Any]
    own: dict[str, Any] | None
    world: int
    path: str


class Saver(Protocol):
    """Saves and loads a training's state. All methods but `committed`, `cost` are called on all ranks alike."""

    def expect(self, tensors: dict[str, Any]) -> None:
        """Learn what will be saved. What is on a GPU needs pinned memory to be copied to, which takes long to get."""
        ...

    def begin(self, step: int, tensors: dict[str, Any], shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Begin to save: waits for a save under way, copies, returns. Then the tensors may change again.

        `tensors` and `shared` have the same keys on all ranks, `own` is this rank's. A tensor that is neither
        DTensor nor Fragment is the same on all ranks.
        """
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is under way, at most `timeout` seconds; tell whether that is so."""
        ...

    def committed(self) -> int:
        """Return the newest committed step that is known here, 0 without any."""
        ...

    def cost(self) -> float:
        """Return what the last save took from the training, in seconds."""
        ...

    def load(self, tensors: dict[str, Any]) -> Loaded | None:
        """Load the newest good checkpoint into `tensors`, in place, or return None when there is none."""
        ...

    def close(self) -> None:
        """Wait for what is under way, and leave the group."""
        ...


@dataclass
class Snapshot:
    """A state as it was at one step, on this process."""

    step: int
    shared: dict[str, Any]
    own: dict[str, Any]
    values: list[tuple[staging.Path, Any]]
    paths: dict[str, staging.Path]  # of all tensors
    live: dict[str, Stored]  # what this process writes: for their shapes only
    staged: dict[str, Tensor]
    signature: str
    best: Versions
    writes_best: bool


class ShardedSaver(Background):
    """Saves what is whole or sharded by torch's distributed checkpoints; they reshard when loading."""

    kind = "sharded"

    def __init__(self, checkpoints: Checkpoints, place: Place, scratch: Path, timeout: timedelta = TIMEOUT) -> None:
        super().__init__(checkpoints, place, scratch, timeout)
        # DCP says what it does at every call, and tells a failure, which is raised too, as a dict of its own.
        logging.getLogger("c10d-NullHandler-dcp_logger").disabled = True
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self._staging = Staging()
        self._best: Versions | None = None  # what the last checkpoint has
        self._entries: dict[str, Any] = {}  # of the best weights in its index (rank 0)
        self._files: list[File] = []  # which hold them (rank 0)

    def expect(self, tensors: dict[str, Any]) -> None:
        """See `Saver.expect`. The memory is got in the thread, and the first save waits for it."""
        mine = self._mine(staging.tensors_and_values(tensors)[0], best=True)
        if any(staging.local(t).is_cuda for t in mine.values()):
            self.start(lambda: self._staging.reserve(mine.items()))

    def begin(self, step: int, tensors: dict[str, Any], shared: dict[str, Any], own: dict[str, Any]) -> None:
        """See `Saver.begin`. `tensors["best"]` is written when its tensors are others, or were changed, since."""
        began = time.monotonic()
        self.wait()
        with torch.no_grad():
            snapshot = self._snapshot(step, tensors, json.loads(json.dumps(shared)), json.loads(json.dumps(own)))
        self.start(lambda: self._save(snapshot))
        self._blocked = time.monotonic() - began

    def _snapshot(self, step: int, tree: dict[str, Any], shared: Any, own: Any) -> Snapshot:
        tensors, values = staging.tensors_and_values(tree)
        best = {path: t for path, t in tensors.items() if path[0] == BEST}
        versions = _versions({staging.name(path): t for path, t in best.items()})
        writes = bool(best) and not _same(self._best, versions)
        live = self._mine(tensors, best=writes)
        self._staging.forget({staging.name(path) for path in tensors})
        return Snapshot(
            step, shared, own, json.loads(json.dumps(list(values.items()))),
            {staging.name(path): path for path in tensors}, live, self._staging.copy(live.items()),
            staging.signature(tensors, values), versions, writes,
        )  # fmt: skip

    def _mine(self, tensors: dict[staging.Path, Stored], *, best: bool) -> dict[str, Stored]:
        """Return, by name, what this process writes: of the best weights too with `best`."""
        rank, world = self.place.rank, self.place.world
        mine = staging.share({path: t for path, t in tensors.items() if path[0] != BEST}, rank, world)
        if best:
            mine += staging.share({path: t for path, t in tensors.items() if path[0] == BEST}, rank, world)
        return {staging.name(path): tensors[path] for path in mine}

    def _save(self, snapshot: Snapshot) -> None:
        """Write, agree, commit (in the thread)."""
        self._best = None  # until it is sure, the next save writes the best weights again
        told = self.together(
            lambda: (
                {"step": snapshot.step, "state": snapshot.signature, "best": snapshot.writes_best},
                snapshot.own,
                self.checkpoints.new_name(snapshot.step),
            )
        )
        heads, name = [head for head, _, _ in told], told[0][2]
        if any(head != heads[0] for head in heads):
            raise OrreryError(f"the processes do not save the same: {heads}")
        try:
            files = self._write(snapshot, name)
        except (Exception, CheckpointException):
            self.discard(name)
            raise
        self.commit(snapshot.step, name, files, snapshot.shared, [own for _, own, _ in told])
        self._best = snapshot.best

    def _write(self, snapshot: Snapshot, name: str) -> list[list[File]]:
        index = {
            "version": 1,
            "values": snapshot.values,
            "tensors": {
                key: {"path": path} for key, path in snapshot.paths.items() if path[0] != BEST or snapshot.writes_best
            },
        }
        refers = bool(not snapshot.writes_best and snapshot.best)
        if refers:
            index["tensors"] |= self._entries  # type: ignore[operator]
        writer = tensorfiles.Writer(self.checkpoints, name, self.place.rank, self.scratch / "write", index)
        dcp.save(
            snapshot.live, storage_writer=writer, planner=tensorfiles.StagedPlanner(snapshot.staged),
            process_group=self.group, no_dist=self.group is None,
        )  # fmt: skip
        files: list[list[File]] = self.together(lambda: writer.files)
        if refers:
            files.append(self._files)
        else:
            self._remember(index, [file for ranks in files for file in ranks])
        return files

    def _remember(self, index: dict[str, Any], files: list[File]) -> None:
        """Keep which entries and files hold the best weights (rank 0 has the whole index)."""
        self._entries = {key: entry for key, entry in index["tensors"].items() if entry["path"][0] == BEST}
        used = {chunk["file"] for entry in self._entries.values() for chunk in entry.get("chunks", ())}
        self._files = [file for file in files if file.path in used]

    def load(self, tensors: dict[str, Any]) -> Loaded | None:
        """See `Saver.load`. Tensors that `tensors` lacks are put into it, whole, on the CPU; best weights that the
        checkpoint lacks are taken out. Raises `OrreryError` when it holds another model.
        """
        found = self.newest()
        if found is None:
            return None
        saved, paths = found
        if saved.kind != self.kind:
            raise OrreryError(f"checkpoint {saved.name} is of kind {saved.kind!r}; this training saves {self.kind!r}")

        def locate(name: str) -> Path:
            return self.locate(saved, paths, name)

        index: dict[str, Any] = {}
        flat: dict[str, Stored] = {}

        def prepare() -> None:
            index.update(json.loads(locate(f"{saved.name}/{tensorfiles.INDEX}").read_text()))
            flat.update(_targets(tensors, index, saved.name))
            _refuse_others(flat, index, saved.name)

        self.together(prepare)
        with torch.no_grad():
            try:
                dcp.load(
                    flat, storage_reader=tensorfiles.Reader(index, locate), process_group=self.group,
                    no_dist=self.group is None,
                    planner=tensorfiles.InPlacePlanner(),
                )  # fmt: skip
            except CheckpointException as e:
                raise OrreryError(f"checkpoint {saved.name} cannot be read: {text(e)}") from None
        for path, value in index["values"]:
            staging.put(tensors, staging.from_json(path), value)
        self._remember(index, list(saved.files))
        self._best = _versions({key: t for key, t in flat.items() if key.startswith(f"{BEST}/")})
        self._committed = saved.step
        own = saved.own[self.place.rank] if saved.world == self.place.world else None
        self.first(self.clear)
        return Loaded(saved.step, saved.shared, own, saved.world, self.checkpoints.path(f"{saved.name}.json"))


def _targets(tree: dict[str, Any], index: dict[str, Any], name: str) -> dict[str, Stored]:
    """Return what is to be filled, by name; makes what the tree lacks, and takes out best weights that are not there.

    Raises `OrreryError` for a tensor that the checkpoint lacks.
    """
    stored = index["tensors"]
    if not any(key.startswith(f"{BEST}/") for key in stored):
        tree.pop(BEST, None)
    present = {staging.name(path): t for path, t in staging.tensors_and_values(tree)[0].items()}
    if missing := sorted(set(present) - set(stored)):
        raise OrreryError(f"checkpoint {name} has no {', '.join(missing[:5])}: it is of another model")
    for key in [key for key in stored if key not in present]:
        entry = stored[key]
        present[key] = torch.empty(entry["shape"], dtype=tensorfiles.TYPES[entry["dtype"]])
        staging.put(tree, staging.from_json(entry["path"]), present[key])
    return present


def _refuse_others(flat: dict[str, Stored], index: dict[str, Any], name: str) -> None:
    for key, tensor in flat.items():
        entry = index["tensors"][key]
        there, here = (entry["dtype"], entry["shape"]), (tensorfiles.DTYPES.get(tensor.dtype), list(tensor.shape))
        if there != here:
            raise OrreryError(
                f"checkpoint {name} has {key} as {there[0]} {there[1]}; the model has {here[0]} {here[1]}"
            )


def _versions(tensors: dict[str, Stored]) -> Versions:
    return {key: (weakref.ref(t), staging.local(t)._version) for key, t in tensors.items()}


def _same(before: Versions | None, now: Versions) -> bool:
    if before is None or before.keys() != now.keys():
        return False
    return all(before[key][0]() is ref() and before[key][1] == version for key, (ref, version) in now.items())
