"""`airflow_settings.yaml`: connections, pools and variables, loaded into Airflow at start-up.

The format is the Astro CLI's. Nothing secret may stand in the file: a value refers to a variable as
`${NAME}`, and a password may be nothing else. What is in the file overwrites what Airflow has;
what is not in the file stays as it is.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from orrery import yamlfile
from orrery.airflow_api import AirflowApi
from orrery.errors import SpecError

FILE = "airflow_settings.yaml"
REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
SECRET = re.compile(r"passw|secret|token|credential|private|(api|access|account)_?key", re.IGNORECASE)

Key = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$", max_length=200)]
Text = Annotated[str, StringConstraints(max_length=5000)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Connection(_Entry):
    """One Airflow connection."""

    conn_id: Key
    conn_type: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    conn_host: Text | None = None
    conn_schema: Text | None = None
    conn_login: Text | None = None
    conn_password: Text | None = None
    conn_port: int | Text | None = None
    conn_extra: dict[str, Any] | Text | None = None

    @field_validator("conn_password", mode="before")
    @classmethod
    def _no_password(cls, value: object) -> object:
        if value and not (isinstance(value, str) and REFERENCE.fullmatch(value)):
            raise ValueError("a password must not stand in this file; allowed: one reference such as ${MY_PASSWORD}")
        return value

    @field_validator("conn_port")
    @classmethod
    def _real_port(cls, value: int | str | None) -> int | str | None:
        if value and not REFERENCE.fullmatch(str(value)) and not _is_port(value):
            raise ValueError(f"{value!r} is not a port; allowed: 1 to 65535, or a reference such as ${{MY_PORT}}")
        return value

    @field_validator("conn_host")
    @classmethod
    def _no_login_in_host(cls, value: str | None) -> str | None:
        if value and re.search(r"//[^/@]*:[^/@]*@", REFERENCE.sub("", value).replace(":@", "@")):
            raise ValueError(
                "a password must not stand in a URL; allowed: conn_login and conn_password: ${MY_PASSWORD}"
            )
        return value

    @field_validator("conn_extra")
    @classmethod
    def _no_secret_in_extra(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        content = value
        if isinstance(value, str) and value.strip() and not REFERENCE.fullmatch(value):
            try:
                content = json.loads(value)
            except ValueError:
                raise ValueError("expected a mapping, or a mapping as JSON") from None
            if not isinstance(content, dict):
                raise ValueError("expected a mapping, or a mapping as JSON")
        if isinstance(content, dict) and (field := _open_secret(content)):
            raise ValueError(f"{field} looks like a secret; allowed: one reference such as ${{MY_SECRET}}")
        return value


class Pool(_Entry):
    """One Airflow pool."""

    pool_name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    pool_slot: int = Field(ge=-1, description="-1 is without limit.")
    pool_description: str | None = None

    @field_validator("pool_slot")
    @classmethod
    def _usable(cls, value: int) -> int:
        if value == 0:
            raise ValueError("a pool of 0 slots runs nothing; allowed: 1 or more, or -1 for no limit")
        return value


class Variable(_Entry):
    """One Airflow variable."""

    variable_name: Annotated[str, StringConstraints(min_length=1, max_length=250)]
    variable_value: str | bool | int | float | list[Any] | dict[str, Any]

    @model_validator(mode="after")
    def _no_secret(self) -> Variable:
        if field := _open_secret({self.variable_name: self.variable_value}):
            raise ValueError(f"{field} looks like a secret; allowed: one reference such as ${{MY_SECRET}}")
        return self


class AirflowObjects(_Entry):
    """The three lists."""

    connections: list[Connection] = []
    pools: list[Pool] = []
    variables: list[Variable] = []

    @field_validator("connections", "pools", "variables", mode="before")
    @classmethod
    def _empty(cls, value: object) -> object:
        return [] if value is None else value

    @model_validator(mode="after")
    def _unique(self) -> AirflowObjects:
        for entries, field in (
            (self.connections, "conn_id"),
            (self.pools, "pool_name"),
            (self.variables, "variable_name"),
        ):
            names = [getattr(entry, field) for entry in entries]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{field} {', '.join(sorted(twice))} is given twice")
        return self


class Settings(_Entry):
    """The whole file."""

    airflow: AirflowObjects


def read(home: Path) -> AirflowObjects:
    """Read `airflow_settings.yaml` in `home` with its ${NAME}s put in; no file is an empty one. Raises `SpecError`."""
    file = home / FILE
    if not file.exists():
        return AirflowObjects()
    data, lines = yamlfile.read(file)
    settings = yamlfile.validate(Settings, data, lines, file).airflow
    filled = _fill(settings.model_dump(), ("airflow",), lines, file)
    for i, entry in enumerate(filled["connections"]):
        if entry["conn_port"] and not _is_port(entry["conn_port"]):
            line = lines.get(("airflow", "connections", i, "conn_port"), 1)
            raise SpecError(f"{file}:{line}: conn_port is {entry['conn_port']!r}; allowed: 1 to 65535")
    # Not validated again: a password is no reference any more.
    return AirflowObjects.model_construct(
        connections=[Connection.model_construct(**entry) for entry in filled["connections"]],
        pools=[Pool.model_construct(**entry) for entry in filled["pools"]],
        variables=[Variable.model_construct(**entry) for entry in filled["variables"]],
    )


def load(settings: AirflowObjects, api: AirflowApi) -> None:
    """Put everything into Airflow; doing it twice changes nothing."""
    api.put("pools", [_pool(entry) for entry in settings.pools])
    api.put("connections", [_connection(entry) for entry in settings.connections])
    api.put("variables", [{"key": v.variable_name, "value": v.variable_value} for v in settings.variables])


def _pool(pool: Pool) -> dict[str, Any]:
    return {"name": pool.pool_name, "slots": pool.pool_slot, "description": pool.pool_description or ""}


def _connection(entry: Connection) -> dict[str, Any]:
    extra = entry.conn_extra if isinstance(entry.conn_extra, str) else json.dumps(entry.conn_extra or {})
    return {
        "connection_id": entry.conn_id,
        "conn_type": entry.conn_type,
        "host": entry.conn_host,
        "schema": entry.conn_schema,
        "login": entry.conn_login,
        "password": entry.conn_password,
        "port": int(entry.conn_port) if entry.conn_port else None,
        "extra": extra,
    }


def _is_port(value: int | str) -> bool:
    return str(value).isdecimal() and 1 <= int(value) <= 65535


def _fill(value: Any, path: tuple[str | int, ...], lines: yamlfile.Lines, file: Path) -> Any:
    """Put the variables in for their ${NAME}s."""
    if isinstance(value, dict):
        return {key: _fill(item, (*path, key), lines, file) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, (*path, i), lines, file) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> str:
        found = os.environ.get(match.group(1))
        if found is None:
            field = ".".join(str(part) for part in path)
            line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)
            raise SpecError(
                f"{file}:{line}: {field}: the variable {match.group(1)} is not set",
                hint="set it, or take the entry out",
            )
        return found

    return REFERENCE.sub(one, value)


def _open_secret(value: Any, name: str = "") -> str | None:
    """Return the name of the first field that is called like a secret and is not a reference."""
    if isinstance(value, dict):
        found = (_open_secret(item, str(key)) for key, item in value.items())
        return next((field for field in found if field), None)
    if isinstance(value, list):
        return next((field for item in value if (field := _open_secret(item, name))), None)
    secret = isinstance(value, str) and bool(value) and bool(SECRET.search(name))
    return name if secret and not REFERENCE.fullmatch(value) else None
