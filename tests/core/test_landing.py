"""What a look at the sources sees: on a folder, on S3, in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from core_house import House
from s3 import s3_bucket, s3_endpoint  # noqa: F401  fixtures

from orrery import landing
from orrery.errors import UserError
from orrery.spec import ModelSpec
from orrery.store import storage_options

MONTHS = [f"2013-{m:02d}" for m in range(1, 13)]


@pytest.fixture(params=["folder", "s3", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return f"file://{tmp_path}/up stream"
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/up/stream"
    return f"memory://{tmp_path.name}"


def put(uri: str, data: bytes = b"some rows") -> None:
    fs, path = fsspec.core.url_to_fs(uri, **storage_options(uri))
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, data)


def uris(root: str) -> dict[str, str]:
    return {name: f"{root}/{name}/{{partition}}.parquet" for name in ("flights", "weather")}


def land(root: str, *keys: str, data: bytes = b"some rows") -> None:
    for key in keys:
        for uri in uris(root).values():
            put(uri.replace("{partition}", key), data)


def test_partitions_that_every_source_has_are_there_in_key_order(root: str) -> None:
    land(root, *reversed(MONTHS))
    put(f"{root}/flights/2014-01.parquet")
    seen = landing.look(uris(root), "month")
    assert list(seen.landed) == MONTHS
    assert (seen.incomplete, seen.ignored, seen.absent) == (1, 0, ())
    assert len({there.fingerprint for there in seen.landed.values()}) >= 1
    assert all(there.at.startswith("20") for there in seen.landed.values())


def test_the_same_files_look_the_same_and_a_file_written_again_does_not(root: str) -> None:
    land(root, "2013-01", "2013-02")
    first = landing.look(uris(root), "month").landed
    assert landing.look(uris(root), "month").landed == first
    time.sleep(1.1)  # S3 tells the time by the second
    put(f"{root}/weather/2013-02.parquet", b"other row")  # as many bytes as before
    again = landing.look(uris(root), "month").landed
    assert again["2013-01"] == first["2013-01"]
    assert again["2013-02"].fingerprint != first["2013-02"].fingerprint
    assert again["2013-02"].at > first["2013-02"].at


def test_a_file_that_grows_and_an_empty_one(root: str) -> None:
    land(root, "2013-01")
    before = landing.look(uris(root), "month").landed
    put(f"{root}/flights/2013-01.parquet", b"some rows and more")
    assert landing.look(uris(root), "month").landed != before
    put(f"{root}/flights/2013-01.parquet", b"")
    assert landing.look(uris(root), "month").landed == {}


def test_what_is_no_partition_is_left_alone_and_counted(root: str) -> None:
    land(root, "2013-01")
    hostile = [
        "2013-13.parquet", "2013-00.parquet", "2013-1.parquet", "2013-02.parquet.tmp", ".2013-02.parquet.1.tmp",
        "2013-02.csv", "x2013-02.parquet", "2013-02..parquet", "$(touch pwned).parquet", "２０１３-02.parquet",
        "2013-03.parquet\n", "\n2013-03.parquet", "2013-03\n.parquet",
    ]  # fmt: skip
    if root.startswith("s3"):  # the test's server takes no line ends in a name
        hostile = [name for name in hostile if "\n" not in name]
    for name in hostile:
        put(f"{root}/flights/{name}")
    seen = landing.look(uris(root), "month")
    assert list(seen.landed) == ["2013-01"]
    assert (seen.ignored, seen.incomplete) == (len(hostile), 0)


def test_nothing_there_yet_is_no_error(root: str) -> None:
    seen = landing.look(uris(root), "month")
    assert (seen.landed, seen.absent) == ({}, ("flights", "weather"))


def test_keys_after_the_project_s_end_are_left_alone(root: str) -> None:
    land(root, *MONTHS)
    seen = landing.look(uris(root), "month", "2013-04")
    assert list(seen.landed) == MONTHS[:4]
    assert seen.ignored == 2 * 8


def test_a_key_in_a_folder_s_name_and_twice(root: str) -> None:
    pattern = f"{root}/readings/day={{partition}}/part-{{partition}}.csv"
    put(pattern.replace("{partition}", "2025-01-06"))
    put(f"{root}/readings/day=2025-01-07/part-2025-01-08.csv")
    put(f"{root}/readings/day=2025-01-09/nested/part-2025-01-09.csv")
    put(f"{root}/readings/README")
    assert list(landing.look({"readings": pattern}, "day").landed) == ["2025-01-06"]


def test_a_folder_and_a_link_to_nothing_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "2013-01.csv").mkdir()
    (tmp_path / "2013-02.csv").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "2013-03.csv")
    seen = landing.look({"a": f"{tmp_path}/{{partition}}.csv"}, "month")
    assert seen.landed == {}


def test_a_hundred_thousand_strange_names_are_counted(tmp_path: Path) -> None:
    for i in range(100_000):
        (tmp_path / f"{i}.csv").touch()
    (tmp_path / "2013-01.csv").write_text("a")
    seen = landing.look({"a": f"{tmp_path}/{{partition}}.csv"}, "month")
    assert (list(seen.landed), seen.ignored) == (["2013-01"], 100_000)


def test_what_cannot_be_looked_at_says_so_without_its_secrets() -> None:
    with pytest.raises(UserError, match="cannot be watched"):
        landing.look({"a": "nosuch://user@host/{partition}.csv?x=secret"}, "month")
    with pytest.raises(UserError) as refused:
        landing.look({"a": "nosuch://user:word@host/{partition}.csv"}, "month")
    assert "word" not in str(refused.value)


def spec(**sources: dict[str, str]) -> ModelSpec:
    return ModelSpec.model_validate(
        {"version": 1, "kind": "model", "owner": "o", "task": "binary", "label": {"column": "late"}, "sources": sources}
    )


def test_only_files_by_partition_are_watched(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORRERY_DATA", "s3://bucket/up")
    table = {"table": "t", "connection": "c", "time_column": "at"}
    found = landing.sources(
        spec(
            rows={"uri": "${data}/rows/{partition}.csv"},
            near={"uri": "data/near/{partition}.csv"},
            planes={"uri": "${data}/planes.csv", "partition": "none"},
            weather=table,
        )
    )
    assert found["rows"] == "s3://bucket/up/rows/{partition}.csv"
    assert found["near"].startswith("file:///") and found["near"].endswith("/data/near/{partition}.csv")
    assert set(found) == {"rows", "near"}


def test_it_is_light() -> None:
    code = (
        "import sys, orrery.landing; print({'numpy', 'pyarrow', 'pandas', 'airflow', 'torch'} & {*sys.modules} or 'ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ok"
