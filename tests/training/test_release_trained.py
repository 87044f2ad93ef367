"""Real trainings through evaluate and gate: the better one is released; shuffled labels and a leak are not.

`tests/evaluation/test_release.py` does the same with models made by hand; here the candidate is what `train` makes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from training_bench import TORCH_MODEL, Bench, Run, trips

GATE = "{auc: {min: 0.6}}"


def crossed(month: int) -> pa.Table:
    """Late when far and windy, or near and calm: an interaction, which the straight line of the baseline cannot see."""
    table = trips(1500, month=month)
    distance, wind = (np.nan_to_num(table[name].to_numpy(), nan=10.0) for name in ("distance", "weather__wind"))
    score = 3 * np.tanh((distance - 800) / 300) * np.tanh((wind - 10) / 3)
    late = np.random.default_rng(month).random(table.num_rows) < 1 / (1 + np.exp(-score))
    return with_column(table, "label", late.astype(np.int64))


def with_column(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, pa.array(values))
    return table.append_column(name, pa.array(values))


def shuffled(table: pa.Table) -> pa.Table:
    return with_column(table, "label", np.random.default_rng(7).permutation(table["label"].to_numpy()))


def leaking(table: pa.Table) -> pa.Table:
    noise = np.random.default_rng(7).normal(scale=0.3, size=table.num_rows)
    return with_column(table, "arrived_late", table["label"].to_numpy() + noise)


def landed(root: Path, change: object = None) -> Bench:
    made = Bench(root)
    made.write_project(TORCH_MODEL, gate=GATE)
    for month in (1, 2, 3):
        table = crossed(month)
        made.commit(f"2013-{month:02d}", change(table) if callable(change) else table)
    return made


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return landed(tmp_path_factory.mktemp("honest"))


@pytest.fixture(scope="module")
def good(honest: Bench) -> Run:
    return honest.train("good", overrides={"epochs": 20})


@pytest.fixture(scope="module")
def poor(honest: Bench) -> Run:
    return honest.train("poor", overrides={"epochs": 3, "learning_rate": 0.003})


def test_the_better_training_is_released_over_the_poorer_and_not_the_other_way(
    honest: Bench, good: Run, poor: Run
) -> None:
    released = honest.release(good, poor)
    assert released.verdict == "promote", released.reasons
    assert any("95 % interval over 14 days" in reason for reason in released.reasons), released.reasons
    swapped = honest.release(poor, good, "swapped")
    assert swapped.verdict == "kept"
    assert any(r.startswith("not better than the champion") for r in swapped.reasons)
    again = honest.release(good, good, "again")
    assert again.verdict == "kept"


def test_a_training_on_shuffled_labels_is_kept(tmp_path: Path) -> None:
    made = landed(tmp_path, shuffled)
    result = made.release(made.train("shuffled", overrides={"epochs": 20}))
    assert result.verdict == "kept"
    assert result.reasons[0].startswith("auc 0.") and result.reasons[0].endswith(" is below 0.6")
    assert any(r.startswith("not better than the baseline") for r in result.reasons)


def test_a_training_that_found_a_leak_is_kept_however_good_it_looks(tmp_path: Path) -> None:
    made = landed(tmp_path, leaking)
    result = made.release(made.train("leaking", overrides={"epochs": 20}))
    assert result.metrics["auc"] > 0.95
    assert result.verdict == "kept"
    assert any(r.startswith("arrived_late alone reaches auc 0.9") for r in result.reasons[:2])
