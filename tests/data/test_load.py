from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import orrery
from orrery.errors import RequestError, SpecError, UserError
from orrery.store import File, Manifest, content_digest


@pytest.fixture
def filled(house):
    house.run("ingest")
    house.run("validate")
    return house


def publish(house, verb: str, dataset: str, files: dict[str, pa.Table]) -> None:
    """Commit tables by hand, as another verb would."""
    store, made = house.store, {}
    for name, table in files.items():
        path = house.folder / "part.parquet"
        pq.write_table(table, path)
        done = store.upload(path, f"shop/{verb}/x/a1/{name}")
        made[name] = File(path=f"a1/{name}", size=done.size, sha256=done.sha256)
    manifest = Manifest(project="shop", verb=verb, key="2024-01", address="x", digest=content_digest(made), files=made)
    store.put_if_absent(manifest.path, manifest.model_dump_json().encode())
    store.publish("shop", dataset, "2024-01", manifest, "now")


def test_raw_and_clean_by_source(filled, make_orders):
    assert orrery.load("shop", "2024-01", "raw/orders").equals(make_orders())
    assert orrery.load("shop", "2024-01", "clean/orders").equals(make_orders())
    assert orrery.load("shop", "2024-01", "clean/weather").num_rows == 20


def test_features_and_all_parts_of_scores(filled):
    publish(filled, "materialize", "features", {"features.parquet": pa.table({"key": ["a"]})})
    parts = {f"part-{i}.parquet": pa.table({"key": [str(i)]}) for i in range(3)}
    publish(filled, "score", "scores", {**parts, "report.json": pa.table({"x": [1]})})
    assert orrery.load("shop", "2024-01")["key"].to_pylist() == ["a"]
    assert orrery.load("shop", "2024-01", "scores")["key"].to_pylist() == ["0", "1", "2"]


def test_a_file_that_is_gone_is_no_traceback(filled):
    manifest = filled.store.latest_manifest("shop", "clean", "2024-01")
    Path(filled.store.full(manifest.uri("orders.parquet"))).unlink()
    with pytest.raises(UserError, match=r"orders\.parquet is gone, its manifest is not\n.*again") as e:
        orrery.load("shop", "2024-01", "clean/orders")
    assert e.value.exit_code == 64


@pytest.mark.parametrize(
    ("args", "error", "said", "hint"),
    [
        (("shpo", "2024-01"), SpecError, "no project 'shpo'", "did you mean 'shop'"),
        (("shop", "2024-01", "feature"), RequestError, "no dataset 'feature'", "did you mean 'features'"),
        (("shop", "2024-01", "raw"), RequestError, "no dataset 'raw'", "raw/<source>"),
        (("shop", "2024-01", "raw/order"), RequestError, "no source 'order'", "did you mean 'orders'"),
        (("shop", "2024-02", "raw/orders"), RequestError, "no raw for '2024-02'", "2024-01"),
        (("shop", "../..", "raw/orders"), RequestError, "no raw for '../..'", "2024-01"),
        (("shop", "2024-01", "features"), RequestError, "no features for '2024-01'", "allowed: nothing"),
    ],
)
def test_what_is_not_there_lists_what_is(filled, args, error, said, hint):
    with pytest.raises(error, match=said) as e:
        orrery.load(*args)
    assert hint in e.value.hint


def test_a_table_outlives_a_store_that_must_be_copied(filled, s3_bucket, monkeypatch, make_orders):
    monkeypatch.setenv("ORRERY_STORE", f"{s3_bucket}/store")
    filled.run("ingest")
    assert orrery.load("shop", "2024-01", "raw/orders").equals(make_orders())
