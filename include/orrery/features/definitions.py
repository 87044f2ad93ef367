"""What a project's features.py declares, collected and checked before any data are read. Light."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from orrery import bundle
from orrery.errors import SpecError, nearest
from orrery.features import MARK, Function, Mark
from orrery.spec import NAME, ModelSpec, load_model, seconds

DURATION = r"[1-9][0-9]{0,5}[smhd]"
NOT_JOINED_ON = ("prediction_time", "label", "label_time", "event_time", "available_time")


@dataclass(frozen=True)
class Rows:
    """The function that makes the rows, and the source whose clean table it reads."""

    source: str
    function: Function


@dataclass(frozen=True)
class View:
    """One view: what it is joined on, how long a value holds, and the source it reads."""

    name: str
    on: tuple[str, ...]
    ttl: str
    source: str
    function: Function

    @property
    def ttl_us(self) -> int:
        """How long a value holds, in microseconds."""
        return seconds(self.ttl) * 1_000_000


@dataclass(frozen=True)
class Derive:
    """A function that adds columns after the join."""

    name: str
    function: Function


@dataclass(frozen=True)
class Definitions:
    """All that a features module declares, views and derives in the order of the file."""

    rows: Rows
    views: tuple[View, ...]
    derives: tuple[Derive, ...]


def load(folder: Path, project: str, spec: ModelSpec | None = None) -> Definitions:
    """Import a project's features.py and collect it. Raises `SpecError`."""
    return collect(bundle.load_module(folder, project, "features"), spec or load_model(folder))


def collect(module: ModuleType, spec: ModelSpec) -> Definitions:
    """Collect the decorated functions of a features module. Raises `SpecError` with file, line and what is allowed."""
    file = str(module.__file__)
    marked = [
        (name, f, getattr(f, MARK)) for name, f in vars(module).items() if isinstance(getattr(f, MARK, None), Mark)
    ]
    for name, function, mark in marked:
        _check_function(file, name, function, mark)
    views = tuple(_view(name, f, mark, spec) for name, f, mark in marked if mark.role == "view")
    derives = tuple(Derive(name, f) for name, f, mark in marked if mark.role == "derive")
    return Definitions(_rows(file, [f for _, f, mark in marked if mark.role == "rows"], spec), views, derives)


def where(function: Any) -> str:
    """Return `file:line` of a function."""
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "features.py"


def _check_function(file: str, name: str, function: Any, mark: Mark) -> None:
    if not isinstance(function, FunctionType):
        raise SpecError(f"{file}: @{mark.role} {name} is a {type(function).__name__}, not a function")
    if function.__name__ != name:
        raise SpecError(
            f"{where(function)}: @{mark.role} {function.__name__} is also called {name}", hint="give it one name"
        )
    given, defaults = function.__code__.co_argcount, len(function.__defaults__ or ())
    if not given - defaults <= 1 <= given:
        raise SpecError(
            f"{where(function)}: @{mark.role} {name} takes {given} arguments", hint=f"def {name}(table: pa.Table)"
        )


def _rows(file: str, functions: list[Any], spec: ModelSpec) -> Rows:
    if not functions:
        raise SpecError(
            f"{file}: no function is marked with @rows", hint=f"@rows\n    def {spec.rows_source}(raw): ..."
        )
    if len(functions) > 1:
        all_of_them = " and ".join(f"{f.__name__} ({where(f)})" for f in functions)
        raise SpecError(f"{file}: one function makes the rows, {len(functions)} are marked with @rows: {all_of_them}")
    name = functions[0].__name__
    if name not in spec.sources:
        raise SpecError(f"{where(functions[0])}: @rows {name}: no such source", hint=nearest(name, spec.sources))
    if name != spec.rows_source:
        raise SpecError(
            f"{where(functions[0])}: @rows {name}: rows come from the first source of spec.yaml, {spec.rows_source}",
            hint=f"rename the function to {spec.rows_source}, or put {name} first",
        )
    return Rows(name, functions[0])


def _view(name: str, function: Any, mark: Mark, spec: ModelSpec) -> View:
    here = f"{where(function)}: @view {name}"
    if not re.fullmatch(NAME, name):
        raise SpecError(f"{here}: a view's name is lower case letters, digits and _ (it begins its features' names)")
    source = name if mark.source is None else mark.source
    if source not in spec.sources:
        raise SpecError(f"{here}: source {source!r} is not in spec.yaml", hint=nearest(str(source), spec.sources))
    if not isinstance(mark.ttl, str) or not re.fullmatch(DURATION, mark.ttl, flags=re.ASCII):
        shown = "is missing" if mark.ttl is None else f"{mark.ttl!r} is not a duration"
        raise SpecError(f"{here}: ttl {shown}", hint='such as ttl="90s", "15m", "2h" or "7d"')
    return View(name, _on(here, mark.on), mark.ttl, source, function)


def _on(here: str, on: Any) -> tuple[str, ...]:
    example = 'name the columns that rows and view share: on=["origin"]'
    if on is None:
        raise SpecError(f"{here}: on is missing", hint=example)
    if isinstance(on, str) or not isinstance(on, (list, tuple)) or not on:
        raise SpecError(f"{here}: on={on!r} is not a list of column names", hint=example)
    bad = [c for c in on if not isinstance(c, str) or not c or c in NOT_JOINED_ON]
    if bad or len(set(on)) != len(on):
        problem = f"{bad[0]!r} cannot be joined on" if bad else "a column is named twice"
        raise SpecError(f"{here}: on={list(on)!r}: {problem}", hint=example)
    return tuple(on)
