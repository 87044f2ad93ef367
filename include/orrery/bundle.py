"""The project folder as a content-addressed archive in the store: code travels with the run, not with the image."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from orrery.errors import SpecError, UserError
from orrery.store import Store, trouble

MAX_BYTES = 20 << 20
# Documents for people change no result, so they change no digest; caches are nobody's code. Not so below folders that
# are packed wholly: whoever collects documents leaves out what is hidden, and nothing else because of its name.
IGNORED_SUFFIXES = (".md", ".pyc", ".png")
IGNORED_NAMES = ("__pycache__", "tests")
FORKED = 70  # exit code of a fork that is ended; nobody waits for it but the code that made it


@dataclass(frozen=True)
class Bundle:
    """A project folder: its digest and the archive's bytes."""

    digest: str
    data: bytes


def _files(folder: Path, wholly: tuple[str, ...] = ()) -> list[Path]:
    out = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(p.startswith(".") for p in parts):
            continue
        if not any(path.is_relative_to(folder / name) for name in wholly) and (
            path.suffix in IGNORED_SUFFIXES or any(p in IGNORED_NAMES for p in parts)
        ):
            continue
        if path.is_symlink():
            raise SpecError(f"{path}: a project folder may hold no symbolic links", hint="copy the file")
        if path.is_file():
            out.append(path)
    return out


def pack(folder: Path, wholly: tuple[str, ...] = ()) -> Bundle:
    """Pack a project folder. The digest is sha256 over (path, sha256 of the bytes) of every file, sorted.

    `wholly`: folders in it of which all is packed that is not hidden: a knowledge base reads them.
    """
    files = _files(folder, wholly)
    total = sum(f.stat().st_size for f in files)
    if total > MAX_BYTES:
        largest = max(files, key=lambda f: f.stat().st_size)
        raise SpecError(
            f"{folder}: {total:,} bytes; a project may have {MAX_BYTES:,}", hint=f"the largest file is {largest}"
        )
    stamp = tuple((str(f.relative_to(folder)), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    return _cached(folder, stamp)


@lru_cache(maxsize=256)
def _cached(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> Bundle:
    return _pack(folder, [name for name, _, _ in stamp])


def _pack(folder: Path, names: list[str]) -> Bundle:
    h, buffer = hashlib.sha256(), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            with trouble(str(folder / name)):
                data = (folder / name).read_bytes()
            h.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError as e:
                raise SpecError(
                    f"{folder / name}: {e}",
                    hint="below the project's folder a file's name may have 100 characters, its folders 155",
                ) from None
    return Bundle(h.hexdigest(), buffer.getvalue())


def path_of(digest: str) -> str:
    """Where a bundle lies in the store."""
    return f"bundles/{digest}.tar"


def push(store: Store, bundle: Bundle) -> None:
    """Put a bundle into the store; one that is there already stays."""
    if not store.exists(path_of(bundle.digest)):
        store.put_if_absent(path_of(bundle.digest), bundle.data)


def fetch(store: Store, digest: str, target: Path) -> Path:
    """Unpack a bundle into `target`. Raises `UserError` when it is absent or its content has another digest."""
    try:
        data = store.read(path_of(digest))
    except FileNotFoundError:
        raise UserError(
            f"{store.uri}/{path_of(digest)}: the project's bundle is gone", hint="start a new run"
        ) from None
    target.mkdir(parents=True, exist_ok=True)
    try:
        with trouble(str(target)), tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            names = sorted(tar.getnames())
            for member in tar:
                _unpack(tar, member, target)
    except tarfile.TarError as e:
        raise UserError(f"{store.uri}/{path_of(digest)}: not a bundle ({e})") from None
    # No cache: an archive's files all have the same time. All names count, and no more than the digest covers: a forged
    # `__pycache__` would be imported instead of the source beside it.
    packed = [str(f.relative_to(target)) for f in _files(target, (".",))]
    found = _pack(target, packed).digest
    if found != digest or names != sorted(packed):
        raise UserError(
            f"{store.uri}/{path_of(digest)}: its content has digest {found[:12]}, planned was {digest[:12]}",
            hint="the store was changed behind our back: delete that file and start a new run",
        )
    return target


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write one file of an archive below `target`. Raises `tarfile.TarError` for what is none, or would lie elsewhere.

    By hand: the filters of `extractall` came with Python 3.11.4, and Debian 12 has 3.11.2.
    """
    parts = Path(member.name).parts
    data = tar.extractfile(member) if member.isreg() else None
    if data is None or Path(member.name).is_absolute() or ".." in parts:
        raise tarfile.TarError(f"{member.name!r} is not a file of a project")
    file = target.joinpath(*parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.read())


@contextlib.contextmanager
def one_process(what: str) -> Iterator[None]:
    """End a process that was forked below and comes back from there: only the one that went in goes on.

    Two processes in one attempt would write the same files, and the loser's cleanup would remove the winner's.
    What libraries fork (loaders, pools) ends by itself and never comes back through here.
    """
    before = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != before:
            # Not the logger: whoever held its lock at the fork does not exist in this process.
            os.write(2, f"{what} has forked: the forked process ends here, the step goes on in {before}\n".encode())
            os._exit(FORKED)


def load_module(folder: Path, project: str, module: str) -> ModuleType:
    """Import `<folder>/<module>.py` as `orrery_project_<project>.<module>`; siblings import each other relatively."""
    file = folder / f"{module}.py"
    if not file.is_file():
        raise SpecError(f"{file}: there is no such file", hint="a model project has features.py and model.py")
    package = f"orrery_project_{project}"
    if package not in sys.modules or getattr(sys.modules[package], "__path__", None) != [str(folder)]:
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]
        parent = ModuleType(package)
        parent.__path__ = [str(folder)]
        sys.modules[package] = parent
    name = f"{package}.{module}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        with one_process(str(file)):
            spec.loader.exec_module(loaded)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        line = _line_in(e, file)
        raise SpecError(f"{file}{line}: {type(e).__name__}: {e}", hint="it must import in its environment") from e
    return loaded


def _line_in(error: BaseException, file: Path) -> str:
    """Return `:line` of the deepest frame of `error` that is inside `file`."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f":{error.lineno}"
    line, tb = "", error.__traceback__
    while tb is not None:
        if tb.tb_frame.f_code.co_filename == str(file):
            line = f":{tb.tb_lineno}"
        tb = tb.tb_next
    return line
