"""`evaluate` on planted rows and models, through the engine, with real graphs and a real store."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import HOLDOUT, House, linear, rows
from sklearn import metrics as sk

from orrery.errors import DataError, UserError
from orrery.store import Manifest
from orrery.training.schema import Schema

MODEL = {"a": 1.0, "b": 1.0}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path, gate="{disparity: {by: _group, max: 0.5, of: flagged}}")


def predictions(house: House, evaluation: Manifest) -> pa.Table:
    return pq.read_table(house.store.full(evaluation.uri("predictions.parquet")))


def test_every_model_is_measured_on_the_same_later_rows(house: House) -> None:
    columns = rows()
    features = house.features(columns)
    candidate = house.candidate(linear(MODEL, categories=["c"]), [features])
    champion = house.candidate(linear({"a": 1.0}), [features], "c0", key="2012-12..2012-12")
    result, manifest, report = house.evaluate(candidate, [features], champion)
    late = np.array([t >= HOLDOUT for t in columns["prediction_time"].to_pylist()])
    y, a, b = columns["label"][late], columns["a"][late], columns["b"][late]
    assert report["rows"]["count"] == late.sum() == 2000
    assert report["rows"]["first"] == report["rows"]["holdout_start"] == HOLDOUT.isoformat()
    assert result.metrics["auc"] == pytest.approx(sk.roc_auc_score(y, (a + b).astype(np.float32)), abs=1e-4)
    assert result.metrics["champion_auc"] == pytest.approx(sk.roc_auc_score(y, a), abs=1e-4)
    assert result.metrics["baseline_auc"] == 0.5
    expected = {"window": "2012-12..2012-12", "unusable": None, "fitted_until": HOLDOUT.isoformat(), "seen": 0.0}
    assert report["champion"] == expected
    assert report["bootstrap"] == {"by": "day", "units": 43}  # 1,000 hours, from the afternoon of one day
    assert any("95 % interval over 43 days" in reason for reason in house.gate(manifest).reasons)
    table = predictions(house, manifest)
    assert table.column_names == ["key", "label", "candidate", "baseline", "champion"]
    np.testing.assert_allclose(table["candidate"], 1 / (1 + np.exp(-(a + b))), atol=1e-6)
    assert table["key"].to_pylist() == [k for k, kept in zip(columns["key"], late, strict=True) if kept]


def test_swapping_candidate_and_champion_swaps_every_number(house: House) -> None:
    features = house.features(rows())
    good, poor = house.candidate(linear(MODEL), [features]), house.candidate(linear({"a": 1.0}), [features], "c0")
    _, _, there = house.evaluate(good, [features], poor)
    _, _, back = house.evaluate(poor, [features], good, address="e2")
    assert there["metrics"]["candidate"] == back["metrics"]["champion"]
    assert there["metrics"]["champion"] == back["metrics"]["candidate"]
    assert there["comparisons"]["champion"]["low"] > 0 > back["comparisons"]["champion"]["high"]


def test_the_digest_depends_on_nothing_that_is_measured(house: House) -> None:
    features = house.features(rows())
    candidate = house.candidate(linear(MODEL, categories=["c"]), [features])
    one, first, _ = house.evaluate(candidate, [features])
    _, second, _ = house.evaluate(candidate, [features], address="e2")
    assert first.digest == second.digest
    assert {"p50_ms", "p99_ms", "size_mb"} <= one.metrics.keys()
    assert 0 < one.metrics["p50_ms"] <= one.metrics["p99_ms"]
    assert first.result["metrics"]["p99_ms"] == one.metrics["p99_ms"]


def test_the_curves_are_kept_for_people(house: House) -> None:
    features = house.features(rows())
    candidate = house.candidate(linear(MODEL, categories=["c"]), [features])
    result, _, _ = house.evaluate(candidate, [features], house.candidate(linear({"a": 1.0}), [features], "c0"))
    assert set(result.links) == {"Curves", "ROC", "Precision-recall", "Calibration", "Slices"}
    page = house.store.read(result.links.pop("Curves")).decode()
    assert page.count("data:image/png;base64,") == len(result.links)
    for path in result.links.values():
        assert house.store.read(path).startswith(b"\x89PNG")


def test_slices_disparity_and_the_strongest_feature(house: House) -> None:
    columns = rows()
    features = house.features(columns)
    candidate = house.candidate(linear(MODEL | {"noise": 0.0}, categories=["c"]), [features])
    _, _, report = house.evaluate(candidate, [features])
    late = slice(2000, 4000)
    entries = {e["value"]: e for e in report["slices"]["c"]}
    assert set(entries) == {"u", "v", "w"}
    in_v = columns["c"][late] == "v"
    assert entries["v"]["rows"] == in_v.sum()
    assert entries["v"]["mean_label"] == pytest.approx(columns["label"][late][in_v].mean())
    assert entries["v"]["auc"] is not None
    disparity = report["disparity"]
    assert disparity["by"] == "_group"
    score = (columns["a"] + columns["b"])[late]
    flagged = score >= np.sort(score)[::-1][int(columns["label"][late].sum()) - 1]
    shares = {g: flagged[columns["c"][late] == g].mean() for g in "uvw"}
    assert disparity["groups"] == pytest.approx(shares, abs=0.005)
    assert disparity["difference"] == pytest.approx(max(shares.values()) - min(shares.values()), abs=0.01)
    best = report["best_single_feature"]
    assert best["name"] in ("a", "b")
    assert best["value"] == pytest.approx(
        sk.roc_auc_score(columns["label"][late], columns[best["name"]][late]), abs=1e-6
    )


def test_an_identifier_does_not_recite_the_labels_but_a_category_that_holds_them_does(house: House) -> None:
    columns = rows()
    leaked = ["u" if v else "v" for v in columns["label"]]
    features = house.features({**columns, "c": leaked, "id": columns["key"]})
    graph, schema = linear(MODEL, categories=["c"])
    _, _, report = house.evaluate(house.candidate((graph, schema), [features]), [features])
    assert report["best_single_feature"] == {"name": "c", "metric": "auc", "value": 1.0, "chance": 0.5}
    with_id = schema.model_copy(update={"vocabularies": {"id": ("k00001", "k00002")}})
    _, _, report = house.evaluate(house.candidate((graph, with_id), [features], "c2"), [features], address="e2")
    assert report["best_single_feature"]["name"] in ("a", "b")


def test_missing_predictions_end_64_and_say_how_many(house: House) -> None:
    columns = rows()
    columns["a"] = np.where(np.arange(4000) % 1000 == 999, np.nan, columns["a"])
    features = house.features(columns)
    with pytest.raises(DataError, match=r"candidate predicts NaN or infinity for 2 of 2,000 rows"):
        house.evaluate(house.candidate(linear(MODEL), [features]), [features])
    assert house.store.manifest("demo/evaluate/e1/manifest.json") is None


def test_values_that_are_no_probabilities_end_64(house: House) -> None:
    features = house.features(rows())
    with pytest.raises(DataError, match="no probabilities"):
        house.evaluate(house.candidate(linear(MODEL, ends_early=True), [features]), [features])


def test_a_champion_that_lacks_a_column_is_left_out_and_named(house: House) -> None:
    features = house.features(rows())
    champion = house.candidate(linear({"gone": 1.0}), [features], "c0")
    result, _, report = house.evaluate(house.candidate(linear(MODEL), [features]), [features], champion)
    assert report["champion"]["unusable"] == "the features lack gone, which the model was trained with"
    assert "champion_auc" not in result.metrics


@pytest.mark.parametrize(
    ("champion", "says"),
    [
        (linear({"c": 1.0}), "c is string, the model was trained on a number"),
        (linear(MODEL, categories=["noise"]), "noise is double, the model was trained on text"),
        ((b"nonsense", linear(MODEL)[1]), "not a model that onnxruntime can load"),
    ],
)
def test_a_champion_that_cannot_score_these_features_is_left_out_and_named(
    house: House, champion: tuple[bytes, Schema], says: str
) -> None:
    features = house.features(rows())
    old = house.candidate(champion, [features], "c0")
    result, evaluation, report = house.evaluate(house.candidate(linear(MODEL), [features]), [features], old)
    assert says in report["champion"]["unusable"]
    assert "champion_auc" not in result.metrics
    assert house.gate(evaluation).verdict == "promote"


def test_a_candidate_that_lacks_a_column_ends_64(house: House) -> None:
    features = house.features(rows())
    with pytest.raises(DataError, match="the features lack gone"):
        house.evaluate(house.candidate(linear({"gone": 1.0}), [features]), [features])


def test_one_class_in_the_holdout_is_said_and_left_out(house: House) -> None:
    columns = rows()
    columns["label"] = np.where(np.arange(4000) < 2000, columns["label"], 0.0)
    features = house.features(columns)
    result, manifest, report = house.evaluate(house.candidate(linear(MODEL), [features]), [features])
    assert report["metrics"]["candidate"]["auc"] is None
    assert "auc" not in result.metrics
    assert all(math.isfinite(v) for v in result.metrics.values())
    assert result.reasons == [
        "not defined on the 2,000 holdout rows (the labels are all the same): auc, average_precision"
    ]
    assert house.gate(manifest).verdict == "kept"


def test_unlabelled_rows_are_left_out_and_none_left_ends_64(house: House) -> None:
    columns = rows()
    labels = [None if i % 2 else v for i, v in enumerate(columns["label"].tolist())]
    some = house.features({**columns, "label": labels})
    _, _, report = house.evaluate(house.candidate(linear(MODEL), [some]), [some])
    assert report["rows"]["count"] == 1000
    none = house.features({**columns, "label": pa.nulls(4000, pa.float64())}, address="f2")
    with pytest.raises(DataError, match="nothing to evaluate on"):
        house.evaluate(house.candidate(linear(MODEL), [none], "c2"), [none], address="e2")


def test_a_sample_takes_the_same_keys_as_training_does(house: House) -> None:
    features = house.features(rows())
    _, manifest, report = house.evaluate(house.candidate(linear(MODEL), [features]), [features], sample=0.5)
    assert 900 < report["rows"]["count"] < 1100
    assert predictions(house, manifest).num_rows == report["rows"]["count"]


def test_rows_of_every_partition_count(house: House) -> None:
    columns = rows()
    first, second = (
        house.features({k: v[part] for k, v in columns.items()}, key, key.replace("-", ""))
        for part, key in ((slice(0, 3000), "2013-01"), (slice(3000, 4000), "2013-02"))
    )
    _, _, report = house.evaluate(house.candidate(linear(MODEL), [first, second]), [first, second])
    assert report["rows"]["count"] == 2000
    assert report["rows"]["first"] == HOLDOUT.isoformat()


def test_another_label_than_0_or_1_ends_64(house: House) -> None:
    features = house.features({**rows(), "label": np.full(4000, 2.0)})
    with pytest.raises(DataError, match="a binary label is 0 or 1"):
        house.evaluate(house.candidate(linear(MODEL), [features]), [features])


def test_a_disparity_by_an_unknown_column_ends_64(tmp_path: Path) -> None:
    house = House(tmp_path, gate="{disparity: {by: _grop, max: 0.5}}")
    features = house.features(rows())
    with pytest.raises(DataError, match="did you mean '_group'"):
        house.evaluate(house.candidate(linear(MODEL), [features]), [features])


def test_a_spec_that_changed_its_task_ends_64(tmp_path: Path) -> None:
    house = House(tmp_path, task="regression")
    features = house.features(rows())
    with pytest.raises(UserError, match=r"trained for binary, spec\.yaml says regression"):
        house.evaluate(house.candidate(linear(MODEL), [features]), [features])


def test_a_file_that_is_no_model_ends_64(house: House) -> None:
    features = house.features(rows())
    with pytest.raises(UserError, match="not a model that onnxruntime can load"):
        house.evaluate(house.candidate((b"nonsense", linear(MODEL)[1]), [features]), [features])


def test_a_regression(tmp_path: Path) -> None:
    house = House(tmp_path, task="regression", gate="{rmse: {max: 2}, disparity: {by: _group, max: 0.5}}")
    columns = rows()
    noise = np.random.default_rng(4).normal(size=4000)
    features = house.features({**columns, "label": columns["a"] + columns["b"] + noise})
    candidate = house.candidate(linear(MODEL, task="regression", categories=["c"]), [features])
    champion = house.candidate(linear({"a": 1.0}, task="regression"), [features], "c0")
    result, manifest, report = house.evaluate(candidate, [features], champion)
    assert result.metrics["rmse"] == pytest.approx(np.sqrt((noise[2000:] ** 2).mean()), abs=1e-5)
    assert result.metrics["champion_low"] > 0
    assert report["disparity"]["what"] == "mean error"
    assert report["best_single_feature"]["metric"] == "r2"
    assert set(result.links) == {"Curves", "Predicted-actual", "Slices"}
    assert house.gate(manifest).verdict == "promote"


def test_a_multiclass_with_a_class_that_only_one_model_knows(tmp_path: Path) -> None:
    house = House(tmp_path, task="multiclass")
    columns = rows()
    score = columns["a"] + columns["b"] + np.random.default_rng(4).gumbel(size=4000)
    labels = np.array(["x", "y", "z"], dtype=object)[np.digitize(score, [-1.0, 1.0])]
    labels[-1] = "new"
    features = house.features({**columns, "label": labels})
    candidate = house.candidate(linear(MODEL, task="multiclass", classes=("x", "y", "z")), [features])
    champion = house.candidate(linear({"a": 0.1}, task="multiclass", classes=("old", "x", "y")), [features], "c0")
    result, manifest, report = house.evaluate(candidate, [features], champion)
    assert report["rows"]["classes"] == ["x", "y", "z", "old", "new"]
    p = np.array(predictions(house, manifest)["candidate"].to_pylist())
    truth = labels[2000:]
    known = {"x": 0, "y": 1, "z": 2}
    right = [known.get(label) == k for label, k in zip(truth, p.argmax(axis=1), strict=True)]
    assert result.metrics["accuracy"] == np.mean(right)
    eps = float(np.finfo(np.float32).eps)
    losses = [-np.log(max(q[known[t]] if t in known else 0.0, eps)) for t, q in zip(truth, p, strict=True)]
    assert result.metrics["log_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.metrics["champion_delta"] > 0
    assert "Confusion" in result.links
    best = report["best_single_feature"]
    assert best["name"] in ("a", "b") and best["metric"] == "accuracy"
    assert best["chance"] == max(np.mean(truth == k) for k in "xyz") < best["value"] < 0.75
