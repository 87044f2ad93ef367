"""An embedded engine's folder as one file: a plain tar, in which the holes of its files take no room."""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from orrery.errors import UserError
from orrery.store import CHUNK, trouble

FOLDER = "shard"
# What an archive may hold at most: a hundred times what 100,000 chunks need.
MOST_BYTES, MOST_FILES = 40 << 30, 10_000
ZEROS = bytes(1 << 18)


def pack(folder: Path, target: Path) -> None:
    """Write an index's folder as an archive, its names in order and only what its files hold: most of them are holes.

    GNU's format 1.0 for such files, which `tarfile` reads but does not write: a map of (offset, size) before the data.
    """
    with (
        trouble(str(target)),
        tarfile.TarFile(target, "w", format=tarfile.PAX_FORMAT, copybufsize=CHUNK) as tar,
    ):
        for file in sorted(folder.rglob("*")):
            name = f"{FOLDER}/{file.relative_to(folder).as_posix()}"
            if file.is_dir():
                inner = tarfile.TarInfo(name)
                inner.type, inner.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(inner)
                continue
            with file.open("rb") as f:
                _add(tar, name, f)


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes]) -> None:
    size = os.fstat(file.fileno()).st_size
    parts = list(_held(file.fileno(), size))
    told = "".join(f"{number}\n" for number in (len(parts), *(n for part in parts for n in part))).encode()
    told += bytes(-len(told) % tarfile.BLOCKSIZE)
    member = tarfile.TarInfo(f"{FOLDER}/GNUSparseFile.0/{name.rsplit('/', 1)[-1]}")
    member.size, member.mode = len(told) + sum(length for _, length in parts), 0o644
    real = {"GNU.sparse.name": name, "GNU.sparse.realsize": str(size)}
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", **real}
    tar.addfile(member, _Parts(told, file, parts))  # type: ignore[arg-type]


def _held(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield which parts of a file are no holes: (offset, size). A filesystem that cannot tell names the whole file."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:  # which says that nothing follows but a hole
                raise
            yield size, 0  # so that every tar knows where it ends
            return
        end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        yield start, end - start


class _Parts:
    """Reads a map, and then the parts of a file that it names."""

    def __init__(self, told: bytes, file: IO[bytes], parts: list[tuple[int, int]]) -> None:
        self._buffer, self._source = b"", self._blocks(told, file, parts)

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size and (block := next(self._source, b"")):
            self._buffer += block
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _blocks(self, told: bytes, file: IO[bytes], parts: list[tuple[int, int]]) -> Iterator[bytes]:
        yield told
        for offset, length in parts:
            file.seek(offset)
            for start in range(0, length, CHUNK):
                yield file.read(min(length - start, CHUNK))


def unpack(archive: Path, target: Path) -> None:
    """Write an archive's plain files below `target`, holes as holes. Raises `UserError` for what else it holds."""
    total = 0
    try:
        with trouble(str(target)), tarfile.open(archive, mode="r:") as tar:
            for number, member in enumerate(tar, 1):
                total += member.size
                if total > MOST_BYTES or number > MOST_FILES:
                    raise tarfile.TarError(f"more than {MOST_FILES:,} files or {MOST_BYTES:,} bytes")
                _write(tar, member, target)
    except (tarfile.TarError, EOFError, ValueError) as e:
        raise UserError(f"{archive}: not an index's archive ({e})", hint="run index again") from None


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write one file. By hand: the filters of `extractall` came with Python 3.11.4, and Debian 12 has 3.11.2."""
    parts = Path(member.name).parts
    if Path(member.name).is_absolute() or ".." in parts or parts[0] != FOLDER or not (member.isreg() or member.isdir()):
        raise tarfile.TarError(f"{member.name!r} is not a file of an index")
    file = target.joinpath(*parts)
    if member.isdir():
        file.mkdir(parents=True, exist_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    data = tar.extractfile(member)
    assert data is not None
    with file.open("wb") as f:
        _copy(data, f)
        f.truncate(member.size)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy bytes, and leave out what is zero."""
    while chunk := source.read(len(ZEROS)):
        if chunk == ZEROS[: len(chunk)]:
            target.seek(len(chunk), os.SEEK_CUR)
        else:
            target.write(chunk)
