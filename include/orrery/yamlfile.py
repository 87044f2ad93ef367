"""YAML files that people write: read with line numbers, checked by pydantic, errors that a person can act on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from orrery.errors import SpecError, nearest

Lines = dict[tuple[str | int, ...], int]
M = TypeVar("M", bound=BaseModel)
MAX_BYTES = 1 << 20
# The loader in C is ten times as fast; a build of PyYAML without libyaml has only the other.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Loader(_Base):  # type: ignore[misc]
    """YAML 1.2's idea of scalars: `on`, `yes` and `2013-01-01` are text, only true and false are booleans."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


def read(file: Path) -> tuple[dict[str, Any], Lines]:
    """Return the mapping in `file` and the line of each of its fields. Raises `SpecError`."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise SpecError(f"{file}: there is no such file") from None
    except OSError as e:
        raise SpecError(f"{file}: cannot be read ({e.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{file}: {len(raw):,} bytes; at most {MAX_BYTES:,} are allowed")
    try:
        text = raw.decode()
        loader = Loader(text)
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else None
    except UnicodeDecodeError:
        raise SpecError(f"{file}: not UTF-8 text") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise SpecError(f"{file}{where}: not YAML: {getattr(e, 'problem', None) or e}") from None
    except RecursionError:
        raise SpecError(f"{file}: nested too deeply") from None
    if not isinstance(data, dict):
        raise SpecError(f"{file}:1: expected `key: value` lines, found {type(data).__name__}")
    lines: Lines = {}
    _walk(node, (), lines, file, set())
    return data, lines


def _walk(node: Any, path: tuple[str | int, ...], lines: Lines, file: Path, open_nodes: set[int]) -> None:
    """Note the line of every field below `node`; a key given twice is an error (YAML would take the last)."""
    if id(node) in open_nodes:
        raise SpecError(f"{file}:{node.start_mark.line + 1}: a YAML anchor contains itself")
    lines.setdefault(path, node.start_mark.line + 1)
    open_nodes.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise SpecError(f"{file}:{key.start_mark.line + 1}: {name!r} is given twice")
            seen.add(name)
            lines[(*path, name)] = key.start_mark.line + 1
            _walk(value, (*path, name), lines, file, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*path, i), lines, file, open_nodes)
    open_nodes.discard(id(node))


def validate(model: type[M], data: dict[str, Any], lines: Lines, file: Path) -> M:
    """Check `data` against `model`; every problem becomes one line `file:line: field: what is wrong`."""
    try:
        return model.model_validate(data)
    except ValidationError as e:
        problems = [_problem(model, data, lines, file, dict(error)) for error in e.errors()]
        raise SpecError("\n".join(problems)) from None


def _problem(model: type[BaseModel], data: Any, lines: Lines, file: Path, error: dict[str, Any]) -> str:
    loc = tuple(error["loc"])
    # Pydantic puts names of union members and validators into loc: keep what the file really has.
    real: list[str | int] = []
    here: Any = data
    for part in loc:
        if (isinstance(here, dict) and part in here) or (
            isinstance(here, (list, tuple)) and isinstance(part, int) and part < len(here)
        ):
            real.append(part)
            here = here[part]
    at = tuple(real)
    while at and at not in lines:
        at = at[:-1]
    line = lines.get(at, 1)
    field = ".".join(str(p) for p in loc) or "the file"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        fields = _fields_at(model, loc[:-1])
        return f"{file}:{line}: {field}: no such field; {nearest(str(loc[-1]), fields)}"
    if error["type"] == "missing":
        return f"{file}:{line}: {field}: is missing and must be given"
    value = error.get("input")
    shown = "" if isinstance(value, (dict, list)) or error["type"] == "value_error" else f" (found {value!r})"
    return f"{file}:{line}: {field}: {message}{shown}"


def _fields_at(model: Any, loc: tuple[str | int, ...]) -> list[str]:
    """Return the field names allowed at `loc` inside `model`, as far as plain nesting tells."""
    import typing

    here: Any = model
    for part in loc:
        if not (isinstance(here, type) and issubclass(here, BaseModel)):
            here = next((a for a in typing.get_args(here) if isinstance(a, type) and issubclass(a, BaseModel)), None)
            continue
        info = here.model_fields.get(str(part))
        here = info.annotation if info else None
    if not (isinstance(here, type) and issubclass(here, BaseModel)):
        here = next((a for a in typing.get_args(here) if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return [f.alias or n for n, f in here.model_fields.items()] if here is not None else []
