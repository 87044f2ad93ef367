"""`monitor`, through the engine, on planted months of a model whose quality is known."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import House, linear, rows

from orrery.contract import Result
from orrery.data.tables import write_parquet
from orrery.errors import UserError
from orrery.evaluation import metrics
from orrery.store import Manifest
from orrery.training.schema import Schema

MODEL = {"a": 1.0, "b": 1.0}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


class World:
    """A promoted model and its evaluation; months are scored by it and monitored in order."""

    def __init__(self, root: Path, task: str = "binary", model: tuple[bytes, Schema] | None = None,
                 train: dict[str, Any] | None = None) -> None:  # fmt: skip
        self.house = House(root, task=task)
        self.train = self.house.features(train or rows())
        self.model = self.house.candidate(model or linear(MODEL, categories=["c"]), [self.train])
        _, self.evaluation, self.report = self.house.evaluate(self.model, [self.train])
        self.health: list[Manifest] = []

    def features(self, columns: dict[str, Any], key: str, address: str = "") -> Manifest:
        return self.house.features(columns, key, address or f"f{key}")

    def scores(
        self, features: Manifest, key: str, prediction: Any = None, version: str = "1", address: str = ""
    ) -> Manifest:
        """Commit what score would have: the model's predictions, in two parts."""
        table = pq.read_table(self.house.store.full(features.uri("features.parquet")))
        if prediction is None:
            prediction = pa.array(sigmoid(table["a"].to_numpy() + table["b"].to_numpy()), pa.float32())
        told, half = pa.table({"key": table["key"], "prediction": prediction}), table.num_rows // 2
        files = {"report.json": json.dumps({"model_version": version}).encode()}
        for i, part in enumerate((told.slice(0, half), told.slice(half))):
            write_parquet(part, self.house.root / "part.parquet")
            files[f"part-{i:05d}.parquet"] = (self.house.root / "part.parquet").read_bytes()
        inputs = {"features": (features.ref,), "model": (self.model.ref,)}
        return self.house.commit("score", address or f"s{key}{version}", files, key=key, inputs=inputs)

    def monitor(self, key: str, features: Manifest, scores: Manifest, *, address: str = "", sample: float = 1.0,
                evaluation: Manifest | None = None, history: Sequence[Manifest] | None = None,
                quarantined: int = 0) -> tuple[Result, dict[str, Any]]:  # fmt: skip
        counted = {"rows_rows": 1000.0 - quarantined, "quarantined_rows": float(quarantined)}
        clean = self.house.commit("validate", f"v{key}{address}", {}, key=key, result={"metrics": counted})
        inputs = {"scores": [scores], "features": [features], "model": [self.model], "clean": [clean],
                  "evaluation": [evaluation or self.evaluation],
                  "history": self.health if history is None else history}  # fmt: skip
        result = self.house.run("monitor", inputs, None, address or f"m{key}", key=key, sample=sample)
        manifest = self.house.store.manifest(str(result.output))
        assert manifest is not None
        self.health.append(manifest)
        return result, self.house.store.read_json(manifest.uri("health.json"))

    def month(self, key: str, columns: dict[str, Any], **options: Any) -> tuple[Result, dict[str, Any]]:
        features = self.features(columns, key)
        return self.monitor(key, features, self.scores(features, key), **options)


def month(number: int, n: int = 4000, seed: int | None = None) -> dict[str, Any]:
    return rows(n, seed=number if seed is None else seed, start=datetime(2013, number, 1, tzinfo=UTC))


def broken(number: int, share: float = 0.7, n: int = 4000) -> dict[str, Any]:
    """A month whose labels have less to do with the features than they had."""
    columns, rng = month(number, n), np.random.default_rng(number + 100)
    other = rng.permutation(columns["label"])
    columns["label"] = np.where(rng.random(n) < share, other, columns["label"])
    return columns


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_month_like_the_promise(world: World) -> None:
    columns = month(4)
    result, health = world.month("2013-04", columns)
    told, promise = result.metrics, world.report["promise"]["candidate"]
    assert result.verdict == "none"
    assert told["observed"] == pytest.approx(metrics.auc(columns["label"], columns["a"] + columns["b"]), abs=1e-4)
    assert told["promised"] == promise["value"]
    assert told["promised_low"] == pytest.approx(promise["low"])
    assert told["promised_high"] == pytest.approx(promise["high"])
    assert told["loss"] == pytest.approx(promise["value"] - told["observed"])
    assert told["loss_low"] < told["loss"] < told["loss_high"] and told["loss_low"] < 0
    assert told["observed_low"] < told["observed"] < told["observed_high"]
    wider = (told["loss_high"] - told["loss"]) / 2
    assert wider > (told["observed_high"] - told["observed"]) / 2  # both errors are in it
    assert (told["rows"], told["labelled"], told["quarantine"], told["features_drifted"]) == (4000.0, 1.0, 0.0, 0.0)
    assert told["prediction_psi"] < 0.05 and told["worst_feature_psi"] < 0.05 and told["prediction_js"] < 0.1
    assert result.facts["model_version"] == "1" and result.facts["primary"] == "auc"
    assert result.facts["units"] == "84 days" and result.facts["policy"]["persistence"] == 2
    assert health["seen"]["verdict"] == health["verdict"] == "none"
    assert health["performance"]["metrics"]["brier"] == pytest.approx(
        metrics.brier(columns["label"], sigmoid(columns["a"] + columns["b"])), abs=1e-6
    )
    by_slice = {(s["column"], s["of"]): s for s in health["performance"]["slices"]}
    v = columns["c"] == "v"
    assert by_slice["c", "v"]["value"] == pytest.approx(
        metrics.auc(columns["label"][v], (columns["a"] + columns["b"])[v]), abs=1e-4
    )
    assert by_slice["c", "v"]["loss"]["value"] == pytest.approx(
        promise["slices"]["c"]["v"]["value"] - by_slice["c", "v"]["value"]
    )


def test_two_bad_months_ask_once_and_then_it_is_quiet(world: World) -> None:
    words = [world.month("2013-04", month(4))[0].verdict]
    for number in range(5, 11):
        result, health = world.month(f"2013-{number:02d}", broken(number))
        words.append(result.verdict)
    assert words == ["none", "watch", "retrain", "watch", "watch", "watch", "retrain"]
    assert (
        "the verdict on 2013-06 was retrain already"
        in world.house.store.read_json(world.health[4].uri("health.json"))["reasons"][0]
    )
    assert health["history"] == [f"2013-{n:02d}" for n in range(9, 3, -1)]
    assert result.reasons[0].startswith("retrain: auc is 0.")
    assert "over 2013-09 to 2013-10" in result.reasons[0]


def test_another_version_in_between_starts_anew(world: World) -> None:
    world.month("2013-05", broken(5))
    features = world.features(broken(6), "2013-06")
    result, _ = world.monitor("2013-06", features, world.scores(features, "2013-06", version="2"))
    assert result.verdict == "watch"


def test_a_gap_in_the_partitions_ends_a_row(world: World) -> None:
    world.month("2013-05", broken(5))
    assert world.month("2013-07", broken(7))[0].verdict == "watch"
    assert world.month("2013-08", broken(8))[0].verdict == "retrain"


def test_weather_that_moved_is_told_and_asks_for_nothing(world: World) -> None:
    """Every feature far from training, month after month, and the model as good as it promised."""
    for number in range(4, 8):
        columns = month(number)
        columns["noise"] = columns["noise"] + 3
        columns["c"] = np.full(4000, "w")
        result, health = world.month(f"2013-{number:02d}", columns)
        assert result.verdict == "none", result.reasons
    # The model does not look at noise: what it was trained with is what is compared.
    assert [d["name"] for d in health["drift"]["features"] if d["drifted"]] == ["c"]
    assert "features that have moved: c; by itself no reason to train again" in result.reasons


def test_predictions_that_moved_while_labels_are_missing(world: World) -> None:
    words = []
    for number in range(4, 7):
        columns = month(number)
        columns["a"] = columns["a"] + 1.5
        columns["label"] = np.where(np.arange(4000) < 3000, np.nan, columns["label"])
        result, health = world.month(f"2013-{number:02d}", columns)
        words.append(result.verdict)
    assert words == ["watch", "retrain", "watch"]
    assert result.metrics["labelled"] == 0.25 and result.metrics["prediction_psi"] > 0.2
    assert any("75.0% of the scored rows have no label" in r for r in result.reasons)
    assert health["performance"]["rows"] == 1000 and "observed" in result.metrics  # told, but no verdict


def test_a_feature_without_values_is_for_a_person(world: World) -> None:
    columns = month(4)
    columns["a"] = np.where(np.arange(4000) % 10 < 8, np.nan, columns["a"])
    features = world.features(columns, "2013-04")
    prediction = pa.array(sigmoid(np.nan_to_num(columns["a"]) + columns["b"]), pa.float32())
    result, _ = world.monitor("2013-04", features, world.scores(features, "2013-04", prediction))
    assert result.verdict == "watch" and result.metrics["features_stale"] == 1
    few = month(4)
    few["b"] = np.where(np.arange(4000) % 100 < 7, np.nan, few["b"])
    features = world.features(few, "2013-05")
    prediction = pa.array(sigmoid(few["a"] + np.nan_to_num(few["b"])), pa.float32())
    told, _ = world.monitor("2013-05", features, world.scores(features, "2013-05", prediction), history=[])
    assert told.verdict == "none"
    assert "values are missing more often than in training: b" in told.reasons


def test_what_landed_again_since_scoring_is_joined_by_key(world: World) -> None:
    columns = month(4)
    features = world.features(columns, "2013-04")
    scores = world.scores(features, "2013-04")
    order = np.random.default_rng(0).permutation(4000)[:3990]
    again = {
        n: pa.array(v).take(pa.array(order)) if isinstance(v, (list, pa.Array)) else v[order]
        for n, v in columns.items()
    }
    new = pa.concat_tables([pa.table(again), pa.table({**again, "key": [f"n{i}" for i in range(3990)]}).slice(0, 7)])
    landed = world.features({n: new[n] for n in new.column_names}, "2013-04", "again")
    one, _ = world.monitor("2013-04", features, scores)
    two, health = world.monitor("2013-04", landed, scores, address="m2", history=[])
    assert health["rows"] == {"scored": 4000, "labelled": 3990, "gone": 10, "unscored": 7, "unpredicted": 0}
    kept = np.sort(order)
    expected = metrics.auc(columns["label"][kept], (columns["a"] + columns["b"])[kept])
    assert two.metrics["observed"] == pytest.approx(expected, abs=1e-4)
    assert any("10 scored rows are gone, 7 were not scored" in r for r in two.reasons)
    assert not any("landed again" in r for r in one.reasons)


def test_rows_without_a_prediction_and_rows_in_quarantine(world: World) -> None:
    columns = month(4)
    features = world.features(columns, "2013-04")
    values = pa.array(sigmoid(columns["a"] + columns["b"]), pa.float32(), mask=np.arange(4000) < 100)
    scores = world.scores(features, "2013-04", values)
    result, health = world.monitor("2013-04", features, scores, quarantined=30)
    assert health["performance"]["rows"] == 3900 and health["rows"]["unpredicted"] == 100
    assert result.metrics["quarantine"] == 0.03 and result.metrics["rows"] == 4000
    assert "3.0% of rows are in quarantine; at most 2.0% should" in result.reasons
    assert "100 of 4,000 rows have no prediction" in result.reasons


def test_a_slice_that_broke_is_named(world: World) -> None:
    columns = month(4, 8000)
    rng, v = np.random.default_rng(0), columns["c"] == "v"
    columns["label"][v] = rng.permutation(columns["label"][v])
    result, _ = world.month("2013-04", columns)
    said = [r for r in result.reasons if r.startswith("auc of c v")]
    assert len(said) == 1 and "worse than promised" in said[0]
    assert not any(r.startswith(("auc of c u", "auc of c w")) for r in result.reasons)


def test_probabilities_that_are_off_are_told_although_the_ranking_holds(world: World) -> None:
    columns = month(4)
    features = world.features(columns, "2013-04")
    low = pa.array(sigmoid(columns["a"] + columns["b"] - 2), pa.float32())
    result, health = world.monitor("2013-04", features, world.scores(features, "2013-04", low))
    off = columns["label"].mean() - sigmoid(columns["a"] + columns["b"] - 2).mean()
    assert health["performance"]["bias"]["value"] == pytest.approx(off, abs=1e-5)
    assert result.verdict == "none" and off > 0.05
    said = f"late predicted on average, {columns['label'].mean():.1%} came: probabilities are off"
    assert any(said in r for r in result.reasons), result.reasons


@pytest.mark.parametrize("label", [np.zeros(4000), np.full(4000, np.nan), pa.nulls(4000)])
def test_a_month_of_one_class_or_of_none(world: World, label: np.ndarray) -> None:
    columns = month(4)
    columns["label"] = label
    result, health = world.month("2013-04", columns)
    assert result.verdict == "none" and "observed" not in result.metrics and "loss" not in result.metrics
    assert result.reasons[0].startswith("no verdict on auc: ")
    assert health["performance"]["observed"] is None and health["performance"]["slices"] == []
    json.dumps(health, allow_nan=False)


def test_a_partition_without_a_row(world: World) -> None:
    whole = pa.table(month(4))
    features = world.features({n: whole[n].slice(0, 0) for n in whole.column_names}, "2013-04")
    result, health = world.monitor("2013-04", features, world.scores(features, "2013-04", pa.array([], pa.float32())))
    assert result.verdict == "none" and result.metrics["rows"] == 0 and result.metrics["labelled"] == 0
    json.dumps(health, allow_nan=False)


def test_a_champion_is_not_held_to_a_challengers_promise(world: World) -> None:
    other = world.house.candidate(linear({"a": 1.0}), [world.train], "c9")
    _, evaluation, _ = world.house.evaluate(other, [world.train], world.model, address="e9")
    features = world.features(month(4), "2013-04")
    with pytest.raises(UserError, match="is not that of the model that scored"):
        world.monitor("2013-04", features, world.scores(features, "2013-04"), evaluation=evaluation)


def test_an_evaluation_of_an_earlier_version_without_promise_and_reference(world: World) -> None:
    report = {k: v for k, v in world.report.items() if k != "promise"}
    old = world.house.commit("evaluate", "e0", {"report.json": json.dumps(report).encode()},
                             inputs={"candidate": (world.model.ref,)})  # fmt: skip
    features = world.features(broken(4), "2013-04")
    result, health = world.monitor("2013-04", features, world.scores(features, "2013-04"), evaluation=old)
    assert result.verdict == "none" and health["drift"] is None and "promised" not in result.metrics
    assert result.reasons[0] == "no verdict on auc: the model came without a promise (its evaluation holds none)"
    assert any("drift was not computed" in r for r in result.reasons)


def test_lower_is_better_for_a_regression(tmp_path: Path) -> None:
    def values(columns: dict[str, Any], noise: float, seed: int) -> dict[str, Any]:
        n = len(columns["a"])
        columns["label"] = columns["a"] + columns["b"] + noise * np.random.default_rng(seed).normal(size=n)
        return columns

    model = linear(MODEL, categories=["c"], task="regression")
    world = World(tmp_path, "regression", model, values(rows(), 1.0, 0))
    words, losses = [], []
    for number, noise in ((4, 1.0), (5, 1.3), (6, 1.3), (7, 0.5)):
        columns = values(month(number), noise, number)
        features = world.features(columns, f"2013-{number:02d}")
        scores = world.scores(features, f"2013-{number:02d}", pa.array(columns["a"] + columns["b"], pa.float32()))
        result, health = world.monitor(f"2013-{number:02d}", features, scores)
        words.append(result.verdict)
        losses.append(result.metrics["loss"])
    assert words == ["none", "watch", "retrain", "none"]
    assert losses[1] == pytest.approx(0.3, abs=0.06) and losses[3] == pytest.approx(-0.5, abs=0.06)
    assert health["performance"]["mean_label"] == pytest.approx(0, abs=0.2)


def test_multiclass_with_a_class_that_the_model_does_not_know(tmp_path: Path) -> None:
    def classed(columns: dict[str, Any], seed: int) -> dict[str, Any]:
        z = columns["a"] + columns["b"] + np.random.default_rng(seed).normal(size=len(columns["a"]))
        columns["label"] = np.select([z < -0.5, z < 0.5], ["x", "y"], "z").astype(object)
        return columns

    world = World(tmp_path, "multiclass", linear(MODEL, task="multiclass", classes=("x", "y", "z")), classed(rows(), 0))
    columns = classed(month(4), 1)
    columns["label"][:40] = "new"
    features = world.features(columns, "2013-04")
    score = np.outer(columns["a"] + columns["b"], [0, 1, 2])
    p = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    prediction = pa.array(list(p.astype(np.float32)), pa.list_(pa.float32()))
    result, health = world.monitor("2013-04", features, world.scores(features, "2013-04", prediction))
    y = np.array([{"x": 0, "y": 1, "z": 2, "new": 3}[v] for v in columns["label"]])
    assert result.metrics["observed"] == pytest.approx(
        metrics.multiclass_log_loss(y, np.pad(p, ((0, 0), (0, 1)))), rel=1e-4
    )
    assert result.metrics["loss"] == pytest.approx(result.metrics["observed"] - result.metrics["promised"])
    assert result.metrics["loss"] > 0 and health["performance"]["mean_label"] is None


def test_a_sample_is_the_same_rows_on_both_sides(world: World) -> None:
    features = world.features(month(4), "2013-04")
    result, health = world.monitor("2013-04", features, world.scores(features, "2013-04"), sample=0.5)
    assert 1800 < result.metrics["rows"] < 2200 and health["rows"]["gone"] == health["rows"]["unscored"] == 0
    assert health["drift"]["rows"] == result.metrics["rows"]


def test_the_digest_holds_what_follows_from_the_inputs_only(world: World) -> None:
    features = world.features(month(4), "2013-04")
    scores = world.scores(features, "2013-04")
    one, _ = world.monitor("2013-04", features, scores)
    two, _ = world.monitor("2013-04", features, scores, address="m2", history=[])
    assert one.digest == two.digest


def test_the_page_is_whole_and_nothing_from_data_gets_through(world: World) -> None:
    world.month("2013-04", month(4))
    columns = month(5)
    columns["c"] = np.where(np.arange(4000) % 4 == 0, "<script>alert(1)</script>", columns["c"])
    result, _ = world.month("2013-05", columns)
    page = world.house.store.read(result.links["Health"]).decode()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == page.count("</svg>") == 2
    assert page.count("<circle") == 2 and "2013-04" in page and "2013-05" in page
    assert "http" not in page
