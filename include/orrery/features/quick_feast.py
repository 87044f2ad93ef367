"""Feast, imported in two seconds instead of ten.

Measured on Feast 0.67: half of its import is typeguard rewriting the decorated functions' source, most of
the rest is PyTorch, which nothing here needs. Both are left out while it imports, and given back after.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def feast() -> ModuleType:
    """Return the module feast, its DuckDB offline store imported too."""
    if "feast" not in sys.modules:
        with quiet(), _unchecked(), _without("torch"):
            import feast.infra.offline_stores.duckdb
            import feast.types  # noqa: F401
    return sys.modules["feast"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what Feast and ibis say about interfaces that they themselves use: nobody here can act on it."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Make typeguard's decorator do what it does under `python -O`: nothing."""
    typeguard: Any = importlib.import_module("typeguard")
    checked = typeguard.typechecked

    def unchecked(target: Any = None, **options: Any) -> Any:
        return (lambda f: f) if target is None else target

    typeguard.typechecked = unchecked
    try:
        yield
    finally:
        typeguard.typechecked = checked


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Let `import module` fail, unless it is imported already: Feast takes that for "not installed"."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
