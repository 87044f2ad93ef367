"""What may stand in a URI, what may be shown of it, and where a relative one begins."""

from __future__ import annotations

import re
from pathlib import Path

# user:password@, but for a port before an @ of the path.
_LOGIN = re.compile(r"://[^/@:]*:(?!\d{1,5}(?:/|$))(?P<secret>[^@]+)@")
_QUERY = re.compile(r"[?&][\w-]*(?:token|secret|password|passwd|key|sig|signature)=(?P<secret>[^&]+)", re.IGNORECASE)


def has_secret(uri: str, *, references: bool = False) -> bool:
    """Tell whether a URI carries a password: it would be written into configs, logs and the ledger.

    With `references`, `$NAME` stands for a variable that is read later, and is no password.
    """
    found = [match["secret"] for pattern in (_LOGIN, _QUERY) for match in pattern.finditer(uri)]
    return any(not (references and secret.startswith("$")) for secret in found)


def masked(uri: str) -> str:
    """Return a URI as it may be shown: what stands before its @, and its query, may be a secret."""
    shown = re.sub(r"://.*@", "://***@", uri)
    return re.sub(r"\?.*", "?***", shown)


def absolute(uri: str, home: Path) -> str:
    """Return a folder's or an SQLite file's URI with a relative path taken from `home`, wherever it is used."""
    if found := re.match(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:|file:)(.+)", uri):
        return f"{found[1]}{home / found[2]}"
    if "://" in uri and not uri.startswith("file://"):
        return uri
    path = uri.removeprefix("file://")
    return uri if path.startswith(("/", "~")) or not path else f"file://{home / path}"
