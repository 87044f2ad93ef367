"""What all savers share: one save at a time in a thread, agreement between the processes, the commit, the cost.

What the threads tell each other goes over a gloo group of their own, so it never mixes with the training's
collectives; it has a time limit, and a dead process ends it at once. A save that fails is a warning.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from orrery import errors, log
from orrery.errors import OrreryError
from orrery.store import File
from orrery.training.checkpoints import Checkpoints, Damaged, Saved
from orrery.training.place import Place

TIMEOUT = timedelta(minutes=10)  # for the slowest process to write or to read its part


class Background:
    """One save at a time, and what it takes to agree on it. The methods are those of `saving.Saver`."""

    kind = ""

    def __init__(self, checkpoints: Checkpoints, place: Place, scratch: Path, timeout: timedelta = TIMEOUT) -> None:
        self.checkpoints, self.place, self.scratch = checkpoints, place, scratch
        self.group = dist.new_group(backend="gloo", timeout=timeout) if place.world > 1 else None
        self._thread: threading.Thread | None = None
        self._committed, self._blocked, self._cpu = 0, 0.0, 0.0
        # Whether a thread beside the training's has a core of its own.
        self._spare = len(os.sched_getaffinity(0)) > place.beside if hasattr(os, "sched_getaffinity") else True

    def wait(self, timeout: float | None = None) -> bool:
        """See `Saver.wait`."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def committed(self) -> int:
        """See `Saver.committed`."""
        return self._committed

    def cost(self) -> float:
        """See `Saver.cost`: the time in `begin`, and where every core computes, what the thread used of them."""
        return self._blocked + (0.0 if self._spare else self._cpu)

    def close(self) -> None:
        """See `Saver.close`."""
        self.wait()
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def start(self, save: Callable[[], None]) -> None:
        """Run `save` in a thread; whatever it raises becomes a warning."""

        def run() -> None:
            began = time.thread_time()
            try:
                save()
            except (Exception, CheckpointException) as e:  # the latter is no Exception
                self.failed(e)
            self._cpu = time.thread_time() - began

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def failed(self, error: BaseException) -> None:
        """Tell what became of a save; the training goes on."""
        if self.place.rank == 0:
            log.get().warning(f"a checkpoint was not saved, the training goes on: {text(error)}")

    def together(self, act: Callable[[], Any]) -> list[Any]:
        """Return what `act` returned on each rank. What it raises on one of them is raised on all."""
        try:
            mine: tuple[Any, tuple[str, str, str] | None] = (act(), None)
        except (Exception, CheckpointException) as e:
            mine = (None, (type(e).__name__, text(e), getattr(e, "hint", "")))
        told = [mine]
        if self.group is not None:
            told = [mine] * self.place.world
            dist.all_gather_object(told, mine, group=self.group)
        for _, error in told:
            if error is not None:
                kind = getattr(errors, error[0], OrreryError)
                raise (kind if issubclass(kind, OrreryError) else OrreryError)(error[1], hint=error[2])
        return [value for value, _ in told]

    def first(self, act: Callable[[], Any]) -> Any:
        """Return on all ranks what `act` returned on rank 0."""
        return self.together(lambda: act() if self.place.rank == 0 else None)[0]

    def commit(self, step: int, name: str, files: list[list[File]], shared: Any, own: list[dict[str, Any]]) -> None:
        """Commit what all ranks have written, on rank 0; then remove what is not needed any more."""
        saved = Saved(
            step=step, world=self.place.world, kind=self.kind, name=name, shared=shared, own=tuple(own),
            files=tuple(sorted((f for ranks in files for f in ranks), key=lambda f: f.path)),
        )  # fmt: skip
        # Where this fails nobody may know whether the document is there, so the files stay for a prune to find.
        self.first(lambda: self.checkpoints.commit(saved))
        self._committed = step
        if self.place.rank == 0:
            try:
                self.checkpoints.prune()
            except (OrreryError, OSError) as e:
                log.get().warning(f"older checkpoints were not removed: {text(e)}")

    def newest(self) -> tuple[Saved, dict[str, Path]] | None:
        """Return the newest checkpoint that all ranks have found whole, and where its files are on this machine."""
        documents = self.checkpoints.documents()
        while True:
            found = self.first(lambda: next(documents, None))
            if found is None:
                return None
            saved: Saved = found
            checked = self.together(lambda: self._check(saved))  # noqa: B023
            if problem := next((problem for problem, _ in checked if problem), None):
                if self.place.rank == 0:
                    self.checkpoints.pass_over(saved.name, problem)
                continue
            return saved, {name: path for _, paths in checked for name, path in paths.items()}

    def _check(self, saved: Saved) -> tuple[str, dict[str, Path]]:
        """Read this rank's share of the files; return what is wrong with one, and where they are."""
        paths = {}
        for file in saved.files[self.place.rank :: self.place.world]:
            try:
                paths[file.path] = self.checkpoints.fetch(file, self.scratch / "read")
            except Damaged as e:
                return e.message, {}
        return "", paths

    def locate(self, saved: Saved, paths: dict[str, Path], name: str) -> Path:
        """Return where a checked file is; on another machine than the one that checked it, it is read there too."""
        if paths[name].exists():
            return paths[name]
        file = next(file for file in saved.files if file.path == name)
        return self.checkpoints.fetch(file, self.scratch / f"read-{self.place.rank}")

    def discard(self, name: str) -> None:
        """Remove the files of a save that failed; rank 0 does it for all."""
        if self.place.rank != 0:
            return
        try:
            self.checkpoints.discard(name)
        except (OrreryError, OSError) as e:
            log.get().warning(f"the files of a failed checkpoint were not removed: {text(e)}")

    def clear(self) -> None:
        """Remove what was copied out of a bucket."""
        if not self.checkpoints.store.is_local:
            for path in (self.scratch / "read").glob("*/*"):
                path.unlink(missing_ok=True)


def text(error: BaseException) -> str:
    """Return an error in one line; of a distributed one, the first rank's own."""
    if isinstance(error, CheckpointException):
        rank, (error, _) = min(error.failures.items())
        return f"rank {rank}: {text(error)}"
    said = (getattr(error, "message", "") or str(error) or type(error).__name__).splitlines()[0][:500]
    return said if isinstance(error, OrreryError) else f"{type(error).__name__}: {said}"
