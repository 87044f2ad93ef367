"""Great Expectations over one table: every rule is run by it as well, for the record and the Data Docs.

Its severities do not decide what blocks (`rules.decide` does); `compare` says where the two disagree.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orrery.data.rules import JOINED_KEY, Outcome, Rule, key_codes, smallest_class
from orrery.errors import SpecError, nearest
from orrery.spec import RawExpectation

# Imported at the top by three of its expectations and used by no other: a third of the time of its import.
HEAVY = ("scipy.stats", "altair")
SHOWN = 5
CLASS_SHARE = "expect_column_smallest_class_share_to_be_at_least"


class _Deferred(ModuleType):
    """Stands for a module until something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def load() -> ModuleType:
    """Import Great Expectations without what it hardly ever uses, and without the garbage collector's help."""
    if "great_expectations" in sys.modules:
        return sys.modules["great_expectations"]
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    stand_ins = {name: _Deferred(name) for name in HEAVY if name not in sys.modules}
    sys.modules.update(stand_ins)
    collecting = gc.isenabled()
    gc.disable()
    try:
        gx = importlib.import_module("great_expectations")
    finally:
        # Whoever imports them later gets the real ones.
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        if collecting:
            gc.enable()
    importlib.import_module("orrery.data.class_share")
    return gx


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
        self.context = self.gx.get_context(mode="ephemeral")
        from great_expectations.data_context.types.base import ProgressBarsConfig

        self.context.variables.progress_bars = ProgressBarsConfig(globally=False)
        self._sources = self.context.data_sources.add_pandas("orrery")

    def run(self, source: str, table: pa.Table, rules: Sequence[Rule], raw: Sequence[RawExpectation]) -> Run:
        """Run all checks of a source. Raises `SpecError` for a raw expectation that there is not."""
        suite = self.context.suites.add(self.gx.ExpectationSuite(name=source))
        made = [_implementation(r.expectation)(**r.kwargs, severity=_severity(r.severity)) for r in rules]
        made += [_raw(source, e) for e in raw]
        suite.expectations = made
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

    Integers and booleans with missing values keep their type (Int64, boolean); decimals become floats.
    """
    import pandas as pd

    if needed is not None:
        wanted = {c for r in needed for c in (r.column, *r.key)}
        table = table.select([c for c in table.column_names if c in wanted] or table.column_names[:1])
    columns = {name: _simple(column) for name, column in zip(table.column_names, table.columns, strict=True)}
    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    out = pd.DataFrame(
        {
            name: column.to_pandas(
                types_mapper=nullable.get if column.null_count else None, date_as_object=False
            ).to_numpy(copy=False)
            if not column.null_count
            else column.to_pandas(types_mapper=nullable.get, date_as_object=False)
            for name, column in columns.items()
        },
        copy=False,
    )
    joined = next((r.key for r in rules if len(r.key) > 1), None)
    if joined:
        codes = key_codes(table, list(joined))
        out[JOINED_KEY] = pd.Series(codes).where(codes >= 0)
    return out


def _simple(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_decimal(kind):
        return pc.cast(column, pa.float64())
    if pa.types.is_timestamp(kind):
        return pc.cast(column, pa.timestamp(kind.unit))
    if pa.types.is_integer(kind) and column.null_count and kind != pa.uint64():
        return pc.cast(column, pa.int64())
    return column


def compare(outcomes: Sequence[Outcome], run: Run) -> list[str]:
    """Return a sentence for each rule that Great Expectations sees otherwise (none is known to)."""
    return [
        f"{o.rule.name}: we say {'pass' if o.passed else 'fail'}, Great Expectations says {'pass' if said else 'fail'}"
        for o, said in zip(outcomes, run.said, strict=True)
        if o.passed != said
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
        return f"observed {said['observed_value']!r:.200}"
    if "unexpected_count" in said:
        values = ", ".join(f"{v!r:.60}" for v in said.get("partial_unexpected_list", [])[:SHOWN])
        return f"{said['unexpected_count']:,} of {said['element_count']:,} rows break it, such as {values}".rstrip(" ,")
    return "it does not hold"


def _trouble(info: dict[str, Any]) -> str:
    """Return the first exception message of a result, or nothing: GX nests them by metric."""
    if "raised_exception" in info:
        return str(info.get("exception_message") or "an exception")[:300] if info["raised_exception"] else ""
    return next((found for v in info.values() if isinstance(v, dict) and (found := _trouble(v))), "")
