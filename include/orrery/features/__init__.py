"""Features: what a project's features.py is written with. Light: no Feast, no pandas, no Arrow at import.

@rows                                   one partition's clean rows -> the rows that are predicted on
def flights(raw): ...                   key, prediction_time, label, label_time, join columns, features

@view(on=["origin"], ttl="2h")          previous + this partition's rows -> what became known, and when
def weather(raw): ...                   the `on` columns, event_time, available_time, values

@derive                                 after the join; row by row, the same code online
def calendar(rows): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

if TYPE_CHECKING:
    import pyarrow as pa

Function = Callable[["pa.Table"], "pa.Table"]
F = TypeVar("F", bound=Callable[..., Any])
MARK = "__orrery_feature__"


@dataclass(frozen=True)
class Mark:
    """What a decorator noted on a function; `definitions.collect` judges it, where file and line can be told."""

    role: Literal["rows", "view", "derive"]
    on: Any = None
    ttl: Any = None
    source: Any = None


def rows(function: F) -> F:
    """Mark the function that makes the rows; its name is the source that it reads."""
    return _marked(function, Mark("rows"))


@overload
def view(function: F, /) -> F: ...
@overload
def view(*, on: Sequence[str], ttl: str, source: str | None = None) -> Callable[[F], F]: ...
def view(function: Any = None, /, *, on: Any = None, ttl: Any = None, source: Any = None) -> Any:
    """Mark a function that tells what became known and when; its features are named `<function>__<column>`.

    A row is given the latest of the view's rows with equal `on` values and
    prediction_time - ttl < available_time <= prediction_time. `source` is the function's name by default.
    """
    mark = Mark("view", on, ttl, source)
    return (lambda f: _marked(f, mark)) if function is None else _marked(function, mark)


def derive(function: F) -> F:
    """Mark a pure function that adds columns after the join, each from its own row alone."""
    return _marked(function, Mark("derive"))


def _marked(function: F, mark: Mark) -> F:
    setattr(function, MARK, mark)
    return function


__all__ = ["derive", "rows", "view"]
