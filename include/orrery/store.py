"""Artifacts by URI, on anything fsspec knows that can put a file only when it is not there (file://, s3://).

    bundles/<digest>.tar                                 project folders, content-addressed
    <project>/<verb>/<address>/manifest.json             the commit: put once, never changed
    <project>/<verb>/<address>/<attempt>/...             one attempt's files (it may not have committed)
    <project>/<verb>/<address>/lease/<n>.json            who is writing; the highest n may commit
    <project>/datasets/<dataset>/<key>/<n>.json          which manifest is partition <key>; the highest n counts
    <project>/dependents/<address>/<verb>.<address>      what was made from a manifest
    <project>/runs/<run>/<task>/<attempt>/...            config, result and evidence of every attempt

Nothing is ever overwritten except an attempt's own lease and result, so readers need no locks.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orrery.errors import OrreryError, RequestError, TryAgain, UserError

# Only the twin sets it: while that file is there, the store does not answer (`faults`, kind `store`).
OUTAGE = "ORRERY_STORE_OUTAGE"
SEGMENT = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.=+,-]{0,200}$", flags=re.ASCII)
CHUNK = 1 << 20


class Ref(BaseModel):
    """A committed input: where its manifest is, and the digest of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    digest: str
    key: str = ""


class File(BaseModel):
    """One file of a manifest; `path` is relative to the manifest's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """One committed output. `digest` covers names and bytes of the files, and nothing of when or where."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = 1
    project: str
    verb: str
    key: str
    address: str
    digest: str
    files: dict[str, File]
    inputs: dict[str, tuple[Ref, ...]] = Field(default_factory=dict)
    fingerprint: dict[str, str] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)
    result: dict[str, Any] = Field(default_factory=dict)
    run: str = ""
    attempt: str = ""
    created: str = ""

    @property
    def path(self) -> str:
        """Where this manifest lies in the store."""
        return f"{self.project}/{self.verb}/{self.address}/manifest.json"

    @property
    def ref(self) -> Ref:
        """How another step names this output."""
        return Ref(path=self.path, digest=self.digest, key=self.key)

    def uri(self, name: str) -> str:
        """Return the store path of one of its files. Raises `RequestError` when it has no such file."""
        if name not in self.files:
            raise RequestError(f"{self.path} has no file {name!r}; it has {', '.join(sorted(self.files))}")
        return f"{self.project}/{self.verb}/{self.address}/{self.files[name].path}"


class Pointer(BaseModel):
    """Which manifest is one partition of a dataset, since when, and which one it superseded."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    number: int
    manifest: str
    digest: str
    supersedes: str | None = None
    created: str = ""


def content_digest(files: dict[str, File]) -> str:
    """Return the digest of a set of files: sha256 over (name, sha256 of the bytes), sorted by name."""
    text = "".join(f"{name}\0{files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """A folder or a bucket. Paths are relative, made of plain segments, and never leave the root."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        try:
            self.fs, root = fsspec.core.url_to_fs(self.uri, **storage_options(self.uri))
        except (ImportError, ValueError) as e:
            raise UserError(
                f"store {self.uri!r} cannot be used: {e}", hint="a folder (file://…) or s3://bucket/…"
            ) from None
        self.root = root.rstrip("/")
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.is_local = bool(protocols & {"file", "local"})
        if not self.is_local and "s3" not in protocols:
            raise UserError(
                f"store {self.uri!r}: {min(protocols)} cannot put a file only when it is not there",
                hint="a folder (file://…) or s3://bucket/…",
            )

    # -- plain files ---------------------------------------------------------------------------

    def full(self, path: str) -> str:
        """Return the filesystem's own path. Raises `RequestError` for a path that could leave the root."""
        parts = path.split("/")
        if not all(SEGMENT.fullmatch(p) for p in parts):
            raise RequestError(f"{path!r} is not a path of the store")
        return f"{self.root}/{path}"

    def read(self, path: str) -> bytes:
        """Return a file's bytes. Raises `FileNotFoundError`, or `TryAgain` when the store is out of reach."""
        with self._trouble(path):
            return bytes(self.fs.cat_file(self.full(path)))

    def exists(self, path: str) -> bool:
        """Tell whether a file is there."""
        with self._trouble(path):
            try:
                self.fs.info(self.full(path))
            except FileNotFoundError:
                return False
            return True

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        with self._trouble(path):
            return int(self.fs.info(self.full(path))["size"])

    def names(self, folder: str) -> list[str]:
        """Return the names directly below a folder, sorted; none when it is not there."""
        with self._trouble(folder):
            try:
                self.fs.invalidate_cache(self.full(folder))
                found = self.fs.ls(self.full(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        own = self.full(folder)
        names = (p.rstrip("/").rsplit("/", 1)[-1] for p in found if p.rstrip("/") != own)
        return sorted(n for n in names if not n.startswith("."))

    def put(self, path: str, data: bytes) -> None:
        """Write a file whole, over what was there. A reader sees the old or the new, never a part."""
        full = self.full(path)
        with self._trouble(path), self._home(path):
            if self.is_local:
                temporary = self._write_beside(full, data)
                os.replace(temporary, full)
            else:
                self.fs.pipe_file(full, data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file only when none is there; return whether this call wrote it.

        Local: a hard link of a synced file, which fails when the name exists. S3: `If-None-Match: *`.
        """
        full = self.full(path)
        with self._trouble(path), self._home(path):
            if self.is_local:
                temporary = self._write_beside(full, data)
                try:
                    os.link(temporary, full)
                except FileExistsError:
                    return False
                finally:
                    os.unlink(temporary)
                _sync_folder(Path(full).parent)
                return True
            try:
                self.fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                return False
            except OSError as e:
                if "PreconditionFailed" in str(e) or "pre-conditions" in str(e):
                    return False
                # Two writers at the same moment: S3 may have refused both, so look who is there.
                if "ConditionalRequestConflict" in str(e) and self.exists(path):
                    return False
                raise
            return True

    def open(self, path: str) -> IO[bytes]:
        """Open a file for reading (seekable)."""
        with self._trouble(path):
            return self.fs.open(self.full(path), "rb")  # type: ignore[no-any-return]

    def local(self, path: str, scratch: Path) -> Path:
        """Return a local path with the file's bytes: the file itself when the store is a folder, else a copy."""
        full = self.full(path)
        if self.is_local:
            with self._trouble(path):
                if not os.path.exists(full):
                    raise FileNotFoundError(full)
            return Path(full)
        target = scratch / hashlib.sha256(path.encode()).hexdigest()[:16] / path.rsplit("/", 1)[-1]
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            with self._trouble(path):
                self.fs.get_file(full, str(part))
            os.replace(part, target)
        return target

    def upload(self, source: Path, path: str) -> File:
        """Put a local file at `path` and return its size and digest. For a file of an attempt, seen by nobody yet."""
        h = hashlib.sha256()
        with source.open("rb") as f:
            while chunk := f.read(CHUNK):
                h.update(chunk)
        full = self.full(path)
        with self._trouble(path), self._home(path):
            if self.is_local:
                if os.path.abspath(full) != os.path.abspath(source):
                    os.makedirs(os.path.dirname(full), exist_ok=True)
                    try:
                        shutil.copyfile(source, full)
                    except OSError:
                        with contextlib.suppress(OSError):
                            os.unlink(full)
                        raise
                with open(full, "rb") as f:
                    os.fsync(f.fileno())
                _sync_folder(Path(full).parent)
            else:
                self.fs.put_file(str(source), full)
        return File(path=path, size=source.stat().st_size, sha256=h.hexdigest())

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it; none is fine. Never for what others may read."""
        full = self.full(path)
        with self._trouble(path), contextlib.suppress(FileNotFoundError):
            if self.is_local and not Path(full).is_dir():
                os.unlink(full)
            elif self.is_local:
                shutil.rmtree(full)
            else:
                self.fs.invalidate_cache()
                self.fs.rm(full, recursive=True)

    def _write_beside(self, full: str, data: bytes) -> str:
        os.makedirs(os.path.dirname(full), exist_ok=True)
        temporary = f"{os.path.dirname(full)}/.{os.path.basename(full)[:150]}.{secrets.token_hex(6)}"
        try:
            with open(temporary, "xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        return temporary

    @contextlib.contextmanager
    def _trouble(self, path: str) -> Iterator[None]:
        if (outage := os.environ.get(OUTAGE)) and os.path.exists(outage):
            raise TryAgain(f"{self.uri}/{path}: the store does not answer", hint="this outage is a rehearsal")
        with trouble(f"{self.uri}/{path}"):
            yield

    @contextlib.contextmanager
    def _home(self, path: str) -> Iterator[None]:
        """A bucket that is not there is found out when something is put into it."""
        try:
            yield
        except FileNotFoundError as e:
            if self.is_local:
                raise
            raise UserError(f"{self.uri}/{path}: {e.strerror or e}", hint="make the bucket first") from None

    # -- manifests and pointers ----------------------------------------------------------------

    def manifest(self, path: str) -> Manifest | None:
        """Return the manifest at `path`, or None when nothing is committed there."""
        try:
            data = self.read(path)
        except FileNotFoundError:
            return None
        try:
            return Manifest.model_validate_json(data)
        except ValidationError:
            raise UserError(
                f"{self.uri}/{path} is not a manifest", hint="it was damaged or edited: delete its folder, run again"
            ) from None

    def need(self, ref: Ref) -> Manifest:
        """Return the manifest of an input. Raises `UserError` when it is gone or not what was recorded."""
        found = self.manifest(ref.path)
        if found is None:
            raise UserError(f"input {self.uri}/{ref.path} is gone", hint="run the step that makes it again")
        if found.digest != ref.digest:
            raise UserError(f"input {ref.path} has digest {found.digest[:12]}, expected {ref.digest[:12]}")
        return found

    def missing_files(self, manifest: Manifest) -> list[str]:
        """Return what is wrong with a committed output's files (absent, or of another size)."""
        problems = []
        for name in sorted(manifest.files):
            try:
                size = self.size(manifest.uri(name))
            except FileNotFoundError:
                problems.append(f"{name} is gone")
                continue
            if size != manifest.files[name].size:
                problems.append(f"{name} has {size:,} bytes instead of {manifest.files[name].size:,}")
        return problems

    def pointers(self, project: str, dataset: str, key: str) -> list[Pointer]:
        """Return every version of one partition, oldest first."""
        folder = f"{project}/datasets/{dataset}/{key}"
        names = [n for n in self.names(folder) if re.fullmatch(r"\d{6}\.json", n)]
        return [self._pointer(f"{folder}/{n}") for n in names]

    def latest(self, project: str, dataset: str, key: str) -> Pointer | None:
        """Return the version of one partition that counts, or None."""
        folder = f"{project}/datasets/{dataset}/{key}"
        names = [n for n in self.names(folder) if re.fullmatch(r"\d{6}\.json", n)]
        return self._pointer(f"{folder}/{names[-1]}") if names else None

    def _pointer(self, path: str) -> Pointer:
        try:
            return Pointer.model_validate_json(self.read(path))
        except ValidationError:
            raise UserError(
                f"{self.uri}/{path} does not name a manifest",
                hint="it was damaged or edited: delete it, and run the step that publishes this partition again",
            ) from None

    def latest_manifest(self, project: str, dataset: str, key: str) -> Manifest | None:
        """Return the manifest that is one partition now, or None."""
        pointer = self.latest(project, dataset, key)
        return self.manifest(pointer.manifest) if pointer else None

    def keys(self, project: str, dataset: str) -> list[str]:
        """Return the partitions of a dataset, sorted."""
        return self.names(f"{project}/datasets/{dataset}")

    def publish(
        self,
        project: str,
        dataset: str,
        key: str,
        manifest: Manifest,
        created: str,
        fence: Callable[[], None] = lambda: None,
    ) -> Pointer | None:
        """Make `manifest` the partition `key`; return what it superseded. Twice is the same as once.

        `fence` raises when the caller has been replaced. It is asked after the look at what is there: whoever
        publishes in between takes the next number, and the caller is asked again.
        """
        while True:
            now = self.latest(project, dataset, key)
            fence()
            if now is not None and now.manifest == manifest.path:
                before = now.supersedes
                return next((p for p in self.pointers(project, dataset, key) if p.manifest == before), None)
            new = Pointer(
                number=(now.number if now else 0) + 1,
                manifest=manifest.path,
                digest=manifest.digest,
                supersedes=now.manifest if now else None,
                created=created,
            )
            path = f"{project}/datasets/{dataset}/{key}/{new.number:06d}.json"
            if self.put_if_absent(path, new.model_dump_json(indent=1).encode()):
                return now

    def dependents(self, manifest: Manifest) -> list[Manifest]:
        """Return every committed output made, directly or not, from `manifest`."""
        found: dict[str, Manifest] = {}
        queue = [manifest]
        while queue:
            here = queue.pop()
            for name in self.names(f"{here.project}/dependents/{here.address}"):
                verb, _, address = name.partition(".")
                path = f"{here.project}/{verb}/{address}/manifest.json"
                if path not in found and (child := self.manifest(path)) is not None:
                    found[path] = child
                    queue.append(child)
        return [found[p] for p in sorted(found)]

    def read_json(self, path: str) -> Any:
        """Return a JSON document of the store."""
        return json.loads(self.read(path))


@contextlib.contextmanager
def trouble(where: str) -> Iterator[None]:
    """Turn what a filesystem says into what a person can act on, with the right exit code."""
    try:
        yield
    except (FileNotFoundError, OrreryError):
        raise
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as e:
        raise UserError(f"{where}: {e.strerror or e}", hint="check that the folder exists and may be written") from None
    except OSError as e:
        if e.errno == errno.EROFS:
            raise UserError(f"{where}: the file system is read-only") from None
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TryAgain(f"{where}: no space left", hint="free some space, and it can run again") from None
        raise TryAgain(f"{where}: {e.strerror or e}") from None
    except Exception as e:  # botocore and aiohttp raise trees of their own, which must not be imported here
        module = type(e).__module__.split(".")[0]
        if module == "botocore" and "Credentials" in type(e).__name__:
            raise UserError(f"{where}: {e}", hint="give the store's credentials in the environment") from None
        if module in ("botocore", "aiobotocore", "aiohttp", "asyncio"):
            raise TryAgain(f"{where}: {type(e).__name__}: {e}") from None
        raise


def storage_options(uri: str) -> dict[str, Any]:
    """Return fsspec's options for a URI. An S3 endpoint comes from AWS_ENDPOINT_URL, as for every AWS tool."""
    if not uri.startswith("s3://"):
        return {}
    options: dict[str, Any] = {"use_listings_cache": False}
    if os.environ.get("AWS_ENDPOINT_URL"):
        options["client_kwargs"] = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    return options


def _sync_folder(folder: Path) -> None:
    """Make a new name durable (POSIX: the directory entry has a sync of its own)."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
