"""Who asks: bearer tokens with groups, from a file that holds their digests only (ORRERY_SERVE_TOKENS).

    tokens:
      - {name: wiki, sha256: 5e88…, groups: [ops, support], expires: 2027-06-30}

A token is 256 random bits, so its plain SHA-256 cannot be guessed back, and needs no salt and no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, StringConstraints, field_validator

from orrery import log, yamlfile
from orrery.errors import SpecError, UserError
from orrery.fields import Frozen
from orrery.rag.spec import Group, reader

VARIABLE = "ORRERY_SERVE_TOKENS"
LOOK_EVERY_S = 1.0
TokenName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]


class Token(Frozen):
    """One entry of the file."""

    name: TokenName
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    groups: tuple[Group, ...] = Field((), description="Beside `everyone`, which every token has.")
    expires: date | None = Field(None, description="The last day on which it is good (UTC).")


class TokenFile(Frozen):
    """The whole file."""

    tokens: tuple[Token, ...] = Field((), max_length=10_000)

    @field_validator("tokens")
    @classmethod
    def _apart(cls, value: tuple[Token, ...]) -> tuple[Token, ...]:
        for what in ("name", "sha256"):
            seen: set[str] = set()
            for token in value:
                if (one := getattr(token, what)) in seen:
                    raise ValueError(f"two tokens have the {what} {one[:20]!r}")
                seen.add(one)
        return value


@dataclass(frozen=True)
class Caller:
    """Who asks, and what they may read."""

    name: str
    groups: frozenset[str]


ANONYMOUS = Caller("anonymous", reader(()))


class Tokens:
    """The tokens of a file, read again when it changes. A file that is broken by then leaves those before in force."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self._clock = file, clock
        self.problem: str | None = None
        self._stamp = self._look()
        self._tokens = _read(file).tokens
        self._looked = clock()
        self._warn()

    def __len__(self) -> int:
        return len(self._tokens)

    def caller(self, presented: str) -> Caller | None:
        """Return who holds this token, or None: unknown, expired or malformed, nobody is told which."""
        self._refresh()
        digest = hashlib.sha256(presented.encode("utf-8", "replace")).hexdigest()
        found: Token | None = None
        for token in self._tokens:  # all of them, so that the time says nothing about the place
            if hmac.compare_digest(digest, token.sha256):
                found = token
        if found is None or (found.expires is not None and datetime.now(UTC).date() > found.expires):
            return None
        return Caller(found.name, reader(found.groups))

    def _look(self) -> tuple[int, ...] | None:
        try:
            s = self.file.stat()
        except OSError:
            return None
        return s.st_mtime_ns, s.st_size, s.st_ino, s.st_mode

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tokens, self.problem = _read(self.file).tokens, None
        except UserError:
            # What is wrong may be a line that holds a digest, so it is not repeated.
            self.problem = f"the token file {self.file.name} cannot be read: the tokens before stay in force"
            log.get().error(self.problem)
            return
        log.get().info("the token file has changed", tokens=len(self._tokens))
        self._warn()

    def _warn(self) -> None:
        if self._stamp is not None and stat.S_IMODE(self._stamp[3]) & 0o077:
            log.get().warning(f"{self.file} can be read by others of this machine: chmod 600 it")


def _read(file: Path) -> TokenFile:
    data, lines = yamlfile.read(file)
    return yamlfile.validate(TokenFile, data, lines, file)


def add(file: Path, name: str, groups: list[str], expires: date | None = None) -> str:
    """Make a token, add its digest to the file (made with mode 0600), and return the token: it is nowhere else.

    Raises `SpecError` when the file is broken or a group malformed, `UserError` when the name is taken.
    """
    before = _read(file).tokens if file.exists() else ()
    if name in {t.name for t in before}:
        raise UserError(f"{file} has a token {name!r} already", hint="take its entry out first, or choose another name")
    token = secrets.token_urlsafe(32)
    fields: dict[str, Any] = {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "groups": groups}
    entries = [_plain(t) for t in before] + [fields | ({"expires": expires.isoformat()} if expires else {})]
    yamlfile.validate(TokenFile, {"tokens": entries}, {}, file)
    text = "# Digests of bearer tokens: `python -m orrery.serving token NAME --groups a,b` adds one.\n"
    _write(file, text + yaml.safe_dump({"tokens": entries}, sort_keys=False))
    return token


def _plain(token: Token) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": token.name, "sha256": token.sha256, "groups": list(token.groups)}
    return entry | ({"expires": token.expires.isoformat()} if token.expires else {})


def _write(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(text)
        os.replace(beside, file)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise SpecError(f"{file}: cannot be written ({e.strerror})") from None
