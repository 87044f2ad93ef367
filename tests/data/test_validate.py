from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest

from orrery.errors import DataError


def land(house, table: pa.Table, **checks) -> None:
    house.land("orders", "2024-01", table)
    house.write_spec(checks=checks)
    house.run("ingest")


def dirty(make_orders) -> pa.Table:
    """200 orders, of which rows 3 and 4 are wrong in amount, row 4 in kind as well, and row 9 repeats row 8."""
    amount = [float(i) for i in range(200)]
    amount[3], amount[4] = -1.0, -2.0
    kind = ["a" if i % 2 else "b" for i in range(200)]
    kind[4] = "zz"
    ids = [f"2024-01-{i:05d}" for i in range(200)]
    ids[9] = ids[8]
    return make_orders(id=ids, amount=amount, kind=kind)


GOOD = {"unique": "id", "min_rows": 100, "amount": {"between": [0, 1000]}, "kind": {"in": ["a", "b"]}}


def test_bad_rows_are_set_aside_with_every_reason(house, make_orders):
    land(house, dirty(make_orders), **GOOD)
    result = house.run("validate")
    assert set(house.output(result).files) == {
        "orders.parquet",
        "weather.parquet",
        "quarantine/orders.parquet",
        "quarantine/weather.parquet",
        "report.json",
    }
    aside = house.table(result, "quarantine/orders.parquet")
    assert aside["amount"].to_pylist() == [-1.0, -2.0, 9.0]
    assert aside["_reasons"].to_pylist() == [
        ["amount between [0, 1000]"],
        ["amount between [0, 1000]", "kind in {'a', 'b'}"],
        ["id unique"],
    ]
    assert house.table(result, "orders.parquet").num_rows == 197
    assert house.table(result, "quarantine/weather.parquet").num_rows == 0
    assert result.metrics["quarantined_orders"] == 3.0
    facts = dict(result.facts["orders"])
    assert list(facts.pop("columns")) == house.table(result, "orders.parquet").column_names
    assert facts == {"rows_in": 200, "rows_clean": 197, "rows_quarantined": 3, "checks": 5}
    assert "orders: 2 rows quarantined: amount between [0, 1000]" in result.reasons


def test_the_report_reconciles_and_is_the_same_each_time(house, make_orders):
    land(house, dirty(make_orders), **GOOD)
    first = house.run("validate")
    report = house.store.read(house.output(first).uri("report.json"))
    orders = json.loads(report)["orders"]
    assert orders["rows_in"] == orders["rows_clean"] + orders["rows_quarantined"] == 200
    assert orders["reasons"] == {"amount between [0, 1000]": 2, "id unique": 1, "kind in {'a', 'b'}": 1}
    # Another attempt on the same inputs (the manifest gone, as if it had been killed) makes the same bytes.
    (house.folder / "store" / first.output).unlink()
    again = house.run("validate")
    assert again.digest == first.digest


def test_every_failure_is_listed_and_the_docs_are_linked(house, make_orders):
    bad = make_orders(amount=[-1.0] * 5 + [1.0] * 195, kind=[None] * 150 + ["a"] * 50)
    checks = {
        "unique": "id",
        "min_rows": 1000,
        "amount": {"between": [0, 10]},
        "kind": {"nulls": 0.1},
        "placed": {"type": "string"},
        "colour": {"in": ["red"]},
    }
    land(house, bad, **checks)
    with pytest.raises(DataError) as e:
        house.run("validate")
    said = e.value.message
    assert said.startswith("5 checks fail for 2024-01:")
    assert "orders: rows [1000, ∞]: 200 rows" in said
    assert "orders: amount between [0, 10]: 5 of 200 rows (2.5 %) break it, 1 % may" in said
    assert said.count("amount=-1.0") == 5
    assert "id='2024-01-00000' amount=-1.0" in said
    assert "orders: kind nulls <= 0.1: 150 of 200 values (75 %) are missing" in said
    assert "orders: placed type string: it is timestamp[us, tz=UTC]" in said
    assert "orders: colour exists: no such column; there are id, placed, amount, kind" in said
    page = e.value.details["links"]["Data Docs"]
    assert b"no such column" in house.store.read(page)
    assert house.store.latest("shop", "clean", "2024-01") is None


def test_a_failing_warning_is_a_note(house, make_orders):
    checks = {"amount": {"between": [0, 10], "severity": "warning"}, "weather": {"temp": {"type": "string"}}}
    land(house, make_orders(), **checks)
    with pytest.raises(DataError, match=r"a check fails for 2024-01:\n  weather: temp type string: it is double"):
        house.run("validate")
    house.write_spec(checks={**checks, "weather": {}})
    result = house.run("validate")
    assert result.reasons == ["orders: warning: amount between [0, 10]: 189 of 200 rows (94.5 %) break it, 1 % may"]
    assert house.table(result, "orders.parquet").num_rows == 200


def test_a_raw_expectation_blocks_by_its_severity(house, make_orders):
    raw = {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "amount", "max_value": 1}}
    land(house, make_orders(), expectations=[{**raw, "severity": "warning"}])
    assert "expect_column_mean_to_be_between" in house.run("validate").reasons[0]
    house.write_spec(checks={"expectations": [raw]})
    with pytest.raises(DataError, match=r"orders: amount expect_column_mean_to_be_between max_value=1: observed 99\.5"):
        house.run("validate")


def test_nothing_left_is_a_failure_although_mostly_allows_it(house, make_orders):
    land(house, make_orders(), amount={"between": [-2, -1], "mostly": 0})
    with pytest.raises(DataError, match="none of its 200 rows is left"):
        house.run("validate")


def test_without_checks_everything_stays(house):
    house.run("ingest")
    result = house.run("validate")
    assert (result.reasons, result.metrics["rows_orders"], result.metrics["rows_weather"]) == ([], 200.0, 20.0)


def test_a_source_without_rows_passes_what_is_asked_of_rows(house):
    empty = pa.table({"at": pa.array([], pa.timestamp("us")), "temp": pa.array([], pa.float64())})
    house.land("weather", "2024-01", empty)
    house.write_spec(
        checks={"weather": {"unique": "at", "temp": {"between": [0, 1], "required": True, "type": "number"}}}
    )
    house.run("ingest")
    assert house.run("validate").metrics["rows_weather"] == 0.0


def test_a_sample_is_judged_without_its_volume_and_not_published(house, make_orders):
    land(house, make_orders(2000), unique="id", min_rows=2000)
    result = house.run("validate", sample=0.1)
    assert 100 < result.metrics["rows_orders"] < 300
    assert house.store.latest("shop", "clean", "2024-01") is None


class Page(HTMLParser):
    """Collects what a page loads from elsewhere, and whether its tags are whole."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "source", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.scripts += tag == "script"
        if tag in ("link", "script", "img", "iframe", "source"):
            self.loads.append(given.get("src") or given.get("href") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.text.append(data)


def test_the_data_docs_are_whole_and_need_nothing_from_elsewhere(house, make_orders):
    evil = "<script>alert(1)</script>"
    land(house, make_orders(kind=["a"] * 198 + [evil] * 2), **{**GOOD, "kind": {"in": ["a", "<b>"], "mostly": 0.5}})
    result = house.run("validate")
    index = result.links["Data Docs"]
    folder = index.rsplit("/", 1)[0]
    assert house.store.names(folder) == ["index.html", "orders.html", "weather.html"]
    for name in house.store.names(folder):
        html = house.store.read(f"{folder}/{name}").decode()
        page = Page(html)
        assert html.rstrip().endswith("</html>")
        assert (page.open, page.loads, page.scripts) == ([], [], 0), name
        assert not re.search(r"url\(|@import|https?:", html)
        assert "Content-Security-Policy\" content=\"default-src 'none'" in html
        for target in re.findall(r'href="([^"#][^"]*)"', html):
            assert target in house.store.names(folder)
        assert evil not in html
    orders = " ".join("".join(Page(house.store.read(f"{folder}/orders.html").decode()).text).split())
    assert "200 rows = 198 clean + 2 quarantined" in orders
    assert "values must be greater than or equal to 0" in orders  # Great Expectations' own words
    assert "alert(1)" in orders
