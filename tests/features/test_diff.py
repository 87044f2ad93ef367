from __future__ import annotations

from orrery.features.diff import diff


def test_added_removed_and_changed_features_are_listed() -> None:
    old = {"wind": "numeric", "carrier": "categorical", "hour": "numeric"}
    new = {"wind": "numeric", "hour": "categorical", "gust": "numeric"}
    assert diff(old, new) == ["+ gust: numeric", "- carrier: categorical", "~ hour: numeric -> categorical"]


def test_equal_lists_do_not_differ() -> None:
    assert diff({"a": "numeric", "b": "numeric"}, {"b": "numeric", "a": "numeric"}) == []
