"""Great Expectations over one table: every rule is run by it as well, for the record and the Data Docs.

Its severities do not decide what blocks (`rules.decide` does); `compare` says where the two disagree.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orrery.data.rules import JOINED_KEY, Outcome, Rule, key_codes
from orrery.errors import SpecError, nearest
from orrery.spec import RawExpectation

# Great Expectations imports these at its top for three of its expectations; they come when one is used.
DEFERRED = ("scipy.stats", "altair")
# It works without these extras, and only leaves out the databases and clouds that a table in memory has no use for.
LEFT_OUT = ("sqlalchemy", "boto3", "botocore", "google")
SHOWN = 5


class _Deferred(ModuleType):
    """Stands for a module until something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def load() -> ModuleType:
    """Import Great Expectations in half its usual time: without what a table in memory has no use for."""
    if "great_expectations" in sys.modules:
        return sys.modules["great_expectations"]
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    with _shortened(), _uncollected(), warnings.catch_warnings():
        # Its own business: modules of the standard library that are on their way out.
        warnings.simplefilter("ignore", DeprecationWarning)
        gx = importlib.import_module("great_expectations")
    import orrery.data.class_share  # noqa: F401 (registers itself)

    return gx


@contextlib.contextmanager
def _shortened() -> Iterator[None]:
    """Let imports find stand-ins; whoever imports the same modules later gets the real ones."""
    stand_ins: dict[str, Any] = {n: _Deferred(n) for n in DEFERRED if n not in sys.modules}
    stand_ins |= {n: None for n in LEFT_OUT if n not in sys.modules}  # None: ImportError, as if not installed
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from looking again and again at modules that all stay."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class Run:
    """What Great Expectations says of one source: per rule whether it holds, the raw outcomes, and the whole."""

    said: list[bool]
    raw: list[Outcome]
    whole: Any


class Runner:
    """One ephemeral context for all sources of a step."""

    def __init__(self) -> None:
        self.gx: Any = load()
        from great_expectations.data_context.types import base

        config = base.DataContextConfig(
            store_backend_defaults=base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
            progress_bars=base.ProgressBarsConfig(globally=False),
            analytics_enabled=False,
        )
        self.context = self.gx.get_context(mode="ephemeral", project_config=config)
        self._sources = self.context.data_sources.add_pandas("orrery")

    def run(self, source: str, table: pa.Table, rules: Sequence[Rule], raw: Sequence[RawExpectation]) -> Run:
        """Run all checks of a source. Raises `SpecError` for a raw expectation that there is not."""
        made = [_implementation(r.expectation)(**r.kwargs, severity=_severity(r.severity)) for r in rules]
        made += [_raw(source, e) for e in raw]
        suite = self.context.suites.add(self.gx.ExpectationSuite(name=source, expectations=made))
        batch = self._sources.add_dataframe_asset(source).add_batch_definition_whole_dataframe("partition")
        definition = self.gx.ValidationDefinition(name=source, data=batch, suite=suite)
        self.context.validation_definitions.add(definition)
        whole = definition.run(
            batch_parameters={"dataframe": frame(table, None if raw else rules, rules)},
            result_format={"result_format": "SUMMARY", "partial_unexpected_count": SHOWN},
        )
        by_id = {r.expectation_config.id: r for r in whole.results}
        ordered = [by_id[e.id] for e in suite.expectations]
        said = [bool(r.success) for r in ordered[: len(rules)]]
        return Run(said, [_outcome(e, r) for e, r in zip(raw, ordered[len(rules) :], strict=True)], whole)


def frame(table: pa.Table, needed: Sequence[Rule] | None, rules: Sequence[Rule]) -> Any:
    """Return the table as pandas: only the columns that `needed` names (None: all), instants without their zone (UTC).

    Integers with missing values become floats, as pandas has it, but where a rule asks for their type or a
    float could not hold them: then they stay Python's integers.
    """
    import pandas as pd

    if needed is not None:
        wanted = {c for r in needed for c in (r.column, *r.key)}
        table = table.select([c for c in table.column_names if c in wanted] or table.column_names[:1])
    typed = {r.column for r in rules if r.expectation.endswith("_in_type_list")}
    columns = {name: _series(table[name], name in typed) for name in table.column_names}
    out = pd.DataFrame(columns, copy=False)
    joined = next((r.key for r in rules if len(r.key) > 1), None)
    if joined:
        codes = key_codes(table, list(joined))
        out[JOINED_KEY] = pd.Series(codes).where(codes >= 0)
    return out


def _series(column: pa.ChunkedArray, typed: bool) -> Any:
    kind = column.type
    if pa.types.is_decimal(kind):
        column = pc.cast(column, pa.float64())
    elif pa.types.is_timestamp(kind):
        column = pc.cast(column, pa.timestamp(kind.unit))
    exact = pa.types.is_integer(kind) and column.null_count > 0 and (typed or _large(column))
    series = column.to_pandas(integer_object_nulls=exact, date_as_object=False)
    if pa.types.is_boolean(kind) and column.null_count:
        # Python's True is an integer to isinstance, numpy's is not.
        return series.map(np.bool_, na_action="ignore")
    return series


def _large(column: pa.ChunkedArray) -> bool:
    found = pc.min_max(column).as_py()
    return found["max"] is not None and max(abs(found["min"]), abs(found["max"])) > 2**53


def compare(outcomes: Sequence[Outcome], run: Run) -> list[str]:
    """Return a sentence for each rule that Great Expectations sees otherwise.

    None is known to, but for a key that no row has: it calls the share of nothing 0, we have nothing to object.
    """
    return [
        f"{o.rule.name}: we say {'pass' if o.passed else 'fail'}, Great Expectations says {'pass' if said else 'fail'}"
        for o, said in zip(outcomes, run.said, strict=True)
        if o.passed != said and not (o.rule.key and o.checked == 0)
    ]


def _severity(severity: str) -> str:
    return "critical" if severity == "error" else "warning"


def _implementation(name: str) -> Any:
    from great_expectations.expectations.registry import get_expectation_impl

    return get_expectation_impl(name)


def _raw(source: str, expectation: RawExpectation) -> Any:
    from great_expectations.expectations import registry

    known = registry.list_registered_expectation_implementations()
    where = f"spec.yaml: checks of {source}: expectations: {expectation.type}"
    if expectation.type not in known:
        close = nearest(expectation.type, known).split(" allowed:")[0]
        raise SpecError(f"{where} is no expectation of Great Expectations", hint=close)
    try:
        return _implementation(expectation.type)(**expectation.kwargs, severity=_severity(expectation.severity))
    except (ValueError, TypeError) as e:  # Great Expectations' own pydantic raises ValueErrors
        raise SpecError(f"{where}: {' '.join(str(e).split())[:300]}", hint="correct its kwargs") from None


def _outcome(expectation: RawExpectation, result: Any) -> Outcome:
    """Return how a raw expectation came out, in our terms: it never quarantines."""
    allowed = ", ".join(f"{k}={v!r}" for k, v in expectation.kwargs.items() if k != "column")
    column = expectation.kwargs.get("column")
    rule = Rule(column, expectation.type, allowed, expectation.severity, expectation.type, dict(expectation.kwargs))
    return Outcome(rule, bool(result.success), _found(result))


def _found(result: Any) -> str:
    trouble = _trouble(result.exception_info or {})
    if trouble:
        return f"it could not be run: {trouble}"
    said = result.result
    if "observed_value" in said:
        observed = said["observed_value"]
        return f"observed {observed.item() if isinstance(observed, np.generic) else observed!r:.200}"
    if "unexpected_count" in said:
        values = ", ".join(f"{v!r:.60}" for v in said.get("partial_unexpected_list", [])[:SHOWN])
        return f"{said['unexpected_count']:,} of {said['element_count']:,} rows break it, such as {values}".rstrip(" ,")
    return "it does not hold"


def _trouble(info: dict[str, Any]) -> str:
    """Return the first exception message of a result, or nothing: GX nests them by metric."""
    if "raised_exception" in info:
        return str(info.get("exception_message") or "an exception")[:300] if info["raised_exception"] else ""
    return next((found for v in info.values() if isinstance(v, dict) and (found := _trouble(v))), "")
