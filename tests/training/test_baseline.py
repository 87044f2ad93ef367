"""The baseline: a graph that any runtime opens, better than a constant, equal to what a library fits."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from training_bench import trips

from orrery.training import Dataset, baseline, signature
from orrery.training.dataset import encoded
from orrery.training.labels import classes
from orrery.training.schema import infer


def dataset(task: str, drop: tuple[str, ...] = (), rows: int = 3000) -> Dataset:
    table = trips(rows, kind=task).drop_columns(list(drop))
    return encoded(table, infer(table, task, classes(table, task)))  # type: ignore[arg-type]


def columns(data: Dataset) -> np.ndarray:
    """The design that the baseline documents, built the plain way."""
    mean, std = np.nanmean(data.numeric.astype(float), axis=0), np.nanstd(data.numeric.astype(float), axis=0)
    one_hot = np.eye(max(data.schema.categorical.values()))[data.categorical[:, 0]]
    return np.concatenate([np.nan_to_num((data.numeric - mean) / std), one_hot], axis=1)


def test_logistic_regression_is_the_one_of_sklearn() -> None:
    data = dataset("binary")
    found = signature.predict(baseline.fit(data), data, "baseline")
    reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=2000).fit(columns(data), data.label)
    np.testing.assert_allclose(found, reference.predict_proba(columns(data))[:, 1], atol=2e-5)
    rate = data.label.mean()
    constant = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    own = -np.log(np.where(data.label > 0, found, 1 - found)).mean()
    assert own < 0.75 * constant


def test_ridge_regression_is_the_one_of_sklearn() -> None:
    data = dataset("regression")
    found = signature.predict(baseline.fit(data), data, "baseline")
    reference = Ridge(alpha=1.0).fit(columns(data), data.label).predict(columns(data))
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-3)


def test_multiclass_gives_probabilities_that_sum_to_one() -> None:
    data = dataset("multiclass")
    found = signature.predict(baseline.fit(data), data, "baseline")
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    most_frequent = np.bincount(data.label.astype(int)).max() / data.rows
    assert (found.argmax(axis=1) == data.label).mean() > most_frequent + 0.15


@pytest.mark.parametrize("drop", [("carrier",), ("distance", "weather__wind", "holiday")])
def test_an_empty_input_is_left_out(drop: tuple[str, ...]) -> None:
    data = dataset("binary", drop)
    made = baseline.fit(data)
    assert {i.name for i in signature.session(made).get_inputs()} == set(signature.feed(data))
    signature.predict(made, data, "baseline")  # refuses another signature


def test_a_category_with_many_ids_is_left_out_beside_numbers_and_used_without() -> None:
    table = trips(3000).append_column("house", pa.array([f"h{i % 60:02d}" for i in range(3000)]))
    data = encoded(table, infer(table, "binary"))
    assert data.schema.categorical["house"] == 61
    assert baseline.Design(data).categories == [0]
    only = table.drop_columns(["distance", "weather__wind", "holiday", "carrier"])
    data = encoded(only, infer(only, "binary"))
    signature.predict(baseline.fit(data), data, "baseline")


def test_missing_values_and_unknown_categories_are_scored() -> None:
    data = dataset("binary")
    made = baseline.fit(data)
    odd = Dataset(
        np.full_like(data.numeric[:4], np.nan), np.zeros_like(data.categorical[:4]), data.label[:4], data.schema
    )
    assert np.isfinite(signature.predict(made, odd, "baseline")).all()


def test_two_fits_are_the_same_bytes() -> None:
    data = dataset("binary")
    assert baseline.fit(data) == baseline.fit(data)
