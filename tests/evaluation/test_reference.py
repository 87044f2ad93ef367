"""`reference.json` of an evaluation: what the model was trained on and predicted, in bins."""

from pathlib import Path

import numpy as np
import pytest
from planted import House, linear, rows

from orrery.evaluation import reference
from orrery.evaluation.reference import Reference
from orrery.store import Manifest


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def kept(house: House, manifest: Manifest) -> Reference:
    return reference.read(Path(house.store.full(manifest.uri("reference.json"))))


def test_it_counts_the_whole_window_and_the_candidates_holdout(house: House) -> None:
    first, second = rows(), rows(3000, seed=1)
    second["a"][:300] = np.nan
    second["c"][:30] = "rare"
    window = [house.features(first), house.features(second, key="2013-02", address="f2")]
    candidate = house.candidate(linear({"a": 1.0, "b": 1.0}, categories=["c"]), window)
    _, manifest, report = house.evaluate(candidate, window)
    made = kept(house, manifest)
    assert made.window == "2013-01..2013-01"
    assert set(made.features.bins) == {"a", "b", "c"}  # what the model reads, and not `noise`
    assert made.features.rows == 7000  # labels or not, before the holdout or in it
    assert made.features.nulls("a") == 300
    assert made.features.unseen("c") == 30
    texts = [*first["c"], *second["c"]]
    assert made.features.counts["c"][:3] == tuple(texts.count(v) for v in "uvw")
    deciles = made.features.of("a")[:10]
    assert deciles == pytest.approx(670, abs=1)
    assert made.predictions.rows == report["rows"]["count"] == 3500
    assert made.predictions.of("prediction")[:10] == pytest.approx(350, abs=1)


def test_the_candidate_is_meant_and_not_the_champion(house: House) -> None:
    features = house.features(rows())
    sure = house.candidate(linear({"a": 5.0}), [features])
    dull = house.candidate(linear({"a": 0.1}), [features], "c0")
    _, one, _ = house.evaluate(sure, [features], dull)
    _, other, _ = house.evaluate(dull, [features], sure, address="e2")
    _, alone, _ = house.evaluate(sure, [features], address="e3")
    edges = [kept(house, m).to_dict()["predictions"]["columns"]["prediction"]["edges"] for m in (one, other, alone)]
    assert edges[0][-1] > 0.99
    assert edges[1][-1] < 0.6
    assert edges[0] == edges[2]


def test_a_sample_counts_the_rows_that_were_trained_on(house: House) -> None:
    features = house.features(rows())
    candidate = house.candidate(linear({"a": 1.0}), [features])
    _, manifest, report = house.evaluate(candidate, [features], sample=0.5)
    made = kept(house, manifest)
    assert 1800 < made.features.rows < 2200
    assert made.predictions.rows == report["rows"]["count"] < made.features.rows


def test_of_a_multiclass_it_counts_who_wins(tmp_path: Path) -> None:
    house = House(tmp_path, task="multiclass")
    columns = rows()
    features = house.features({**columns, "label": np.where(columns["a"] > 0, "x", "y")})
    candidate = house.candidate(linear({"a": 1.0}, task="multiclass", classes=("y", "x")), [features])
    _, manifest, _ = house.evaluate(candidate, [features])
    won = kept(house, manifest).predictions.to_dict()["columns"]["prediction"]
    assert won["values"] == ["x", "y"]
    assert won["counts"] == [int((columns["a"][2000:] > 0).sum()), int((columns["a"][2000:] <= 0).sum()), 0, 0]
