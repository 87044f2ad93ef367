"""`report`, through the engine, with Evidently itself."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import HOLDOUT, House, linear, rows

from orrery.contract import Result
from orrery.data.tables import write_parquet
from orrery.errors import DataError
from orrery.monitoring import report
from orrery.store import Manifest

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def score(house: House, features: Manifest, values: object, address: str = "s1") -> Manifest:
    """Commit a partition's scores, in two parts."""
    keys = pq.read_table(house.store.full(features.uri("features.parquet")))["key"]
    table, half = pa.table({"key": keys, "prediction": values}), len(keys) // 2
    files = {}
    for i, part in enumerate((table.slice(0, half), table.slice(half))):
        sink = house.root / "part.parquet"
        write_parquet(part, sink)
        files[f"part-{i:05d}.parquet"] = sink.read_bytes()
    return house.commit("score", address, files, key="2013-02", inputs={"features": (features.ref,)})


def drawn(
    house: House, model: Manifest, before: Manifest, now: Manifest, scores: Manifest, **options: object
) -> tuple[Result, dict, str]:  # type: ignore[type-arg]
    inputs = {"scores": [scores], "features": [now], "model": [model], "training": [before]}
    params = options.pop("params", {"rows": 1000})
    result = house.run("report", inputs, params, **{"address": "r1", "key": "2013-02", **options})  # type: ignore[arg-type]
    manifest = house.store.manifest(str(result.output))
    assert manifest is not None
    page = house.store.read(result.links["Evidently report"]).decode() if result.links else ""
    return result, house.store.read_json(manifest.uri("drift.json")), page


def test_evidently_sees_the_drift_of_a_sample_and_says_so(house: House) -> None:
    before, moved = house.features(rows()), rows(3000, seed=1)
    moved["a"] = moved["a"] + 1.5
    moved["noise"] = np.full(3000, np.nan)
    moved["c"] = np.where(np.arange(3000) % 50 == 0, HOSTILE, moved["c"])
    now = house.features(moved, key="2013-02", address="f2")
    model = house.candidate(linear({"a": 1.0, "b": 1.0, "noise": 0.0}, categories=["c"]), [before])
    scores = score(house, now, pa.array(np.linspace(0.9, 1, 3000), pa.float32()))
    result, document, page = drawn(house, model, before, now, scores, params={"rows": 2000})
    assert document["rows"] == {"reference": [2000, 4000], "current": [2000, 3000]}
    assert document["left_out"] == ["noise"]
    found = {n: c["score"] for n, c in document["columns"].items()}
    assert set(found) == {"a", "b", "c", "(prediction)"}
    assert found["a"] > 1
    assert found["b"] < 0.1
    assert found["(prediction)"] > 1
    said = re.search("<p style=[^>]*>([^<]*)</p>", page)
    assert said is not None
    assert "2,000 of the 4,000 rows of the training window" in said[1]
    assert "2,000 of the 3,000 rows of 2013-02" in said[1]
    assert result.reasons == [said[1].replace("&#x27;", "'")]
    assert HOSTILE not in page
    assert page.count("Content-Security-Policy") == 1
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?http", page)


def test_it_is_the_same_on_every_run(house: House) -> None:
    before, now = house.features(rows()), house.features(rows(3000, seed=1), key="2013-02", address="f2")
    model = house.candidate(linear({"a": 1.0}, categories=["c"]), [before])
    scores = score(house, now, pa.array(np.linspace(0, 1, 3000), pa.float32()))
    made = [drawn(house, model, before, now, scores, address=a)[0] for a in ("r1", "r2")]
    assert made[0].digest == made[1].digest
    other, *_ = drawn(house, model, before, now, scores, address="r3", params={"rows": 1000, "seed": 1})
    assert other.digest != made[0].digest


def test_an_empty_partition_has_no_report_and_says_why(house: House) -> None:
    before = house.features(rows())
    now = house.features({n: v[:0] for n, v in rows(10).items()}, key="2013-02", address="f2")
    model = house.candidate(linear({"a": 1.0}), [before])
    result, document, _ = drawn(house, model, before, now, score(house, now, pa.array([], pa.float32())))
    assert result.links == {}
    assert "0 of the 0 rows of 2013-02" in result.reasons[0]
    assert document == {"rows": {"reference": [1000, 4000], "current": [0, 0]}, "columns": {}}


def test_scores_of_other_rows_are_refused(house: House) -> None:
    before, now = house.features(rows()), house.features(rows(3000, seed=1), key="2013-02", address="f2")
    other = rows(3000, seed=1)
    other["key"] = [f"x{i}" for i in range(3000)]
    scores = score(house, house.features(other, address="f3"), pa.array(np.zeros(3000), pa.float32()))
    with pytest.raises(DataError, match="not those of its features"):
        drawn(house, house.candidate(linear({"a": 1.0}), [before]), before, now, scores)


def test_a_prediction_is_there_only_for_rows_that_the_model_was_not_fitted_on(house: House) -> None:
    before = house.features(rows())
    model = house.candidate(linear({"a": 1.0}), [before])
    work = house.work("report", {"training": [before]})
    scored = report.exported.load(work.open_input, model, "m")
    table, total = report._reference(work, scored, model, report.ReportParams(rows=5000))
    late = np.array([t >= HOLDOUT for t in rows()["prediction_time"].to_pylist()])
    assert total == 4000
    assert table["(prediction)"].is_valid().to_pylist() == late.tolist()


def test_a_multiclass_report_shows_the_class_that_wins(house: House, tmp_path: Path) -> None:
    house = House(tmp_path / "m", task="multiclass")
    columns = rows()
    columns["label"] = columns["c"]
    before, now = house.features(columns), house.features(columns, key="2013-02", address="f2")
    model = house.candidate(linear({"a": 1.0}, task="multiclass", classes=["u", "v", "w"]), [before])
    values = pa.array([[0.1, 0.2, 0.7], None] * 2000, pa.list_(pa.float32()))
    _, document, _ = drawn(house, model, before, now, score(house, now, values))
    assert set(document["columns"]) == {"a", "(prediction)"}


def test_rows_are_drawn_over_files_and_row_groups(tmp_path: Path) -> None:
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "c.parquet"]
    for file, (low, high) in zip(files, ((0, 70), (70, 70), (70, 100)), strict=True):
        pq.write_table(pa.table({"i": pa.array(range(low, high), pa.int64())}), file, row_group_size=20)
    drawn, total = report.sample_rows(files, ["i"], 30, seed=3)
    values = drawn["i"].to_pylist()
    assert total == 100
    assert len(set(values)) == 30
    assert values == sorted(values)
    assert values == report.sample_rows(files, ["i"], 30, seed=3)[0]["i"].to_pylist()
    assert report.sample_rows(files, ["i"], 100, seed=0)[0]["i"].to_pylist() == list(range(100))


def test_the_report_is_json_that_holds_what_it_says(house: House) -> None:
    page, found = report.draw(
        pa.table({"x": [0.0] * 50, "c": ["u"] * 50}), pa.table({"x": [0.0] * 50, "c": [None, *["u"] * 49]})
    )
    assert set(found) == {"x", "c"}
    assert json.loads(json.dumps(found)) == found
    assert "drawDashboard" in page
