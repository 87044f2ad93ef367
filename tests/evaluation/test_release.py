"""Planted models through evaluate and gate: a better one is released; a worse, shuffled or leaked one is not."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from planted import HOLDOUT, House, linear, rows

from orrery.contract import Result
from orrery.errors import UserError
from orrery.evaluation.exported import Exported, Latency
from orrery.evaluation.holdout import labelled
from orrery.evaluation.leaks import best_single_feature

GATE = "{auc: {min: 0.6}, p99_ms: {max: 50}, disparity: {by: _group, max: 0.5}}"
GOOD, POOR = {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.1}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path, gate=GATE)


def release(
    house: House,
    model: dict[str, float],
    champion: dict[str, float] | None = None,
    columns: dict[str, object] | None = None,
) -> Result:
    features = house.features(columns or rows())
    old = house.candidate(linear(champion), [features], "c0", key="2012-12..2012-12") if champion else None
    _, evaluation, _ = house.evaluate(house.candidate(linear(model), [features]), [features], old)
    return house.gate(evaluation)


def test_the_first_good_candidate_is_promoted(house: House) -> None:
    result = release(house, GOOD)
    assert result.verdict == "promote"
    assert "no champion yet" in result.reasons


def test_a_better_candidate_is_promoted_and_the_same_two_swapped_are_not(house: House, tmp_path: Path) -> None:
    assert release(house, GOOD, POOR).verdict == "promote"
    swapped = release(House(tmp_path / "swapped", gate=GATE), POOR, GOOD)
    assert swapped.verdict == "kept"
    assert swapped.reasons[0].startswith("not better than the champion of 2012-12..2012-12: auc better by -")


def test_the_same_model_again_is_kept(house: House) -> None:
    result = release(house, GOOD, GOOD)
    assert result.verdict == "kept"
    assert "+0.0000 … +0.0000" in result.reasons[0]


def test_a_difference_within_noise_is_kept(house: House) -> None:
    assert release(house, {"a": 1.0, "b": 1.005}, GOOD).verdict == "kept"


@pytest.mark.parametrize(("hours", "share", "verdict"), [(-100, 0.0, "promote"), (5, 0.005, "promote"),
                                                         (250, 0.25, "kept"), (2000, 1.0, "kept")])  # fmt: skip
def test_a_champion_that_was_fitted_on_these_rows_or_later_ones_is_no_rival(
    house: House, hours: int, share: float, verdict: str
) -> None:
    """An older window retrained by hand: the champion's error on these rows is that of its training."""
    features = house.features(rows())
    champion = house.candidate(linear(POOR), [features], "c0", key="w0", holdout=HOLDOUT + timedelta(hours=hours))
    _, evaluation, report = house.evaluate(house.candidate(linear(GOOD), [features]), [features], champion)
    assert report["champion"]["seen"] == share
    result = house.gate(evaluation)
    assert result.verdict == verdict
    if verdict == "kept":
        assert result.reasons[0].startswith("the champion of w0 has seen these rows or comes after them: ")
        assert result.reasons[0].endswith("ask for a later window")


def test_shuffled_labels_are_kept(house: House) -> None:
    columns = rows()
    columns["label"] = np.random.default_rng(9).permutation(columns["label"])
    result = release(house, GOOD, columns=columns)
    assert result.verdict == "kept"
    assert {r.split(" ")[0] for r in result.reasons[:2]} == {"auc", "not"}


def test_a_feature_that_is_the_label_is_kept(house: House) -> None:
    columns = rows()
    columns["leak"] = columns["label"] + np.random.default_rng(1).normal(scale=0.05, size=4000)
    result = release(house, GOOD | {"leak": 20.0}, POOR, columns)
    assert result.verdict == "kept"
    assert result.reasons[0].startswith("too good to be true")
    assert any("leak alone reaches auc" in r for r in result.reasons)


def test_a_feature_that_nearly_tells_the_label_is_kept(house: House) -> None:
    """As the departure delay does in the flights: AUC 0.92 alone, far from perfect, and still a leak."""
    columns = rows()
    columns["leak"] = columns["label"] + np.random.default_rng(1).normal(scale=0.5, size=4000)
    result = release(house, {"a": 0.2, "leak": 5.0}, POOR, columns)
    assert result.verdict == "kept"
    assert result.reasons[0].startswith("leak alone reaches auc 0.9")


def test_a_leak_by_absence_is_seen() -> None:
    """A column that is filled in only after the fact tells the label by being there at all."""
    columns = rows()
    columns["late"] = np.where(columns["label"] > 0, np.nan, columns["noise"])
    _, schema = linear({"a": 1.0, "late": 1.0})
    best = best_single_feature(labelled(pa.table(columns), "binary"), schema, "binary")
    assert best == {"name": "late", "metric": "auc", "value": 1.0, "chance": 0.5}


CLASSES = ("x", "y", "z")


def three_classes() -> tuple[dict[str, object], np.ndarray]:
    """Rows whose label is one of three classes by a + b and noise; and the classes as 0, 1, 2."""
    columns = rows()
    score = columns["a"] + columns["b"] + np.random.default_rng(4).normal(size=4000)
    code = np.digitize(score, [-1.0, 1.0])
    return {**columns, "label": np.array(CLASSES)[code]}, code


@pytest.mark.parametrize("feature", ["leak", "leaked_category", "id", "noise"])
def test_a_leak_into_one_feature_of_a_multiclass_is_kept_and_honest_ones_are_not(tmp_path: Path, feature: str) -> None:
    columns, code = three_classes()
    columns["leak"] = code + np.random.default_rng(1).normal(scale=0.3, size=4000)
    columns["leaked_category"] = np.array(["u", "v", "w"])[code]
    columns["id"] = columns["key"]
    house = House(tmp_path, task="multiclass")
    features = house.features(columns)
    numeric = {"a": 1.0, "b": 1.0} | ({"leak": 9.0} if feature == "leak" else {"noise": 0.0})
    graph, schema = linear(numeric, categories=["c"], task="multiclass", classes=CLASSES, bias=0.0)
    if feature in columns and feature not in numeric:
        schema = schema.model_copy(update={"vocabularies": {feature: ("u", "v", "w")}})
    _, evaluation, report = house.evaluate(house.candidate((graph, schema), [features]), [features])
    alone = [r for r in house.gate(evaluation).reasons if r.startswith(f"{feature} alone reaches accuracy")]
    checks = house.gate(evaluation, "v2").facts["checks"]
    (check,) = [c for c in checks if c["name"] == "leak_by_one_feature"]
    assert check["passed"] == (not feature.startswith("leak"))
    assert bool(alone) == feature.startswith("leak")
    assert 0.4 < report["best_single_feature"]["chance"] < 0.6


def test_the_verdicts_digest_does_not_depend_on_the_latency(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([Latency(1.0, 2.0), Latency(3.0, 4.0)])
    monkeypatch.setattr(Exported, "latency", lambda self, table: next(measured))
    features = house.features(rows())
    candidate = house.candidate(linear(GOOD), [features])
    one, first, _ = house.evaluate(candidate, [features])
    two, second, _ = house.evaluate(candidate, [features], address="e2")
    assert (one.metrics["p99_ms"], two.metrics["p99_ms"]) == (2.0, 4.0)
    verdicts = [house.gate(first), house.gate(second, "v2")]
    assert verdicts[0].digest == verdicts[1].digest
    assert any(r.startswith("p99_ms ") and "≤ 50" in r for r in verdicts[0].reasons)


def test_a_latency_above_its_bound_keeps_the_champion_and_its_value_is_in_the_reasons(tmp_path: Path) -> None:
    house = House(tmp_path, gate="{p99_ms: {max: 0.000001}}")
    result = release(house, GOOD)
    assert result.verdict == "kept"
    assert "is above 1e-06" in result.reasons[0]
    manifest = house.store.manifest(str(result.output))
    assert manifest is not None
    checks = house.store.read_json(manifest.uri("verdict.json"))["checks"]
    (latency,) = [c for c in checks if c["name"] == "p99_ms:max"]
    assert (latency["value"], latency["passed"]) == (None, False)
    assert latency["reason"] == "p99_ms breaks its bound 1e-06"


def test_a_report_of_an_older_version_ends_64(house: House) -> None:
    report = b'{"primary": "auc", "metrics": {"candidate": {"auc": 0.7}}, "comparisons": {}}'
    with pytest.raises(UserError, match=r"report\.json of the evaluation .* has no 'bootstrap'"):
        house.gate(house.commit("evaluate", "old", {"report.json": report}))


def test_the_gate_needs_no_numbers_library() -> None:
    code = "import sys, orrery.evaluation.gate; print({'numpy', 'pyarrow', 'onnxruntime'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
