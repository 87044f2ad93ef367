from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orrery.data import files, snapshot
from orrery.data.tables import write_parquet
from orrery.errors import DataError, RequestError, TryAgain, UserError
from orrery.store import storage_options

US = pa.timestamp("us", tz="UTC")


def test_a_partition_is_kept_and_published(house, make_orders):
    result = house.run("ingest")
    assert result.metrics == {"rows_orders": 200.0, "rows_weather": 20.0}
    assert result.facts["orders"]["columns"]["placed"] == "timestamp[us, tz=UTC]"
    assert result.facts["orders"]["bytes"] == house.output(result).files["orders.parquet"].size
    assert house.table(result, "orders.parquet").equals(make_orders())
    assert house.store.latest("shop", "raw", "2024-01").manifest == result.output


def test_the_same_content_again_commits_nothing_new(house, make_orders):
    first = house.run("ingest")
    # The same rows, written by another hand: other row groups, codec and metadata.
    table = make_orders().replace_schema_metadata({"who": "someone else"})
    pq.write_table(table, house.upstream / "orders" / "2024-01.parquet", row_group_size=7, compression="gzip")
    again = house.run("ingest")
    assert again.output == first.output
    assert again.skipped.startswith("the same output is committed already")
    assert len(house.store.pointers("shop", "raw", "2024-01")) == 1
    attempts = house.store.names(first.output.removesuffix("/manifest.json"))
    assert len([n for n in attempts if n.startswith("a")]) == 1


def test_a_month_that_landed_again_supersedes_and_lists_what_is_stale(house, make_orders):
    first = house.run("ingest")
    house.run("validate")
    house.land("orders", "2024-01", make_orders(201))
    second = house.run("ingest")
    assert second.output != first.output
    assert second.facts["supersedes"] == first.output
    assert second.facts["stale"] == ["validate 2024-01"]
    assert house.store.latest("shop", "raw", "2024-01").supersedes == first.output


def test_a_missing_file_names_its_neighbours(house, make_orders):
    for month in ("2023-11", "2023-12", "2024-03"):
        house.land("orders", month, make_orders(month=month))
    with pytest.raises(RequestError) as e:
        house.run("ingest", "2024-02")
    assert "orders/2024-02.parquet is not there" in e.value.message
    assert "2024-01.parquet, 2024-03.parquet" in e.value.message
    assert "uri" in e.value.hint


def test_a_missing_folder_names_what_is_above(tmp_path):
    (tmp_path / "flights").mkdir()
    with pytest.raises(RequestError, match="holds flights"), files.read(f"file://{tmp_path}/fligths/x.parquet", None):
        pass


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: 0 bytes"),
        (b"PAR1 not really", "cannot be read as parquet"),
        ("half", "cannot be read as parquet"),
    ],
)
def test_a_broken_file_is_named(house, content, said):
    path = house.upstream / "orders" / "2024-01.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(DataError, match=said) as e:
        house.run("ingest")
    assert "orders/2024-01.parquet" in e.value.message


def test_damaged_pages_are_no_network_trouble(house, make_orders):
    path = house.land("orders", "2024-01", make_orders(20_000))
    data = bytearray(path.read_bytes())
    data[200:3000] = bytes(2800)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="cannot be read as parquet"):
        house.run("ingest")
    assert house.store.latest("shop", "raw", "2024-01") is None


def test_no_rows_ends_it_for_the_rows_and_warns_for_the_rest(house, make_orders):
    house.land("weather", "2024-01", pa.table({"at": pa.array([], US), "temp": pa.array([], pa.float64())}))
    assert house.run("ingest").reasons == ["source weather has 0 rows"]
    house.land("orders", "2024-01", make_orders(0))
    with pytest.raises(DataError, match="source orders has 0 rows for 2024-01"):
        house.run("ingest")


def test_types_are_made_the_same_whatever_the_file_says(house, make_orders):
    plain = house.run("ingest")
    table = make_orders()
    table = table.set_column(3, "kind", table["kind"].dictionary_encode())
    table = table.set_column(0, "id", table["id"].cast(pa.large_string()))
    table = table.set_column(1, "placed", table["placed"].cast(pa.timestamp("ns", tz="America/New_York")))
    house.land("orders", "2024-01", table)
    assert house.run("ingest").output == plain.output


def test_a_timestamp_without_a_zone_is_utc(house, make_orders):
    table = make_orders()
    house.land("orders", "2024-01", table.set_column(1, "placed", table["placed"].cast(pa.timestamp("ms"))))
    assert house.table(house.run("ingest"), "orders.parquet")["placed"][0].as_py() == datetime(2024, 1, 1, tzinfo=UTC)


def test_a_type_that_parquet_cannot_hold_names_its_column():
    schema = pa.schema([("ok", pa.int64()), ("odd", pa.month_day_nano_interval())])
    with pytest.raises(DataError, match="column 'odd' has type month_day_nano_interval"):
        snapshot.normal_schema(schema, "source orders")


def test_a_column_name_that_comes_twice_is_refused():
    with pytest.raises(DataError, match="'a' more than once"):
        snapshot.normal_schema(pa.schema([("a", pa.int64()), ("a", pa.string())]), "source orders")


def test_the_bytes_do_not_depend_on_the_batches(tmp_path, make_orders):
    table = make_orders(120_001)
    digests = set()
    for size in (999, 50_000, 200_000):
        path = tmp_path / f"{size}.parquet"
        assert snapshot.write(table.to_batches(max_chunksize=size), table.schema, path) == 120_001
        digests.add(snapshot.sha256(path))
        assert [pq.ParquetFile(path).metadata.row_group(i).num_rows for i in range(3)] == [50_000, 50_000, 20_001]
    assert len(digests) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_is_named_by_where_it_was_written(house, tmp_path, make_orders):
    """Not by the source, from which it is read meanwhile."""
    uri = str(house.upstream / "orders" / "2024-01.parquet")
    scratch = tmp_path / "snapshot.parquet"
    scratch.symlink_to("/dev/full")
    with pytest.raises(TryAgain, match=r"snapshot\.parquet: no space left") as e, files.read(uri, None) as stream:
        snapshot.write(stream.batches, snapshot.normal_schema(stream.schema, "orders"), scratch)
    assert e.value.exit_code == 75
    with pytest.raises(TryAgain, match=r"snapshot\.parquet: no space left"):
        write_parquet(make_orders(), scratch)


def test_a_folder_without_permission_is_for_a_person(house, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    # The tests run as root, who may read everything.
    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.info", refuse)
    with pytest.raises(UserError, match="Permission denied"), files.read(f"file://{house.upstream}/x.parquet", None):
        pass


def test_an_unknown_ending_or_protocol_says_what_is_known(tmp_path):
    with pytest.raises(RequestError, match="neither Parquet nor CSV"), files.read(f"{tmp_path}/x.xlsx", None):
        pass
    with pytest.raises(UserError, match="cannot be read"), files.read("nowhere://x/y.parquet", None):
        pass


# -- CSV -----------------------------------------------------------------------------------------------


def csv_house(house, text: str) -> Path:
    sources = dict(house.spec["sources"], orders={"uri": "${data}/orders/{partition}.csv"})
    house.write_spec(sources=sources)
    path = house.upstream / "orders" / "2024-01.csv"
    path.write_text(text)
    return path


def test_csv_types_are_inferred(house):
    csv_house(house, 'id,n,x,when,name\n1,2,0.5,2024-01-01 10:00:00,"NA"\n2,,NA,2024-01-02 10:00:00,\n')
    table = house.table(house.run("ingest"), "orders.parquet")
    assert [str(t) for t in table.schema.types] == ["int64", "int64", "double", "timestamp[us, tz=UTC]", "string"]
    assert table["n"].to_pylist() == [2, None]
    assert table["name"].to_pylist() == ["NA", None]


def test_csv_widens_a_type_that_a_later_block_contradicts(house, monkeypatch):
    monkeypatch.setattr(files, "CSV_BLOCK", 4096)
    rows = [f"{i},{i},,{i}" for i in range(3000)] + ["3000,0.5,x,2024-01-01"]
    csv_house(house, "id,a,b,c\n" + "\n".join(rows) + "\n")
    table = house.table(house.run("ingest"), "orders.parquet")
    assert [str(t) for t in table.schema.types] == ["int64", "double", "string", "string"]
    assert table.num_rows == 3001
    assert table["a"][3000].as_py() == 0.5
    assert table["c"][1].as_py() == "1"


def test_csv_with_a_ragged_line_is_named(house):
    csv_house(house, "id,a\n1,2\n3\n")
    with pytest.raises(DataError, match=r"2024-01\.csv cannot be read as csv.*Expected 2 columns, got 1"):
        house.run("ingest")


# -- SQL -----------------------------------------------------------------------------------------------


@pytest.fixture
def database(house, monkeypatch) -> Path:
    path = house.folder / "orders.db"
    with sqlite3.connect(path) as db:
        db.execute(
            "create table orders (id integer primary key, placed timestamp, amount numeric(8, 2), score real,"
            ' "odd name" text)'
        )
        start = datetime(2023, 12, 31, 22)
        rows = [(i, str(start + timedelta(hours=i)), i / 4, i / 8, f"n{i}" if i % 3 else None) for i in range(800)]
        db.executemany("insert into orders values (?, ?, ?, ?, ?)", reversed(rows))
    db.close()
    table = {"table": "orders", "connection": "shop_db", "time_column": "placed"}
    house.write_spec(sources=dict(house.spec["sources"], orders=table))
    monkeypatch.setenv("ORRERY_SOURCE_ORDERS", f"sqlite:///{path}")
    return path


def test_a_table_gives_the_rows_of_its_partition(house, database):
    result = house.run("ingest")
    table = house.table(result, "orders.parquet")
    times = table["placed"].to_pylist()
    assert table.num_rows == 31 * 24
    assert (times[0], times[-1]) == (datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 31, 23, tzinfo=UTC))
    types = [str(t) for t in table.schema.types]
    assert types == ["int64", "timestamp[us, tz=UTC]", "decimal128(8, 2)", "double", "string"]
    assert table["odd name"].to_pylist()[:3] == ["n2", None, "n4"]
    assert house.run("ingest").output == result.output


def test_a_table_or_column_that_is_not_there(house, database):
    for change, said in (({"table": "order"}, "no table order"), ({"time_column": "place"}, "no column place")):
        source = {**house.spec["sources"]["orders"], **change}
        spec = dict(house.spec["sources"], orders=source)
        house.write_spec(sources=spec)
        with pytest.raises(DataError, match=said) as e:
            house.run("ingest")
        assert "did you mean" in e.value.hint
        house.write_spec(sources=dict(spec, orders={"table": "orders", "connection": "x", "time_column": "placed"}))


def test_a_time_column_that_tells_no_time(house, database):
    house.write_spec(
        sources=dict(house.spec["sources"], orders={**house.spec["sources"]["orders"], "time_column": "id"})
    )
    with pytest.raises(DataError, match=r"orders\.id has type INTEGER"):
        house.run("ingest")


def test_a_missing_secret_names_its_variable(house, database, monkeypatch):
    monkeypatch.delenv("ORRERY_SOURCE_ORDERS")
    with pytest.raises(UserError, match="ORRERY_SOURCE_ORDERS is not set"):
        house.run("ingest")


def test_a_database_out_of_reach_is_tried_again_and_tells_no_password(house, database, monkeypatch):
    monkeypatch.setenv("ORRERY_SOURCE_ORDERS", "postgresql://me:s3cr%40t@127.0.0.1:9/shop?connect_timeout=2")
    with pytest.raises(TryAgain, match="out of reach") as e:
        house.run("ingest")
    assert "127.0.0.1" in str(e.value)
    assert "s3cr" not in str(e.value)
    assert e.value.__suppress_context__


def test_a_url_that_is_none_is_not_repeated(house, database, monkeypatch):
    monkeypatch.setenv("ORRERY_SOURCE_ORDERS", "s3cret in a wrong place")
    with pytest.raises(UserError, match="ORRERY_SOURCE_ORDERS is not a SQLAlchemy URL") as e:
        house.run("ingest")
    assert "s3cret" not in str(e.value)


# -- S3 ------------------------------------------------------------------------------------------------


def test_sources_and_store_on_s3(house, s3_bucket, monkeypatch):
    monkeypatch.setenv("ORRERY_STORE", f"{s3_bucket}/store")
    monkeypatch.setenv("ORRERY_DATA", f"{s3_bucket}/upstream")
    fs, _ = fsspec.core.url_to_fs(s3_bucket, **storage_options(s3_bucket))
    with pytest.raises(RequestError, match="is not there"):
        house.run("ingest")
    for source in ("orders", "weather"):
        fs.put_file(str(house.upstream / source / "2024-01.parquet"), f"{s3_bucket}/upstream/{source}/2024-01.parquet")
    with pytest.raises(RequestError, match=r"holds 2024-01\.parquet"):
        house.run("ingest", "2024-02")
    first = house.run("ingest")
    assert house.run("ingest").output == first.output
    result = house.run("validate")
    assert house.table(result, "orders.parquet").num_rows == 200
    assert house.store.read(result.links["Data Docs"]).startswith(b"<!DOCTYPE html>")


def test_s3_that_does_not_answer_is_tried_again(house, s3_bucket, monkeypatch):
    monkeypatch.setenv("ORRERY_DATA", f"{s3_bucket}/upstream")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(TryAgain):
        house.run("ingest")
