"""Which partitions have landed at a project's sources: names, sizes and times, never what is in a file.

Runs where Airflow waits (its triggerer), so it is light: fsspec, and credentials from the environment as the
ingest step has them. Tables are not watched: a database does not say that a partition is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import fsspec

from orrery import platform
from orrery.errors import RequestError, UserError
from orrery.partitions import PATTERNS, Grain, parse
from orrery.spec import ModelSpec
from orrery.store import storage_options, trouble
from orrery.uri import absolute, masked

PLACE = "{partition}"
# How filesystems call what changes when a file is written again: the content's mark, and the time.
MARKS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "checksum", "generation")
TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


@dataclass(frozen=True)
class Landed:
    """One partition that is there: what tells it from an earlier landing, and when its last file was written."""

    fingerprint: str
    at: str


@dataclass(frozen=True)
class Look:
    """What one look saw. `landed` is in the order of its keys."""

    landed: dict[str, Landed]
    incomplete: int  # partitions that lack a source as yet
    ignored: int  # names that are no partition of the project
    absent: tuple[str, ...]  # sources whose folder is not there


def sources(spec: ModelSpec) -> dict[str, str]:
    """Return the URIs to watch, by source: those of files by partition, with {partition} in them."""
    values = {"root": str(platform.home()), "data": platform.load().data}
    return {
        name: absolute(platform.substitute(source.uri, values, f"sources.{name}.uri"), platform.home())
        for name, source in spec.sources.items()
        if source.uri is not None and source.partition != "none"
    }


def look(uris: Mapping[str, str], grain: Grain, last: str | None = None) -> Look:
    """Return what has landed: the partitions up to `last` for which every source has a file that is not empty.

    Raises `UserError` (64) without permission or for an unknown protocol, `TryAgain` (75) when the network fails.
    """
    files: dict[str, dict[str, tuple[str, str]]] = {}
    ignored, absent = 0, []
    for name, uri in uris.items():
        files[name] = {}
        with trouble(masked(uri)):
            try:
                for key, info in _entries(uri, grain):
                    if key is None or not _is_key(key, grain, last):
                        ignored += 1
                    elif (info.get("size") or 0) > 0:
                        files[name][key] = _marks(info)
            except FileNotFoundError:
                absent.append(name)
    keys: set[str] = set().union(*files.values())
    landed = {}
    for key in sorted(keys):
        seen = {name: there[key] for name, there in files.items() if key in there}
        if len(seen) == len(uris):
            marks = json.dumps({name: mark for name, (mark, _) in seen.items()}, sort_keys=True)
            digest = hashlib.sha256(marks.encode()).hexdigest()[:12]
            landed[key] = Landed(digest, max(at for _, at in seen.values()))
    return Look(landed, len(keys) - len(landed), ignored, tuple(absent))


def _entries(uri: str, grain: Grain) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """Yield the files at a URI with their keys; None for what lies there and is no partition."""
    try:
        fs, path = fsspec.core.url_to_fs(uri, **storage_options(uri))
    except (ImportError, ValueError) as e:
        raise UserError(f"{masked(uri)} cannot be watched: {e}", hint="file://…, s3://… or a plain path") from None
    fs.invalidate_cache()
    segments = path.split("/")
    at = next(i for i, segment in enumerate(segments) if PLACE in segment)
    folder, name, rest = "/".join(segments[:at]) or "/", segments[at], segments[at + 1 :]
    if isinstance(fs, fsspec.implementations.local.LocalFileSystem):
        # To list names is cheap and to ask for each is not: only those that may be a partition are asked for.
        regex = _regex(name, grain)
        for full in fs.ls(folder, detail=False):
            match = regex.fullmatch(str(full).rsplit("/", 1)[-1])
            if match is None:
                yield None, {}
                continue
            key = match["key"]
            try:
                info = fs.info(path.replace(PLACE, key))
            except (FileNotFoundError, NotADirectoryError):
                continue  # gone since, or its folder holds nothing yet
            yield (key if info["type"] == "file" else None), info
        return
    found = list(fs.find(folder, detail=True).values()) if rest else fs.ls(folder, detail=True)
    if rest and not found:
        raise FileNotFoundError(folder)
    regex = _regex(path, grain)
    for info in found:
        match = regex.fullmatch(str(info["name"])) if info["type"] == "file" else None
        unmarked = match is not None and not any(info.get(field) for field in (*MARKS, *TIMES))
        yield (match["key"] if match else None), (fs.info(info["name"]) if unmarked else info)


def _regex(pattern: str, grain: Grain) -> re.Pattern[str]:
    """Return what matches exactly `pattern` with one key in all of its places."""
    first, *others = (re.escape(part) for part in pattern.split(PLACE))
    return re.compile(f"{first}(?P<key>{PATTERNS[grain]}){'(?P=key)'.join(others)}", flags=re.ASCII)


def _is_key(key: str, grain: Grain, last: str | None) -> bool:
    """Tell a key of the calendar (no month 13), not after the project's end."""
    try:
        parse(key, grain)
    except RequestError:
        return False
    return last is None or key <= last


def _marks(info: Mapping[str, Any]) -> tuple[str, str]:
    """Return what changes when the file is written again, and when it was written (UTC; empty: not told)."""
    time = next((info[field] for field in TIMES if info.get(field)), "")
    if isinstance(time, float | int):
        shown = datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")
    else:
        shown = time.isoformat(timespec="seconds") if isinstance(time, datetime) else str(time)[:40]
    return json.dumps([info["size"], str(time), *(str(info.get(field, "")) for field in MARKS)]), shown
