"""The second project (regression, by the day) is monitored by the same contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from loop import NEXT, PROJECT, Loop

pytestmark = pytest.mark.slow


def test_a_regression_by_the_day_is_held_to_its_promise(loop: Loop) -> None:
    if loop.ledger.champion(PROJECT) is None:
        loop.data()
        loop.release()
    loop.data((NEXT,))
    loop.run("score", NEXT)
    said = loop.run("monitor", NEXT)
    health = loop.manifest("health", NEXT)
    document = json.loads(Path(loop.store.full(health.uri("health.json"))).read_text())
    told, performance = health.result["metrics"], document["performance"]
    assert health.result["verdict"] in ("none", "watch") and f"monitor {NEXT}" in said
    assert performance["metric"] == "rmse" and performance["observed"]["units"] == f"{performance['rows']:,} rows"
    assert told["observed"] == pytest.approx(performance["metrics"]["rmse"])
    assert told["loss"] == pytest.approx(told["observed"] - told["promised"])  # lower is better
    assert told["loss_low"] < told["loss"] < told["loss_high"]
    assert told["rows"] > 0 and told["labelled"] > 0.9 and told["quarantine"] >= 0
    assert {"prediction_psi", "prediction_js", "features_drifted", "worst_feature_psi"} <= told.keys()
    decision = loop.ledger.find(PROJECT, "decision", phase="done")[-1]
    assert decision.payload["verb"] == "monitor" and decision.payload["verdict"] == health.result["verdict"]
    assert "skipped, unchanged" in loop.run("monitor", NEXT)
    shown = loop.orrery("ledger", PROJECT)
    assert f"decision monitor {NEXT}: {health.result['verdict']}" in shown and health.result["reasons"][0][:60] in shown
