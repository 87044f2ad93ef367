"""The checkpoints of one training, as the store has them: which are whole, which is the newest, what may go. Light.

    <folder>/<step:012d>-<nonce>.json      a committed checkpoint: put once, when all its files are complete
    <folder>/<step:012d>-<nonce>/<file>    its files; a later checkpoint may refer to some of them

A save that was killed has left files and no document, so nobody sees it; the next prune takes the files away. A
document says size and digest of every file. A checkpoint that is not what its document says is passed over with a
warning, and the one before counts.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from orrery import log
from orrery.errors import OrreryError, TryAgain
from orrery.store import CHUNK, File, Store

DOCUMENT = re.compile(r"^(\d{12}-[0-9a-f]{8})\.json$")
FOLDER = re.compile(r"^\d{12}-[0-9a-f]{8}$")


class Saved(BaseModel):
    """One committed checkpoint. `files` are relative to the checkpoints' folder, those of earlier ones included."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    step: int
    world: int
    kind: str
    name: str
    files: tuple[File, ...]
    shared: dict[str, Any]
    own: tuple[dict[str, Any], ...]


class Checkpoints:
    """The checkpoints below one folder of the store; the newest `keep` stay, and whatever they refer to."""

    def __init__(self, store: Store, folder: str, keep: int = 2) -> None:
        self.store, self.folder, self.keep = store, folder, keep
        self._damaged: set[str] = set()

    def path(self, name: str) -> str:
        """Return the store path of a file that is named relative to this folder."""
        return f"{self.folder}/{name}"

    def new_name(self, step: int) -> str:
        """Return a name that no other save of that step has."""
        return f"{step:012d}-{secrets.token_hex(4)}"

    def newest_step(self) -> int:
        """Return the step of the newest document, 0 without any; its files have not been looked at."""
        return max((int(name[:12]) for name in self._names()), default=0)

    def documents(self) -> Iterator[Saved]:
        """Yield what is committed, newest first. A document that cannot be read is told in a warning."""
        for name in reversed(self._names()):
            try:
                saved = Saved.model_validate(json.loads(self.store.read(self.path(f"{name}.json"))))
                if saved.name != name:
                    raise ValueError(f"it is the document of {saved.name}")
            except FileNotFoundError:  # pruned since, by a twin of this training
                continue
            except (ValueError, ValidationError) as e:
                self.pass_over(name, f"its document cannot be read ({str(e).splitlines()[0]})")
                continue
            yield saved

    def fetch(self, file: File, scratch: Path) -> Path:
        """Return a local path of a file that is what its document says. Raises `Damaged`, or `TryAgain`.

        Its bytes are read once to be sure; from a bucket they are copied into `scratch` first.
        """
        path = self.path(file.path)
        try:
            size = self.store.size(path)
            if size != file.size:
                raise Damaged(f"{file.path} has {size:,} bytes instead of {file.size:,}")
            local = self.store.local(path, scratch)
            found = _sha256(local)
        except FileNotFoundError:
            raise Damaged(f"{file.path} is gone") from None
        except OSError as e:
            raise TryAgain(f"{self.store.uri}/{path}: {e.strerror or e}") from None
        if found != file.sha256:
            if not self.store.is_local:
                local.unlink(missing_ok=True)
            raise Damaged(f"{file.path} has other bytes than were written (sha256 {found[:12]})")
        return local

    def newest_good(self, scratch: Path) -> Saved | None:
        """Return the newest checkpoint whose files are all as they were written, or None."""
        for saved in self.documents():
            try:
                for file in saved.files:
                    self.fetch(file, scratch)
            except Damaged as e:
                self.pass_over(saved.name, e.message)
                continue
            return saved
        return None

    def pass_over(self, name: str, why: str) -> None:
        """Say that a checkpoint is not used, and why. It no longer counts among those kept."""
        self._damaged.add(name)
        log.get().warning(
            f"checkpoint {name} is damaged: {why}; the one before it is taken", folder=f"{self.store.uri}/{self.folder}"
        )

    def commit(self, saved: Saved) -> None:
        """Put the document: from here on the checkpoint counts. Its files must be complete and synced.

        Raises `OrreryError` when a file of an earlier checkpoint that it refers to is gone.
        """
        for file in saved.files:
            if not file.path.startswith(f"{saved.name}/") and not self.store.exists(self.path(file.path)):
                raise OrreryError(f"{file.path}, which checkpoint {saved.name} refers to, is gone")
        data = json.dumps(saved.model_dump(), indent=1).encode()
        if not self.store.put_if_absent(self.path(f"{saved.name}.json"), data):
            raise OrreryError(f"checkpoint {saved.name} is there already")

    def prune(self) -> None:
        """Remove all but the newest good ones, files that none of these refers to, and what a killed save left."""
        good = [saved for saved in self.documents() if saved.name not in self._damaged]
        kept = good[: self.keep]
        if not kept:
            return
        names = {saved.name for saved in kept}
        for name in self._names():
            if name not in names:
                self.store.remove(self.path(f"{name}.json"))
        self._damaged &= names
        needed = {file.path for saved in kept for file in saved.files}
        # A folder as new as the newest checkpoint may be a save under way.
        for folder in (n for n in self.store.names(self.folder) if FOLDER.fullmatch(n) and n[:12] < kept[0].name[:12]):
            files = [f"{folder}/{name}" for name in self.store.names(self.path(folder))]
            if not needed.intersection(files):
                self.store.remove(self.path(folder))
                continue
            for file in files:
                if file not in needed:
                    self.store.remove(self.path(file))

    def discard(self, name: str) -> None:
        """Remove the files of a save that failed; it has no document."""
        self.store.remove(self.path(name))

    def remove_all(self) -> None:
        """Remove everything: the training is over and committed."""
        self.store.remove(self.folder)

    def _names(self) -> list[str]:
        found = (DOCUMENT.fullmatch(name) for name in self.store.names(self.folder))
        return [match[1] for match in found if match]


class Damaged(OrreryError):
    """A file of a checkpoint is not what was written."""


def _sha256(path: Path) -> str:
    h = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(CHUNK):
            h.update(chunk)
    return h.hexdigest()
