"""What the databases of users and of the platform have in common: the driver, what they refuse, what may be shown."""

from __future__ import annotations

import re
from urllib.parse import quote, quote_plus

import sqlalchemy as sa

# What a database says when it is there and refuses us: no later attempt of the same would do better.
REFUSED = re.compile(
    r"authentication failed|no password supplied|access denied|permission denied|does not exist|unknown database"
    r"|not a database|malformed|readonly|read-only|unable to open database file|no such|NOAUTH|WRONGPASS",
    flags=re.IGNORECASE,
)


def with_driver(url: str) -> str:
    """Return a database's URL with the PostgreSQL driver that every environment has; alone it means psycopg2."""
    return re.sub(r"^(postgres|postgresql)://", "postgresql+psycopg://", url)


def scrub(text: str, url: sa.URL) -> str:
    """Return what a driver says without the password, on one line of at most 400 characters."""
    password = str(url.password or "")
    for form in {password, quote(password, safe=""), quote_plus(password), url.render_as_string(False)} - {""}:
        text = text.replace(form, "***")
    return " ".join(text.split())[:400]
