"""What may stand in a URI, what may be shown of it, and where a relative one begins."""

from __future__ import annotations

import re
from pathlib import Path

# user:password@, but for a port before an @ of the path; `$NAME` is a reference, not a password.
_LOGIN = re.compile(r"://[^/@:]*:(?!\d{1,5}(?:/|$))(?!\$)[^@]+@")
_QUERY = re.compile(r"[?&](?:password|passwd|secret|token|sig|x-amz-signature)=(?!\$)[^&]", flags=re.IGNORECASE)


def has_secret(uri: str) -> bool:
    """Tell whether a URI carries a password: it would be written into configs, logs and the ledger."""
    return bool(_LOGIN.search(uri) or _QUERY.search(uri))


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
