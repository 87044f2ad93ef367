"""Grafana's board and Prometheus' alerts of the service: each metric, label and value that they ask for is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from orrery.serving.metrics import OUTCOMES, STAGES, Metrics

ROOT = Path(__file__).resolve().parents[2]
PREFIX = r"\b(?:orrery_serve|process)_[a-z0-9_]+"
# What a label may say, where the service knows all of it.
VALUES = {"outcome": set(OUTCOMES), "stage": set(STAGES), "status": {str(n) for n in range(400, 600)}, "job": {"serve"}}


def expressions() -> list[str]:
    board = json.loads((ROOT / "docker/grafana/dashboards/serve.json").read_text())
    found = [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]
    groups = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())["groups"]
    return found + [rule["expr"] for g in groups if g["name"] == "serve" for rule in g["rules"]]


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """Return the labels of each series, of metrics in which everything has happened once."""
    m = Metrics("notes")
    m.generation.labels("notes", "g", "1", "e", "true").set(1)
    for metric, value in ((m.degraded, "down"), (m.refused, "503"), (m.feedback, "up"), (m.queued, "search")):
        metric.labels(value)
    families = text_string_to_metric_families(m.text().decode())
    return {sample.name: {*sample.labels, "instance", "job"} for family in families for sample in family.samples}


def test_every_metric_that_is_asked_for_is_there(labels: dict[str, set[str]]) -> None:
    asked = {name for e in expressions() for name in re.findall(PREFIX, e)}
    assert len(asked) > 15
    assert asked <= set(labels), asked - set(labels)


@pytest.mark.parametrize("expression", expressions())
def test_labels_and_their_values_are_those_of_the_metric(labels: dict[str, set[str]], expression: str) -> None:
    names = set(re.findall(PREFIX, expression))
    had = set().union(*(labels[n] for n in names)) if names else {"job", "instance"}
    for grouped in re.findall(r"by \(([a-z_, ]+)\)", expression):
        assert set(grouped.split(", ")) <= had
    for label, value in re.findall(r'(\w+)=~?"([^"]+)"', expression):
        assert label in had
        assert set(value.split("|")) <= VALUES[label]


def test_the_board_has_a_place_for_each_panel_and_a_name() -> None:
    panels = json.loads((ROOT / "docker/grafana/dashboards/serve.json").read_text())["panels"]
    assert len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
