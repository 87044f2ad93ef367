from __future__ import annotations

import json
from datetime import UTC, datetime

import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orrery.data import rules
from orrery.data.draft import bounds, checks_of, draft, main, round_down, round_up
from orrery.spec import Checks, ModelSpec


def test_the_draft_of_two_sources_is_what_a_spec_takes(house, make_orders):
    paths = [house.land("orders", month, make_orders(month=month)) for month in ("2024-01", "2024-02")]
    found = draft({"orders": paths, "weather": [f"file://{house.upstream}/weather/2024-01.parquet"]})
    assert found == {
        "unique": "id",
        "min_rows": 100,
        "id": {"type": "string"},
        "placed": {"type": "timestamp", "required": True},
        "amount": {"type": "number", "required": True, "between": [0, 300]},
        "kind": {"type": "string", "required": True, "in": ["a", "b"]},
        "weather": {
            "unique": "at",
            "min_rows": 10,
            "at": {"type": "timestamp"},
            "temp": {"type": "number", "required": True, "between": [0, 34]},
        },
    }
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    ModelSpec.model_validate({**house.spec, "checks": found})


def test_a_draft_passes_on_its_own_data(house, make_orders):
    house.land("orders", "2024-01", make_orders(amount=[None if i % 9 == 0 else float(i) for i in range(200)]))
    found = draft({s: [house.upstream / s / "2024-01.parquet"] for s in ("orders", "weather")})
    assert found["amount"]["nulls"] == pytest.approx(0.3)
    house.write_spec(checks=found)
    house.run("ingest")
    assert house.run("validate").metrics["quarantined_orders"] == 0.0


def test_a_pair_with_a_time_can_be_the_key():
    hours = [datetime(2024, 1, 1, h, tzinfo=UTC) for h in range(20)]
    table = pa.table({"origin": ["x", "y"] * 20, "at": sorted(hours * 2), "v": [1.0] * 40})
    assert checks_of([table])["unique"] == ["origin", "at"]


def test_what_names_the_partition_has_no_range():
    months = [pa.table({"id": [m * 10, m * 10 + 1], "month": [m, m], "v": [1, 2]}) for m in (1, 2)]
    found = checks_of(months)
    assert found["month"] == {"type": "integer", "required": True}
    assert "between" in found["v"]


def test_a_column_named_like_a_check_is_nested_and_an_odd_name_left_out():
    table = pa.table({"id": ["a", "b"], "unique": [1, 2], "odd name": [1, 2], "weather": [1, 2]})
    found = checks_of([table], reserved={"weather"})
    assert set(found["columns"]) == {"unique", "weather"}
    assert "odd name" not in found
    assert Checks.model_validate(found).columns.keys() >= {"id", "unique", "weather"}


def test_a_key_of_an_odd_name_is_left_out_and_said(house, capsys):
    ids = [f"o{i}" for i in range(40)]
    file = house.land("orders", "2024-01", pa.table({"Order Id": ids, "amount": [1.5] * 40}))
    assert main(json.dumps({"orders": str(file)})) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"] == {"orders": ["Order Id"]}
    assert set(found["checks"]) == {"min_rows", "amount"}
    Checks.model_validate(found["checks"])


def test_no_set_is_proposed_from_a_coincidence():
    assert "in" not in checks_of([pa.table({"c": ["a", "b", "a", "b"]})])["c"]
    assert "in" not in checks_of([pa.table({"c": [f"v{i % 21}" for i in range(2100)]})])["c"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 150]), (5, 5, [0, 7.5]), (-10, -5, [-13, 0]), (-50, 50, [-100, 100]), (0, 0, [0, 0.5])],
)
def test_ranges_are_rounded_outward(low, high, expected):
    assert bounds({"min": low, "max": high}) == expected


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_range_holds_what_was_seen(a, b):
    low, high = min(a, b), max(a, b)
    bottom, top = bounds({"min": low, "max": high})
    assert bottom <= low <= high <= top
    table = pa.table({"c": [low, high]})
    checks = Checks.model_validate({"c": {"between": [bottom, top]}})
    assert all(rules.decide(rule, table).passed for rule in rules.rules_of(checks, table.schema))


def test_rounding():
    assert [round_up(v, 1) for v in (0.0231, 5123, 0.3, 1)] == [0.03, 6000.0, 0.3, 1.0]
    assert [round_down(v) for v in (13502, 99, 0.5, 1000)] == [10000, 90, 0, 1000]
