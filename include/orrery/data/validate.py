"""`validate`: run the spec's checks on a raw partition, set aside the rows that break them, keep the rest.

<source>.parquet              the rows that keep every check of severity `error`
quarantine/<source>.parquet   the rows that do not, with `_reasons`
report.json                   counts, and every check with what it found
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from orrery.contract import Result, ValidateParams
from orrery.data import docs, gx, quarantine, rules, tables
from orrery.errors import DataError
from orrery.spec import Checks
from orrery.step import Work


@dataclass(frozen=True)
class Checked:
    """One source: the table, its checks, how they came out, what Great Expectations says, and the split."""

    source: str
    table: pa.Table
    checks: Checks
    outcomes: list[rules.Outcome]
    gx: gx.Run
    split: quarantine.Split


def run(work: Work, params: ValidateParams) -> Result:
    """Validate every source. Raises `DataError` (64) that lists every check of severity `error` that fails."""
    raw = work.input("raw")
    runner = gx.Runner()
    done: list[Checked] = []
    with work.progress("validate", len(work.spec.sources), "sources") as tick:
        for source in work.spec.sources:
            table = tables.read_parquet(work.open_input(raw, f"{source}.parquet"))
            done.append(_check(work, runner, source, table))
            tick()
    report = {one.source: describe(one) for one in done}
    links = {"Data Docs": docs.publish(work, [(one.source, one.gx.whole, report[one.source]) for one in done])}
    _refuse(work, done, links)
    for one in done:
        tables.write_parquet(one.split.clean, work.path(f"{one.source}.parquet"))
        tables.write_parquet(one.split.quarantined, work.path(f"quarantine/{one.source}.parquet"))
    work.write_json("report.json", report)
    return Result(reasons=_notes(done), metrics=_metrics(done), facts=_facts(done), links=links)


def _check(work: Work, runner: gx.Runner, source: str, table: pa.Table) -> Checked:
    checks = work.spec.checks_of(source)
    if quarantine.REASONS in table.column_names:
        raise DataError(f"{source} has a column {quarantine.REASONS!r}, which is ours", hint="rename it upstream")
    if work.config.sample < 1:
        table, checks = _sample(work, source, table, checks)
    decided = [rules.decide(rule, table) for rule in rules.rules_of(checks, table.schema)]
    said = runner.run(source, table, [o.rule for o in decided], checks.expectations)
    for disagreement in gx.compare(decided, said):
        work.log.warning(f"{source}: {disagreement}; ours counts")
    return Checked(source, table, checks, [*decided, *said.raw], said, quarantine.split(table, decided))


def _sample(work: Work, source: str, table: pa.Table, checks: Checks) -> tuple[pa.Table, Checks]:
    """Take the run's share of the rows' source, by its first key column; its volume is not judged then."""
    if source != work.spec.rows_source or not checks.unique or checks.unique[0] not in table.column_names:
        return table, checks
    fewer = tables.sample(table, work.config.sample, checks.unique[0])
    return fewer, checks.model_copy(update={"min_rows": None, "max_rows": None})


def _refuse(work: Work, done: Sequence[Checked], links: dict[str, str]) -> None:
    """Raise `DataError` when a check blocks, or when no row of the rows' source is left."""
    failures = [_failure(one, o) for one in done for o in one.outcomes if o.blocks]
    rows = next(one for one in done if one.source == work.spec.rows_source)
    if not rows.split.clean.num_rows:
        failures.append(f"{rows.source}: none of its {rows.table.num_rows:,} rows is left")
    if not failures:
        return
    count = "a check fails" if len(failures) == 1 else f"{len(failures)} checks fail"
    raise DataError(
        f"{count} for {work.config.key}:\n" + "\n".join(f"  {line}" for line in failures),
        hint="see the Data Docs; correct the data upstream and land them again, or change `checks` in spec.yaml",
        details={"links": links, "failures": failures},
    )


def _failure(one: Checked, outcome: rules.Outcome) -> str:
    said = f"{one.source}: {outcome.rule.name}: {outcome.found}"
    rows = rules.examples(outcome, one.table, one.checks.unique)
    return said + "".join(f"\n    {row}" for row in rows)


def describe(one: Checked) -> dict[str, Any]:
    """Return one source's part of report.json."""
    return {
        "rows_in": one.table.num_rows,
        "rows_clean": one.split.clean.num_rows,
        "rows_quarantined": one.split.quarantined.num_rows,
        "reasons": one.split.counts,
        "checks": [_describe_check(o) for o in one.outcomes],
    }


def _describe_check(outcome: rules.Outcome) -> dict[str, Any]:
    rule = outcome.rule
    return {
        "column": rule.column,
        "check": rule.check,
        "allowed": rule.allowed,
        "severity": rule.severity,
        "passed": outcome.passed,
        "found": outcome.found,
        "checked": outcome.checked,
        "bad": outcome.bad,
    }


def _notes(done: Sequence[Checked]) -> list[str]:
    """Return what people should know although nothing blocks: rows set aside, and warnings."""
    notes = []
    for one in done:
        for reason, count in one.split.counts.items():
            notes.append(f"{one.source}: {count:,} rows quarantined: {reason}")
        for outcome in one.outcomes:
            if outcome.rule.severity == "warning" and (outcome.bad or not outcome.passed):
                notes.append(f"{one.source}: warning: {outcome.rule.name}: {outcome.found}")
    return notes


def _metrics(done: Sequence[Checked]) -> dict[str, float]:
    out: dict[str, float] = {}
    for one in done:
        out[f"rows_{one.source}"] = float(one.split.clean.num_rows)
        out[f"quarantined_{one.source}"] = float(one.split.quarantined.num_rows)
    return out


def _facts(done: Sequence[Checked]) -> dict[str, Any]:
    return {
        one.source: {
            "rows_in": one.table.num_rows,
            "rows_clean": one.split.clean.num_rows,
            "rows_quarantined": one.split.quarantined.num_rows,
            "checks": len(one.outcomes),
            "columns": {field.name: str(field.type) for field in one.split.clean.schema},
        }
        for one in done
    }
