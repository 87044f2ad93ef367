"""`score`: the same numbers as ONNX Runtime, every row once, nothing visible before the commit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring_house import SCHEMA, features

from orrery.errors import DataError, OrreryError, UserError
from orrery.scoring import parts, score
from orrery.scoring.parts import Item, Part, plan_items
from orrery.scoring.session import SparkFailed

pytestmark = pytest.mark.usefixtures("spark")


def test_scores_equal_onnxruntime_asked_directly(house, expected):
    table = features(12_345)
    result = house.score(house.config(house.features(table, 5_000), house.model()))
    scores = house.scores(result)
    assert scores.column_names == ["key", "prediction_time", "prediction", "model_version"]
    assert scores["key"].equals(table["key"])
    assert scores["prediction_time"].equals(table["prediction_time"])
    assert set(scores["model_version"].to_pylist()) == {"7"}
    assert scores.schema.field("prediction").type == pa.float32()
    np.testing.assert_allclose(scores["prediction"].to_numpy(), expected("binary", table), rtol=1e-6)
    mean = float(expected("binary", table).mean(dtype=np.float64))
    assert result.metrics["rows"] == 12_345
    assert result.metrics["mean_prediction"] == pytest.approx(mean, rel=1e-6)
    assert house.report(result)["prediction"]["quantiles"]["0.5"] == pytest.approx(
        float(np.median(expected("binary", table))), rel=1e-6
    )
    assert result.reasons == []


def test_many_parts_hold_every_row_once_and_in_order(house, expected):
    table = features(230_001)
    result = house.score(house.config(house.features(table, 50_000), house.model()))
    manifest = house.manifest(result)
    names = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert sorted(manifest.files) == [*names, "report.json"]
    rows = [pq.ParquetFile(house.store.full(manifest.uri(n))).metadata.num_rows for n in names]
    assert rows == [100_000, 100_000, 30_001]
    scores = house.scores(result)
    assert scores["key"].equals(table["key"])
    np.testing.assert_allclose(scores["prediction"].to_numpy(), expected("binary", table), rtol=1e-6)
    report = house.report(result)
    assert (report["rows_read"], report["rows"], report["parts"]) == (230_001, 230_001, 3)


def test_multiclass_has_one_probability_per_class(house, expected):
    table = features(3_000)
    schema = SCHEMA.model_copy(update={"task": "multiclass", "classes": ("early", "on time", "late")})
    result = house.score(house.config(house.features(table), house.model("multiclass", schema)))
    found = np.array(house.scores(result)["prediction"].to_pylist(), np.float32)
    np.testing.assert_allclose(found, expected("multiclass", table), rtol=1e-5)
    classes = house.report(result)["prediction"]["classes"]
    assert list(classes) == ["early", "late", "on time"]  # canonical JSON sorts
    assert sum(c["share"] for c in classes.values()) == pytest.approx(1)
    assert classes["late"]["mean"] == pytest.approx(float(found[:, 2].mean()), rel=1e-5)


def test_unknown_categories_are_scored_as_unknown_counted_and_told(house, expected):
    table = features(120_000)
    origin = table["origin"].to_pylist()
    for i, code in ((5, "ZRH"), (77_000, "BOS"), (119_999, "BOS")):  # in both parts
        origin[i] = code
    table = table.set_column(table.column_names.index("origin"), "origin", pa.array(origin))
    result = house.score(house.config(house.features(table), house.model()))
    assert house.report(result)["unknown"] == {"origin": {"rows": 3, "examples": ["BOS", "ZRH"]}}
    assert result.reasons == ["origin: 3 rows have a value that the model does not know (BOS, ZRH)"]
    found = house.scores(result)["prediction"].to_numpy()
    np.testing.assert_allclose(found, expected("binary", table), rtol=1e-6)
    # Null carriers are missing, not unknown, and there are some.
    assert table["carrier"].null_count > 0


def test_scoring_again_makes_the_same_bytes(house):
    config = house.config(house.features(features(110_000)), house.model())
    first = house.score(config)
    again = house.score(config.model_copy(update={"address": "f" * 32, "attempt": 2}))
    assert again.skipped is None
    assert again.output != first.output
    assert again.digest == first.digest
    assert house.scores(again).num_rows == 110_000
    third = house.score(config)
    assert third.skipped is not None
    assert third.digest == first.digest


def test_a_task_that_is_tried_again_gives_its_rows_once(house, spark, tmp_path):
    """The first try of every task writes its part and then breaks, as when an executor is lost after the write."""
    table = features(220_000)
    config = house.config(house.features(table), house.model())
    work = score.Work(config, house.store, tmp_path / "w")
    job = score.plan_job(work, score.ScoreParams(model_version="7"))

    def breaks_once(batches, job):
        from pyspark import TaskContext

        from orrery.scoring.parts import score_batches

        yield from score_batches(batches, job)
        if TaskContext.get().attemptNumber() == 0:
            raise RuntimeError("lost after the write")

    made = score.score_all(job, spark, breaks_once)
    there = house.store.names(f"{job.folder}/parts")
    assert len(there) == 2 * len(job.items)  # both tries wrote
    score.reconcile(job, made)
    assert len(score.read_back(work, job, made)) == 220_000
    for part in made:
        work.adopt(job.items[part.index].name, part.relative, part.size, part.sha256)
    manifest = work.commit(score.Result())
    assert house.store.missing_files(manifest) == []
    names = sorted(manifest.files)
    keys = pa.concat_tables([pq.read_table(house.store.full(manifest.uri(n))) for n in names])["key"]
    assert keys.equals(table["key"])


def test_sample_takes_the_same_rows_by_key(house):
    table = features(60_000)
    config = house.config(house.features(table), house.model(), sample=0.05)
    result = house.score(config)
    scores, report = house.scores(result), house.report(result)
    assert 2_500 < scores.num_rows < 3_500
    assert (report["rows_read"], report["rows"]) == (60_000, scores.num_rows)
    from orrery.data.tables import sample

    assert scores["key"].equals(sample(table, 0.05)["key"])


def test_no_rows_make_one_empty_part(house):
    result = house.score(house.config(house.features(features(0)), house.model()))
    assert house.scores(result).num_rows == 0
    assert "mean_prediction" not in result.metrics
    assert result.metrics["rows"] == 0


def test_a_prediction_that_is_no_number_becomes_null_and_is_told(house, expected):
    table = features(1_000)
    result = house.score(house.config(house.features(table), house.model("not_finite")))
    bad = ~np.isfinite(expected("not_finite", table))
    prediction = house.scores(result)["prediction"]
    assert 0 < bad.sum() < 1_000
    assert prediction.is_null().to_numpy().tolist() == bad.tolist()
    assert house.report(result)["not_finite"] == bad.sum()
    assert "not a finite number" in result.reasons[0]


def test_missing_and_mistyped_features_are_the_users(house):
    table = features(100)
    lacking = table.drop_columns(["wind", "origin"])
    with pytest.raises(DataError, match=r"lacks wind, origin, which the model was trained with"):
        house.score(house.config(house.features(lacking), house.model()))
    text = table.set_column(table.column_names.index("wind"), "wind", table["wind"].cast(pa.string()))
    with pytest.raises(DataError, match=r"wind is string, the model was trained on a number"):
        house.score(house.config(house.features(text), house.model()))


def test_an_error_in_a_worker_keeps_its_kind(house):
    model = house.model()
    Path(house.store.full(model.uri("model.onnx"))).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.onnx is not the file that was committed"):
        house.score(house.config(house.features(features(100)), model))


def test_a_bug_in_a_worker_is_told_by_its_last_line(house):
    schema = SCHEMA.model_copy(update={"task": "multiclass", "classes": ("only", "two")})
    with pytest.raises(SparkFailed, match=r"Spark: ValueError: could not broadcast") as caught:
        house.score(house.config(house.features(features(10)), house.model("multiclass", schema)))
    assert caught.value.exit_code == 1
    assert "score_part" in caught.value.details["error"]


def test_a_key_that_is_there_twice_is_refused(house):
    table = pa.concat_tables([features(100_000), features(20)])  # twins in different parts
    with pytest.raises(OrreryError, match=r"20 keys are there more than once: f0000000, f0000001") as caught:
        house.score(house.config(house.features(table), house.model()))
    assert caught.value.exit_code == 1
    assert house.store.latest("flights", "scores", "2013-03") is None


def part(index: int, read: int, **more: object) -> Part:
    whole = Part(index, f"parts/{index}", read, read, 10, "x", {}, 0)
    return replace(whole, **more)  # type: ignore[arg-type]


JOB = parts.Job("file:///s", "f", "m", "d", "{}", "folder", "7", 1.0, (Item(0, (0, 1), 100), Item(1, (2,), 30)))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([part(0, 100)], "2 parts were given out, these came back"),
        ([part(0, 100), part(1, 30), part(1, 30)], "2 parts were given out, these came back"),
        ([part(0, 100), part(1, 29)], r"part-00001.parquet: read 29 rows of 30"),
        ([part(0, 100), part(1, 30, rows=31)], r"part-00001.parquet: wrote 31 rows of 30"),
    ],
)
def test_counts_that_do_not_add_up_are_a_bug(made, message):
    with pytest.raises(OrreryError, match=message) as caught:
        score.reconcile(JOB, made)
    assert caught.value.exit_code == 1


def test_counts_that_add_up_pass():
    score.reconcile(JOB, [part(0, 100), part(1, 30)])


def test_a_file_that_is_not_what_was_reported_is_refused(house, tmp_path, spark):
    work = score.Work(house.config(house.features(features(500)), house.model()), house.store, tmp_path / "w")
    job = score.plan_job(work, score.ScoreParams(model_version="7"))
    made = score.score_all(job, spark)
    written = Path(house.store.full(f"{job.folder}/{made[0].relative}"))
    pq.write_table(pq.read_table(written).slice(0, 499), written)
    with pytest.raises(OrreryError, match="bytes instead of"):
        score.read_back(work, job, made)
    with pytest.raises(OrreryError, match="499 rows instead of 500"):
        score.read_back(work, job, [replace(made[0], size=written.stat().st_size)])


def test_parts_depend_on_the_file_alone():
    assert plan_items([]) == (Item(0, (), 0),)
    assert plan_items([50_000, 50_000, 7]) == (Item(0, (0, 1), 100_000), Item(1, (2,), 7))
    assert plan_items([1_000_000, 5]) == (Item(0, (0,), 1_000_000), Item(1, (1,), 5))
    assert plan_items([30_000] * 4) == (Item(0, (0, 1, 2), 90_000), Item(1, (3,), 30_000))
