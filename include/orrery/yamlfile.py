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
MAX_DEPTH = 50  # libyaml's composer in C overruns the stack, and the process dies, some thousand levels down
MAX_FIELDS = 100_000  # a few hundred bytes of anchors can stand for billions of fields
# The loader in C is ten times as fast; a build of PyYAML without libyaml has only the other.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Loader(_Base):  # type: ignore[misc]
    """YAML 1.2's idea of scalars: `on`, `yes`, `2013-01-01` and `12:30` are text, `1e-3` is a number.

    Stricter in two things: `007` stays text (a code, not a number), and there is no infinity or NaN.
    """


class Inside(ValueError):
    """What is wrong below the field that is being checked, at `at`: a message, or the error of another model."""

    def __init__(
        self, at: tuple[str | int, ...], error: str | ValidationError, model: type[BaseModel] = BaseModel
    ) -> None:
        super().__init__(str(error))
        self.at, self.error, self.model = at, error, model


Loader.yaml_implicit_resolvers = {
    first: [(tag, p) for tag, p in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp", "int", "float")]
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}
_SCALARS = (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("int", r"^(?:[-+]?(?:0|[1-9][0-9]*))$", "-+0123456789"),
    ("float", r"^[-+]?(?:0|[1-9][0-9]*|(?=\.[0-9]))(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
)
for _tag, _pattern, _first in _SCALARS:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


_MAPPING, _LIST = "`key: value` lines", "a list, such as [a, b]"
# What pydantic says of a wrong kind, by its type of error, in words of YAML.
KINDS = {
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "dict_type": _MAPPING,
    "mapping_type": _MAPPING,
    "list_type": _LIST,
    "tuple_type": _LIST,
    "set_type": _LIST,
    "string_type": "text",
}


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
        _measure(text, file)
        loader = Loader(text)
        node = loader.get_single_node()
        lines: Lines = {}
        if node is not None:  # before it is constructed, which merges `<<` into the nodes
            _walk(node, (), lines, file, set())
        data = loader.construct_document(node) if node is not None else None
    except UnicodeDecodeError:
        raise SpecError(f"{file}: not UTF-8 text") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise SpecError(f"{file}{where}: not YAML: {getattr(e, 'problem', None) or e}") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {_kind(data)}"
        raise SpecError(f"{file}:1: expected `key: value` lines, found {found}")
    return data, lines


def _measure(text: str, file: Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Base):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise SpecError(f"{file}:{event.start_mark.line + 1}: nested too deeply (more than {MAX_DEPTH} levels)")


def _walk(node: Any, path: tuple[str | int, ...], lines: Lines, file: Path, open_nodes: set[int]) -> None:
    """Note the line of every field below `node`; a key given twice is an error (YAML would take the last)."""
    if id(node) in open_nodes:
        raise SpecError(f"{file}:{node.start_mark.line + 1}: a YAML anchor contains itself")
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > MAX_FIELDS:
        raise SpecError(f"{file}: more than {MAX_FIELDS:,} fields (YAML anchors that multiply?)")
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
        raise SpecError("\n".join(_problems(model, data, lines, file, e))) from None


def _problems(
    model: type[BaseModel], data: Any, lines: Lines, file: Path, error: ValidationError, at: tuple[str | int, ...] = ()
) -> list[str]:
    """Return one line per problem; `at` is where `model`'s part lies in the file."""
    found: list[str] = []
    for one in error.errors():
        nested = one.get("ctx", {}).get("error")
        if not isinstance(nested, Inside):
            found.append(_problem(model, data, lines, file, dict(one), at))
            continue
        inner = (*at, *one["loc"], *nested.at)
        if isinstance(nested.error, ValidationError):
            found += _problems(nested.model, data, lines, file, nested.error, inner)
        else:
            found.append(_problem(model, data, lines, file, {**one, "loc": (), "msg": nested.error}, inner))
    return found


def _problem(
    model: type[BaseModel], data: Any, lines: Lines, file: Path, error: dict[str, Any], at: tuple[str | int, ...]
) -> str:
    loc = tuple(error["loc"])
    real = _real(data, (*at, *loc))
    where = real
    while where and where not in lines:
        where = where[:-1]
    prefix = f"{file}:{lines.get(where, 1)}"
    if error["type"] == "missing":
        return f"{prefix}: {'.'.join(map(str, (*real, loc[-1])))}: is missing and must be given"
    prefix += f": {'.'.join(map(str, real)) or 'the file'}"
    if error["type"] == "extra_forbidden":
        return f"{prefix}: no such field; {nearest(str(loc[-1]), _fields_at(model, loc[:-1]))}"
    value = error.get("input")
    if error["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
        return f"{prefix}: {_shown(value)} is not allowed; {nearest(str(value), allowed)}"
    message = _message(error)
    shown = "" if isinstance(value, (dict, list)) or error["type"] == "value_error" else f" (found {_shown(value)})"
    return f"{prefix}: {message}{shown}"


def _message(error: dict[str, Any]) -> str:
    """Return what is wrong in words of the file: whoever writes YAML knows no dictionaries and no classes."""
    wanted = KINDS.get(error["type"])
    if wanted is None:
        return str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    return f"should be {wanted}" + (f", not a {_kind(value)}" if isinstance(value, (dict, list)) else "")


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "mapping"
    return "list" if isinstance(value, (list, tuple)) else "single value"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _real(data: Any, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Return the parts of `loc` that the file has: pydantic puts names of union members and validators in between."""
    real: list[str | int] = []
    here: Any = data
    for part in loc:
        in_mapping = isinstance(here, dict) and part in here
        in_list = isinstance(here, (list, tuple)) and isinstance(part, int) and part < len(here)
        if in_mapping or in_list:
            real.append(part)
            here = here[part]
    return tuple(real)


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
