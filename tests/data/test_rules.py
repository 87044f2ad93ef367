"""What each check means, row by row, and that Great Expectations says the same of it."""

from __future__ import annotations

import itertools
import string
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orrery.data import gx, quarantine, rules
from orrery.errors import SpecError
from orrery.spec import Checks, RawExpectation

NAN = float("nan")
NUMBERS = itertools.count()


def outcomes(table: pa.Table, **checks: Any) -> list[rules.Outcome]:
    parsed = Checks.model_validate(checks)
    return [rules.decide(rule, table) for rule in rules.rules_of(parsed, table.schema)]


def one(table: pa.Table, **checks: Any) -> rules.Outcome:
    (found,) = outcomes(table, **checks)
    return found


def bad(table: pa.Table, **checks: Any) -> list[int]:
    mask = one(table, **checks).mask
    assert mask is not None
    return np.flatnonzero(mask).tolist()


@pytest.fixture(scope="module")
def runner() -> gx.Runner:
    return gx.Runner()


@pytest.mark.parametrize(
    ("values", "check", "expected"),
    [
        ([1.0, None, NAN, 2.0], {"required": True}, [1, 2]),
        (["a", None, ""], {"required": True}, [1]),
        ([-1, 0, 10, 11, None], {"between": [0, 10]}, [0, 3]),
        ([-1.5, NAN, 10.5], {"between": [None, 10]}, [2]),
        ([-1.5, NAN, 10.5], {"between": [0, None]}, [0]),
        (["a", "b", None, "c"], {"in": ["a", "b"]}, [3]),
        ([1, 2, 3, None], {"in": [1, 2]}, [2]),
        ([1.0, 2.5, NAN], {"in": [1]}, [1]),
        ([True, False, None], {"in": [True]}, [1]),
        (["N1", "N1x", "xN1", None, "N1\n"], {"matches": r"N\d"}, [1, 2, 4]),
        (["ab", "AB", "b"], {"matches": "(?i)ab|c"}, [2]),
        (["a", "bb", "ac"], {"matches": "a|bb"}, [2]),
    ],
)
def test_the_rows_that_break_a_rule(values, check, expected, runner):
    table = pa.table({"c": pa.array(values, from_pandas=False)})
    checks = Checks.model_validate({"c": {**check, "mostly": 0}})
    (rule,) = rules.rules_of(checks, table.schema)
    outcome = rules.decide(rule, table)
    assert np.flatnonzero(outcome.mask).tolist() == expected
    said = runner.run(f"c{abs(hash(str((values, check))))}", table, [rule], []).whole.results[0]
    assert said.result["unexpected_count"] == len(expected)


def test_a_key_is_repeated_after_its_first_row_and_missing_when_a_part_is():
    table = pa.table({"a": [1, 1, 1, None, None, 2], "b": ["x", "y", "x", "x", "x", "z"]})
    a, b, unique = outcomes(table, unique=["a", "b"])
    assert np.flatnonzero(a.mask).tolist() == [3, 4]
    assert b.bad == 0
    assert np.flatnonzero(unique.mask).tolist() == [2]
    assert (unique.checked, unique.passed) == (4, False)


@pytest.mark.parametrize(("mostly", "passed"), [(0.97, True), (0.98, True), (0.981, False)])
def test_mostly_is_the_share_that_must_be_good(mostly, passed):
    outcome = one(pa.table({"c": list(range(100))}), c={"between": [2, 200], "mostly": mostly})
    assert (outcome.bad, outcome.passed) == (2, passed)


def test_a_warning_neither_blocks_nor_quarantines():
    table = pa.table({"c": list(range(10))})
    outcome = one(table, c={"between": [5, 9], "severity": "warning"})
    assert (outcome.passed, outcome.blocks, outcome.quarantines) == (False, False, False)
    assert quarantine.split(table, [outcome]).clean.num_rows == 10


@pytest.mark.parametrize(
    ("values", "good"),
    [
        (pa.array([1, 2]), {"integer", "number"}),
        (pa.array([1, None]), {"integer", "number"}),
        (pa.array([1, 2], pa.uint8()), {"integer", "number"}),
        (pa.array([1.0, 2.0]), {"number"}),
        (pa.array([Decimal("1.25"), Decimal(2)]), {"number"}),
        (pa.array(["1", None]), {"string"}),
        (pa.array([True, False]), {"boolean"}),
        (pa.array([True, None]), {"boolean"}),
        (pa.array([1, None], pa.timestamp("us", tz="UTC")), {"timestamp"}),
        (pa.array([1, None], pa.date32()), {"timestamp"}),
        (pa.array([b"x"]), set()),
        (pa.nulls(2), {"string", "number", "integer", "timestamp", "boolean"}),
    ],
)
def test_families_of_types(values, good, runner):
    table = pa.table({"c": values})
    for family in ("string", "number", "integer", "timestamp", "boolean"):
        (rule,) = rules.rules_of(Checks.model_validate({"c": {"type": family}}), table.schema)
        outcome = rules.decide(rule, table)
        assert outcome.passed == (family in good), family
        run = runner.run(f"t{family}{abs(hash(str(values)))}{values.type}", table, [rule], [])
        assert gx.compare([outcome], run) == []


def test_a_check_that_the_type_cannot_have_fails_and_says_what_it_needs(runner):
    table = pa.table({"c": ["1", "2"], "n": [1, 2]})
    found = outcomes(table, c={"between": [0, 3]}, n={"matches": "a"})
    assert [o.passed for o in found] == [False, False]
    assert found[0].rule.name == "c between needs number or integer"
    assert gx.compare(found, runner.run("needs", table, [o.rule for o in found], [])) == []


def test_a_column_that_is_not_there_is_one_failure(runner):
    table = pa.table({"a": [1]})
    found = one(table, dep_delay={"between": [0, 1], "type": "number"})
    assert (found.passed, found.found) == (False, "no such column; there are a")
    assert gx.compare([found], runner.run("gone", table, [found.rule], [])) == []


@pytest.mark.parametrize(("n", "passed"), [(9, False), (10, True), (20, True), (21, False)])
def test_volume(n, passed):
    assert one(pa.table({"a": list(range(n))}), min_rows=10, max_rows=20).passed == passed


def test_nulls_count_nan_and_quarantine_nothing():
    table = pa.table({"c": [1.0, NAN, None, 4.0]})
    assert one(table, c={"nulls": 0.5}).passed
    outcome = one(table, c={"nulls": 0.49})
    assert (outcome.passed, outcome.mask) == (False, None)
    assert outcome.found == "2 of 4 values (50 %) are missing"


@pytest.mark.parametrize(
    ("values", "passed"), [(["a"] * 9 + ["b"], True), (["a"] * 99 + ["b"], False), (["a"] * 9, False), ([None], False)]
)
def test_the_smallest_class(values, passed, runner):
    table = pa.table({"c": values})
    found = one(table, min_class_share={"c": 0.1})
    assert found.passed == passed
    run = runner.run(f"class{len(values)}{passed}{values[0]}", table, [found.rule], [])
    assert gx.compare([found], run) == []


def test_raw_expectations_pass_through(runner):
    table = pa.table({"c": [1.0, 2.0, 3.0]})
    raw = [
        RawExpectation(type="expect_column_mean_to_be_between", kwargs={"column": "c", "min_value": 5}),
        RawExpectation(type="expect_column_mean_to_be_between", kwargs={"column": "c", "max_value": 5}),
        RawExpectation(type="expect_column_max_to_be_between", kwargs={"column": "nope"}, severity="warning"),
    ]
    first, second, third = runner.run("raw", table, [], raw).raw
    assert (first.passed, first.blocks, first.found) == (False, True, "observed 2.0")
    assert second.passed
    assert (third.passed, third.blocks) == (False, False)
    assert "could not be run" in third.found


def test_a_raw_expectation_that_needs_scipy_gets_it(runner):
    rng = np.random.default_rng(0)
    table = pa.table({"c": rng.choice(["a", "b"], 500)})
    partition = {"values": ["a", "b"], "weights": [0.5, 0.5]}
    raw = RawExpectation(
        type="expect_column_kl_divergence_to_be_less_than",
        kwargs={"column": "c", "partition_object": partition, "threshold": 0.1},
    )
    assert runner.run("kl", table, [], [raw]).raw[0].passed


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (RawExpectation(type="expect_column_maen_to_be_between"), "is no expectation"),
        (RawExpectation(type="expect_column_max_to_be_between", kwargs={"colum": "c"}), "column"),
    ],
)
def test_a_wrong_raw_expectation_is_the_specs_fault(raw, said, runner):
    with pytest.raises(SpecError, match=said) as e:
        runner.run("wrong", pa.table({"c": [1]}), [], [raw])
    assert "checks of wrong" in e.value.message


# -- properties ----------------------------------------------------------------------------------------

texts = st.one_of(st.none(), st.text(string.ascii_lowercase[:3], max_size=2))
wholes = st.one_of(st.none(), st.integers(-3, 3))
floats = st.one_of(st.none(), st.just(NAN), st.floats(-3, 3, allow_nan=False))
severities = st.sampled_from(["error", "warning"])
shares = st.sampled_from([0.0, 0.5, 0.9, 1.0])


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    n = draw(st.integers(1, 30))
    take = lambda values, kind: pa.array(draw(st.lists(values, min_size=n, max_size=n)), kind)  # noqa: E731
    return pa.table({"k": take(texts, pa.string()), "i": take(wholes, pa.int64()), "x": take(floats, pa.float64())})


@st.composite
def check_sets(draw: st.DrawFn) -> Checks:
    common = {"severity": draw(severities), "mostly": draw(shares)}
    return Checks.model_validate(
        {
            "unique": draw(st.sampled_from([[], ["k"], ["k", "i"], ["i", "x"]])),
            "min_rows": draw(st.sampled_from([None, 5])),
            "k": {**common, "in": draw(st.sampled_from([["a", "b"], ["", "a"], ["zz"]])), "matches": "a?b?"},
            "i": {**common, "between": [draw(st.integers(-3, 0)), draw(st.integers(0, 3))], "type": "integer"},
            "x": {**common, "between": [-1, None], "nulls": draw(shares), "required": draw(st.booleans())},
            "min_class_share": draw(st.sampled_from([{}, {"i": 0.25}])),
        }
    )


@given(tables(), check_sets())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_row_is_ever_lost(table, checks):
    numbered = table.append_column("row", pa.array(range(table.num_rows)))
    decided = [rules.decide(rule, numbered) for rule in rules.rules_of(checks, numbered.schema)]
    split = quarantine.split(numbered, decided)
    kept, aside = split.clean["row"].to_pylist(), split.quarantined["row"].to_pylist()
    assert sorted(kept + aside) == list(range(table.num_rows))
    assert kept == sorted(kept)
    assert aside == sorted(aside)
    for row, reasons in zip(aside, split.quarantined["_reasons"].to_pylist(), strict=True):
        assert reasons == [o.rule.name for o in decided if o.quarantines and o.mask[row]] != []
    assert sum(split.counts.values()) == sum(len(r) for r in split.quarantined["_reasons"].to_pylist())


@given(tables(), check_sets())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_great_expectations_agrees(runner, table, checks):
    decided = [rules.decide(rule, table) for rule in rules.rules_of(checks, table.schema)]
    run = runner.run(f"s{next(NUMBERS)}", table, [o.rule for o in decided], [])
    assert gx.compare(decided, run) == []
