"""Passwords in URIs are found and hidden, and relative ones begin at home."""

from __future__ import annotations

from pathlib import Path

import pytest

from orrery.uri import absolute, has_secret, masked

SECRET = [
    "s3://key:hunter2@bucket/x",
    "s3://key:hun/ter2@bucket/x",
    "https://me:hunter2@host:8080/{partition}.csv",
    "postgresql+psycopg://me:hunter2@db/x",
    "https://host/x.csv?token=hunter2",
    "https://host/x.csv?a=1&X-Amz-Signature=hunter2",
    "https://host/x.csv?access_token=hunter2",
    "https://host/x.csv?api_key=hunter2",
    "s3://key:$hunter2@bucket/x",
]
OPEN = [
    "s3://bucket/a:b@c/{partition}.parquet",
    "http://host:8080/a@b.csv",
    "https://me@host/x.csv",
    "file:///srv/2013:01@x.csv",
    "${data}/x/{partition}.csv?versionId=3",
    "/srv/x.csv",
]


@pytest.mark.parametrize("uri", SECRET)
def test_a_password_is_found_and_hidden(uri: str) -> None:
    assert has_secret(uri)
    assert "ter2" not in masked(uri)


@pytest.mark.parametrize("uri", OPEN)
def test_what_is_no_password(uri: str) -> None:
    assert not has_secret(uri)


def test_a_variable_is_no_password_where_it_is_read_later() -> None:
    assert not has_secret("postgresql://me:$PASSWORD@db/x", references=True)
    assert has_secret("postgresql://me:$PASSWORD@db/x")
    assert has_secret("postgresql://me:hunter2@db/x?password=$PASSWORD", references=True)


def test_what_is_shown_is_still_an_address() -> None:
    assert masked("https://me:hunter2@host:8080/mlflow") == "https://***@host:8080/mlflow"
    assert masked("http://127.0.0.1:5500") == "http://127.0.0.1:5500"


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("var/store", "file:///home/var/store"),
        ("file://var/store", "file:///home/var/store"),
        ("file:///srv/store", "file:///srv/store"),
        ("/srv/store", "/srv/store"),
        ("~/store", "~/store"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("sqlite:///ledger.db", "sqlite:////home/ledger.db"),
        ("sqlite:////srv/ledger.db", "sqlite:////srv/ledger.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://db/x", "postgresql://db/x"),
    ],
)
def test_relative_places_are_below_the_home(uri: str, wanted: str) -> None:
    assert absolute(uri, Path("/home")) == wanted
