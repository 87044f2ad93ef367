"""A folder, a bucket or a part of it, or a single file; on this machine without ever leaving that folder."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from orrery.errors import OrreryError, TryAgain, UserError
from orrery.rag.reading import kinds
from orrery.rag.sources import Entry, Listing, NotRead, Raw, Wanted
from orrery.store import storage_options, trouble

LOCAL = ("file", "local")
# What fsspec reaches beside these (http, ftp, archives, chains of them) would be fetched without a look at the address.
BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def listing(uri: str, home: Path, wanted: Wanted, size: int) -> Listing:
    """List what is below `uri`; a relative one is below `home`. Files above `size` bytes are left out.

    Raises `UserError` when it is not there or of an unknown kind, `TryAgain` when the network fails.
    """
    protocol = uri.partition("://")[0] if "://" in uri else "file"
    if "::" in uri or protocol not in (*LOCAL, *BUCKETS):
        raise UserError(
            f"{uri}: documents are not read from {protocol}",
            hint=f"a folder, or {'://, '.join(BUCKETS)}://; web pages by `pages` or `sitemap`",
        )
    if protocol not in LOCAL:
        return _bucket(uri, wanted, size)
    path = uri.removeprefix("file://").removeprefix("local://")
    inside = not path.startswith(("/", "~")) and "://" not in uri
    root = Path(home, path) if inside else Path(path).expanduser()
    if inside and not _is_below(os.path.realpath(root), os.path.realpath(home)):
        raise UserError(f"{uri} leads out of the project folder", hint="an absolute path, for a folder elsewhere")
    # What a reader is shown names no folder of the machine that collected it, and is the same on every machine.
    return _folder(root, uri, _parts(path) if inside else root.name, wanted, size)


def _parts(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


# -- this machine's ------------------------------------------------------------------------------------


def _folder(root: Path, uri: str, prefix: str, wanted: Wanted, size: int) -> Listing:
    found = Listing()
    try:
        mode = root.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{uri} is not there, or empty", hint="correct the source's `uri` in spec.yaml") from None
    except OSError as e:
        raise UserError(f"{uri}: {e.strerror}", hint="correct the source's `uri` in spec.yaml") from None
    real = os.path.realpath(root)
    if stat.S_ISREG(mode):
        _offer(found, real, real, shown(prefix), root.name, size)
        return found
    for path, relative in _walk(real, uri):
        name = shown(f"{prefix}/{relative}" if prefix else relative)
        if not wanted(relative):
            found.other += 1
        else:
            _offer(found, path, real, name, relative, size)
    found.sort()
    return found


def _walk(root: str, uri: str) -> Iterator[tuple[str, str]]:
    """Yield path and relative path of all below a folder but what is hidden; links to folders are not followed."""
    queue = [""]
    while queue:
        folder = queue.pop()
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda e: e.name)
        except FileNotFoundError:
            continue
        except OSError as e:
            # Half a listing would look like documents that are gone.
            raise UserError(f"{uri}: {folder or '.'} cannot be listed: {e.strerror}", hint="its permissions") from None
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                queue.append(relative)
            else:
                yield entry.path, relative


def _offer(found: Listing, path: str, root: str, uri: str, name: str, size: int) -> None:
    """Add a file to the listing, or why it is left out."""
    why = kinds.refused(name)
    try:
        told = Path(path).stat()
        if Path(path).is_symlink() and not _is_below(os.path.realpath(path), root):
            why = "it is a link that leads out of the folder"
        elif stat.S_ISDIR(told.st_mode):
            why = "it is a link to a folder, which is not followed"
        elif not stat.S_ISREG(told.st_mode):
            why = "it is no file"
        elif why is None and told.st_size > size:
            why = _too_large(told.st_size, size)
    except OSError as e:
        why = "it is a link to nowhere" if e.errno in (errno.ENOENT, errno.ELOOP) else why
    if why:
        found.leave(uri, why)
    else:
        found.entries.append(Entry(uri, name, partial(_read, path, root, name, size)))


def _read(path: str, root: str, name: str, size: int) -> Raw:
    real = os.path.realpath(path)
    if not _is_below(real, root):
        raise NotRead("skipped", "it is a link that leads out of the folder")
    try:
        # Not blocking: a pipe that has taken the file's place would be waited for.
        number = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        with open(number, "rb") as file:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise NotRead("skipped", "it is no file")
            data = file.read(size + 1)
    except FileNotFoundError:
        raise NotRead("gone", "it went while the folder was read") from None
    except OSError as e:
        raise NotRead("failed", f"it cannot be read: {e.strerror or e}") from None
    if len(data) > size:
        raise NotRead("skipped", f"it has grown beyond {size:,} bytes")
    return Raw(data, kinds.of_file(name, data))


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def shown(path: str) -> str:
    """Return a path as it can be written and read: what is no character, or would break a line, as %XX."""
    known = os.fsencode(path).decode("utf-8", "surrogateescape")
    return _CONTROL.sub(lambda m: "".join(f"%{b:02X}" for b in m[0].encode("utf-8", "surrogateescape")), known)


# -- buckets ---------------------------------------------------------------------------------------------


def _bucket(uri: str, wanted: Wanted, size: int) -> Listing:
    found = Listing()
    protocol = uri.partition("://")[0]
    with trouble(uri):
        try:
            fs, root = fsspec.core.url_to_fs(uri, **storage_options(uri))
        except (ImportError, ValueError) as e:
            raise UserError(f"{uri} cannot be read: {e}", hint="its library is not in this environment") from None
        fs.invalidate_cache()
        root = root.rstrip("/")
        try:
            objects: dict[str, dict[str, Any]] = fs.find(root, detail=True)
        except FileNotFoundError as e:
            raise UserError(f"{uri}: {e.strerror or e}", hint="correct the source's `uri` in spec.yaml") from None
    for path, told in objects.items():
        relative = path.removeprefix(root).lstrip("/") or path.rsplit("/", 1)[-1]
        name, length = shown(f"{protocol}://{path}"), int(told.get("size") or 0)
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if hidden or path.endswith("/") or not wanted(relative):
            found.other += 1
        elif why := kinds.refused(relative) or (_too_large(length, size) if length > size else None):
            found.leave(name, why)
        else:
            found.entries.append(Entry(name, relative, partial(_read_object, fs, path, relative, length, size)))
    found.sort()
    return found


def _read_object(fs: Any, path: str, name: str, length: int, size: int) -> Raw:
    try:
        with trouble(path):
            # A range of nothing is an error to a bucket.
            data = bytes(fs.cat_file(path, start=0, end=size + 1)) if length else b""
    except FileNotFoundError:
        raise NotRead("gone", "it went while the bucket was read") from None
    except OrreryError as e:
        raise NotRead("failed", f"it cannot be read: {e.message}", away=isinstance(e, TryAgain)) from None
    if len(data) > size:
        raise NotRead("skipped", f"it has grown beyond {size:,} bytes")
    return Raw(data, kinds.of_file(name, data))


def _too_large(length: int, size: int) -> str:
    return f"it has {length:,} bytes; at most {size:,} are read (limits.megabytes)"
