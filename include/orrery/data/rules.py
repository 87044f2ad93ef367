"""What the spec's checks mean: each one a rule, decided exactly with Arrow.

A rule about rows marks the rows that break it; they are quarantined, and the rule fails when more than
`1 - mostly` of the values break it. A rule about the table holds or fails as a whole. Shares are taken of
the values that are there, as Great Expectations does it (`required` and `nulls`: of all rows). NaN is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orrery.data.families import families
from orrery.spec import Checks, ColumnCheck

Severity = Literal["error", "warning"]
Mask: TypeAlias = npt.NDArray[np.bool_]
EXAMPLES = 5
# The column that Great Expectations sees in place of a key of several columns.
JOINED_KEY = "_orrery_key"
# Which families of types a check can be asked of.
FAMILIES = {
    "between": ("number", "integer"),
    "in": ("string", "number", "integer", "boolean"),
    "matches": ("string",),
}


@dataclass(frozen=True)
class Rule:
    """One check of one source: what it says to people, how it is decided, and its Great Expectations form."""

    column: str | None
    check: str
    allowed: str
    severity: Severity
    expectation: str
    kwargs: dict[str, Any]
    mostly: float = 1.0
    bad_rows: Callable[[pa.Table], Mask] | None = None
    measure: Callable[[pa.Table], tuple[bool, str]] | None = None
    key: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How reports and quarantined rows name it, such as `distance between [0, 6000]`."""
        return " ".join(part for part in (self.column, self.check, self.allowed) if part)


@dataclass(frozen=True)
class Outcome:
    """How a rule came out. `bad` is the number of rows that break it, of `checked`; `mask` marks them."""

    rule: Rule
    passed: bool
    found: str
    checked: int = 0
    bad: int = 0
    mask: Mask | None = field(default=None, compare=False)

    @property
    def share(self) -> float:
        """The share of the checked rows that break the rule."""
        return self.bad / self.checked if self.checked else 0.0

    @property
    def blocks(self) -> bool:
        """Whether the step must end because of it."""
        return not self.passed and self.rule.severity == "error"

    @property
    def quarantines(self) -> bool:
        """Whether its bad rows are taken out."""
        return self.mask is not None and self.rule.severity == "error"


def rules_of(checks: Checks, schema: pa.Schema) -> list[Rule]:
    """Return the rules of one source, in the spec's order; raw Great Expectations are not among them."""
    rules = [_volume(checks)] if checks.min_rows is not None or checks.max_rows is not None else []
    wanted = {column: _worst([check.severity]) for column, check in checks.columns.items()}
    wanted |= dict.fromkeys((*checks.unique, *checks.min_class_share), "error")
    rules += [_exists(column, severity) for column, severity in wanted.items() if column not in schema.names]
    if checks.unique and set(checks.unique) <= set(schema.names):
        rules += list(_unique(checks))
    for column, check in checks.columns.items():
        if column in schema.names:
            rules += _column_rules(column, check, schema.field(column).type)
    rules += [_classes(c, share) for c, share in checks.min_class_share.items() if c in schema.names]
    return rules


def decide(rule: Rule, table: pa.Table) -> Outcome:
    """Decide one rule on a table."""
    if rule.bad_rows is None:
        assert rule.measure is not None
        passed, found = rule.measure(table)
        return Outcome(rule, passed, found)
    mask = rule.bad_rows(table)
    checked = table.num_rows if rule.check == "required" else table.num_rows - _missing_count(rule, table)
    bad = int(mask.sum())
    passed = checked == 0 or (checked - bad) / checked >= rule.mostly
    found = f"{bad:,} of {checked:,} rows ({_percent(bad / checked if checked else 0)}) break it"
    return Outcome(rule, passed, f"{found}, {_percent(1 - rule.mostly)} may", checked, bad, mask)


def examples(outcome: Outcome, table: pa.Table, key: tuple[str, ...]) -> list[str]:
    """Return up to five rows that break a rule, as `flight_id='…' distance=-4`."""
    if outcome.mask is None:
        return []
    columns = list(dict.fromkeys(c for c in (*key, outcome.rule.column) if c in table.column_names))
    rows = np.flatnonzero(outcome.mask)[:EXAMPLES]
    names = columns or table.column_names[:3]
    return [" ".join(f"{n}={table[n][int(i)].as_py()!r:.60}" for n in names) for i in rows]


def missing(column: pa.ChunkedArray) -> Mask:
    """Mark the values that are missing: null, or NaN."""
    return _mask(pc.is_null(column, nan_is_null=pa.types.is_floating(column.type)))


def _mask(values: pa.ChunkedArray) -> Mask:
    return np.asarray(values.combine_chunks().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _missing_count(rule: Rule, table: pa.Table) -> int:
    gone = np.zeros(table.num_rows, dtype=np.bool_)
    for name in rule.key or (rule.column,):
        gone |= missing(table[name])
    return int(gone.sum())


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _worst(severities: list[Severity]) -> Severity:
    return "error" if "error" in severities else "warning"


# -- rules about the table ---------------------------------------------------------------------------


def _volume(checks: Checks) -> Rule:
    low, high = checks.min_rows, checks.max_rows
    kwargs = {"min_value": low, "max_value": high}

    def measure(table: pa.Table) -> tuple[bool, str]:
        n = table.num_rows
        return (low is None or n >= low) and (high is None or n <= high), f"{n:,} rows"

    return Rule(
        None, "rows", _range(low, high), "error", "expect_table_row_count_to_be_between", kwargs, measure=measure
    )


def _exists(column: str, severity: Severity) -> Rule:
    def measure(table: pa.Table) -> tuple[bool, str]:
        return column in table.column_names, f"no such column; there are {', '.join(table.column_names)}"

    return Rule(column, "exists", "", severity, "expect_column_to_exist", {"column": column}, measure=measure)


def _type(column: str, wanted: tuple[str, ...], check: str, severity: Severity) -> Rule:
    """A rule that a column's type is of one of the families `wanted`; without any value it is of all."""

    def measure(table: pa.Table) -> tuple[bool, str]:
        kind = table.schema.field(column).type
        return pa.types.is_null(kind) or bool(families(kind) & set(wanted)), f"it is {kind}"

    kwargs = {"column": column, "type_list": [t for f in wanted for t in PANDAS_TYPES[f]]}
    allowed = " or ".join(wanted)
    return Rule(column, check, allowed, severity, "expect_column_values_to_be_in_type_list", kwargs, measure=measure)


def _nulls(column: str, largest: float, severity: Severity) -> Rule:
    mostly = round(1 - largest, 12)  # 1 - 0.07 is not 0.93; Great Expectations is given the same number

    def measure(table: pa.Table) -> tuple[bool, str]:
        n, gone = table.num_rows, int(missing(table[column]).sum())
        passed = n == 0 or (n - gone) / n >= mostly
        return passed, f"{gone:,} of {n:,} values ({_percent(gone / n if n else 0)}) are missing"

    kwargs = {"column": column, "mostly": mostly}
    return Rule(
        column, "nulls", f"<= {largest:g}", severity, "expect_column_values_to_not_be_null", kwargs, measure=measure
    )


def _classes(column: str, smallest: float) -> Rule:
    def measure(table: pa.Table) -> tuple[bool, str]:
        share, name = smallest_class(table[column].filter(pa.array(~missing(table[column]))))
        return share >= smallest, f"{name} has {_percent(share)}"

    kwargs = {"column": column, "min_value": smallest}
    return Rule(
        column,
        "smallest class",
        f">= {smallest:g}",
        "error",
        "expect_column_smallest_class_share_to_be_at_least",
        kwargs,
        measure=measure,
    )


def smallest_class(values: pa.ChunkedArray) -> tuple[float, str]:
    """Return share and name of the rarest value; 0 when there are fewer than two, for then a class is absent."""
    counts = sorted((c["counts"], repr(c["values"])) for c in pc.value_counts(values).to_pylist())
    if len(counts) < 2:
        return 0.0, f"a second class (the only one is {counts[0][1]})" if counts else "every class"
    return counts[0][0] / len(values), counts[0][1]


# -- rules about rows --------------------------------------------------------------------------------


def _unique(checks: Checks) -> Iterator[Rule]:
    """A key names its row: no part of it is missing, and no row repeats another's (the first stays)."""
    columns, mostly = list(checks.unique), ColumnCheck().mostly
    for column in columns:
        if not (column in checks.columns and checks.columns[column].required):
            yield _required(column, mostly, "error")
    target = columns[0] if len(columns) == 1 else JOINED_KEY
    yield Rule(
        ", ".join(columns),
        "unique",
        "",
        "error",
        "expect_column_proportion_of_unique_values_to_be_between",
        {"column": target, "min_value": mostly},
        mostly,
        bad_rows=lambda table: repeats(table, columns),
        key=checks.unique,
    )


def repeats(table: pa.Table, columns: list[str]) -> Mask:
    """Mark the rows whose key an earlier row has already; rows with an incomplete key are not compared."""
    codes = key_codes(table, columns)
    out = np.zeros(table.num_rows, dtype=np.bool_)
    there = np.flatnonzero(codes >= 0)
    _, first = np.unique(codes[there], return_index=True)
    out[there] = True
    out[there[first]] = False
    return out


def key_codes(table: pa.Table, columns: list[str]) -> npt.NDArray[np.int64]:
    """Return a number per row, equal for equal keys; -1 where a part of the key is missing."""
    codes = np.zeros(table.num_rows, dtype=np.int64)
    gone = np.zeros(table.num_rows, dtype=np.bool_)
    for name in columns:
        encoded = table[name].combine_chunks().dictionary_encode()
        gone |= missing(table[name])
        part = pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False).astype(np.int64)
        # Numbered anew after each column, so that the product cannot overflow.
        codes = np.unique(codes * (len(encoded.dictionary) + 1) + part, return_inverse=True)[1].astype(np.int64)
    codes[gone] = -1
    return codes


def _column_rules(column: str, check: ColumnCheck, kind: pa.DataType) -> list[Rule]:
    rules: list[Rule] = []
    if check.type is not None:
        rules.append(_type(column, (check.type,), "type", check.severity))
    if check.nulls is not None:
        rules.append(_nulls(column, check.nulls, check.severity))
    if check.required:
        rules.append(_required(column, check.mostly, check.severity))
    for name, value in (("between", check.between), ("in", check.values), ("matches", check.matches)):
        if value is None or value == (None, None):
            continue
        if pa.types.is_null(kind) or families(kind) & set(FAMILIES[name]):
            rules.append(_MAKERS[name](column, value, check))
        else:
            rules.append(_type(column, FAMILIES[name], f"{name} needs", check.severity))
    return rules


def _required(column: str, mostly: float, severity: Severity) -> Rule:
    kwargs = {"column": column, "mostly": mostly}
    return Rule(
        column,
        "required",
        "",
        severity,
        "expect_column_values_to_not_be_null",
        kwargs,
        mostly,
        bad_rows=lambda table: missing(table[column]),
    )


def _between(column: str, bounds: tuple[float | None, float | None], check: ColumnCheck) -> Rule:
    low, high = bounds

    def bad_rows(table: pa.Table) -> Mask:
        values = numbers(table[column])
        bad = np.zeros(table.num_rows, dtype=np.bool_)
        if low is not None:
            bad |= _mask(pc.fill_null(pc.less(values, low), False))
        if high is not None:
            bad |= _mask(pc.fill_null(pc.greater(values, high), False))
        return bad

    kwargs = {"column": column, "min_value": low, "max_value": high, "mostly": check.mostly}
    expectation = "expect_column_values_to_be_between"
    return Rule(column, "between", _range(low, high), check.severity, expectation, kwargs, check.mostly, bad_rows)


def numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return decimals (and a column without any value) as float64, and everything else as it is."""
    return (
        pc.cast(column, pa.float64()) if pa.types.is_decimal(column.type) or pa.types.is_null(column.type) else column
    )


def _in(column: str, values: tuple[Any, ...], check: ColumnCheck) -> Rule:
    allowed = set(values)
    kwargs = {"column": column, "value_set": list(values), "mostly": check.mostly}
    return Rule(
        column,
        "in",
        f"{{{', '.join(map(repr, values))}}}",
        check.severity,
        "expect_column_values_to_be_in_set",
        kwargs,
        check.mostly,
        bad_rows=lambda table: _by_value(numbers(table[column]), lambda v: v in allowed),
    )


def _matches(column: str, pattern: str, check: ColumnCheck) -> Rule:
    whole = re.compile(anchored(pattern))
    kwargs = {"column": column, "regex": whole.pattern, "mostly": check.mostly}
    return Rule(
        column,
        "matches",
        pattern,
        check.severity,
        "expect_column_values_to_match_regex",
        kwargs,
        check.mostly,
        bad_rows=lambda table: _by_value(table[column], lambda v: whole.search(v) is not None),
    )


_MAKERS: dict[str, Callable[[str, Any, ColumnCheck], Rule]] = {"between": _between, "in": _in, "matches": _matches}


def anchored(pattern: str) -> str:
    """Return a regular expression that matches whole values only. Leading flags such as (?i) stay in front."""
    flags = re.match(r"(?:\(\?[aiLmsux]+\))*", pattern)
    head = flags.group(0) if flags else ""
    return rf"{head}\A(?:{pattern[len(head) :]})\Z"


def _by_value(column: pa.ChunkedArray, good: Callable[[Any], bool]) -> Mask:
    """Mark the rows whose value is there and not good; asks once for each different value."""
    encoded = column.combine_chunks().dictionary_encode()
    wrong = np.array([not good(v) for v in encoded.dictionary.to_pylist()], dtype=np.bool_)
    bad: Mask = np.zeros(len(column), dtype=np.bool_)
    there = ~missing(column)
    bad[there] = wrong[pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False)[there]] if len(wrong) else False
    return bad


def _range(low: float | None, high: float | None) -> str:
    return f"[{'-∞' if low is None else f'{low:.12g}'}, {'∞' if high is None else f'{high:.12g}'}]"


# Family -> what Great Expectations calls its types in pandas (2.3), as `gx.frame` makes them.
PANDAS_TYPES: dict[str, tuple[str, ...]] = {
    "string": ("str",),
    "integer": ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "int"),
    "boolean": ("bool",),
    "timestamp": ("datetime64[s]", "datetime64[ms]", "datetime64[us]", "datetime64[ns]"),
}
PANDAS_TYPES["number"] = (*PANDAS_TYPES["integer"], "float16", "float32", "float64")
