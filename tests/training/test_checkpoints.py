"""Which checkpoint counts: only a whole one, the newest of these, and nothing that is needed is ever removed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from orrery.errors import OrreryError
from orrery.store import File, Store
from orrery.training.checkpoints import Checkpoints, Saved

FOLDER = "flights/train/abc/checkpoints"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(Store(f"file://{tmp_path}/store"), FOLDER, keep=2)


def files(checkpoints: Checkpoints, name: str, *named: str) -> tuple[File, ...]:
    """Write the files of a checkpoint that is not committed yet."""
    made = []
    for file in named:
        path = f"{name}/{file}"
        data = f"{path} ".encode() * 1000
        checkpoints.store.put(checkpoints.path(path), data)
        made.append(File(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return tuple(made)


def commit(checkpoints: Checkpoints, step: int, *named: str, also: tuple[File, ...] = ()) -> Saved:
    name = checkpoints.new_name(step)
    made = files(checkpoints, name, *(named or ("state",)))
    saved = Saved(
        step=step, world=1, kind="test", name=name, files=made + also, shared={"loss": float("inf")}, own=({},)
    )
    checkpoints.commit(saved)
    return saved


def home(checkpoints: Checkpoints) -> Path:
    return Path(checkpoints.store.full(checkpoints.folder))


def test_the_newest_counts_and_comes_back_as_it_was(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints.newest_good(tmp_path) is None and checkpoints.newest_step() == 0
    commit(checkpoints, 999)
    last = commit(checkpoints, 1_000)
    assert checkpoints.newest_good(tmp_path) == last
    assert checkpoints.newest_step() == 1_000


def test_files_without_a_document_are_not_seen(checkpoints: Checkpoints, tmp_path: Path) -> None:
    first = commit(checkpoints, 1)
    files(checkpoints, checkpoints.new_name(2), "state")
    assert checkpoints.newest_good(tmp_path) == first


@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped", "longer"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    checkpoints: Checkpoints, tmp_path: Path, harm: str
) -> None:
    before = commit(checkpoints, 1)
    damaged = commit(checkpoints, 2, "state", "more")
    file = home(checkpoints) / damaged.name / "more"
    data = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "truncated":
        file.write_bytes(data[:-1])
    elif harm == "longer":
        file.write_bytes(data + b" ")
    else:
        data[777] ^= 1
        file.write_bytes(data)
    with capture_logs() as logs:
        assert checkpoints.newest_good(tmp_path) == before
    [event] = logs
    assert event["log_level"] == "warning" and f"{damaged.name}/more" in event["event"]


@pytest.mark.parametrize("text", ["", "{", '{"version": 2}', "[]", "\x00" * 100])
def test_a_document_that_cannot_be_read_is_passed_over(checkpoints: Checkpoints, tmp_path: Path, text: str) -> None:
    before = commit(checkpoints, 1)
    damaged = commit(checkpoints, 2)
    (home(checkpoints) / f"{damaged.name}.json").write_text(text)
    with capture_logs() as logs:
        assert checkpoints.newest_good(tmp_path) == before
    assert damaged.name in logs[0]["event"]


def test_a_document_under_another_name_does_not_count(checkpoints: Checkpoints, tmp_path: Path) -> None:
    before = commit(checkpoints, 1)
    (home(checkpoints) / "000000000009-00000000.json").write_bytes(
        (home(checkpoints) / f"{before.name}.json").read_bytes()
    )
    with capture_logs():
        assert checkpoints.newest_good(tmp_path) == before


def test_the_newest_are_kept_and_what_they_refer_to(checkpoints: Checkpoints, tmp_path: Path) -> None:
    best = commit(checkpoints, 1, "state", "best")
    shared = tuple(f for f in best.files if f.path.endswith("/best"))
    for step in (2, 3, 4):
        commit(checkpoints, step, also=shared)
    checkpoints.prune()
    left = sorted(str(p.relative_to(home(checkpoints))) for p in home(checkpoints).rglob("*") if p.is_file())
    assert left[0] == f"{best.name}/best"
    assert [path[:12].lstrip("0") for path in left[1:]] == ["3", "3", "4", "4"]
    newest = checkpoints.newest_good(tmp_path)
    assert newest is not None and newest.step == 4


def test_what_a_killed_save_left_is_removed_but_not_a_save_under_way(checkpoints: Checkpoints) -> None:
    left, under_way = checkpoints.new_name(5), checkpoints.new_name(7)
    files(checkpoints, left, "state")
    files(checkpoints, under_way, "state")
    commit(checkpoints, 6)
    checkpoints.prune()
    assert not (home(checkpoints) / left).exists() and (home(checkpoints) / under_way).exists()


def test_a_damaged_one_does_not_push_out_a_good_one(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.keep = 1
    damaged = commit(checkpoints, 9)
    (home(checkpoints) / damaged.name / "state").unlink()
    with capture_logs():
        assert checkpoints.newest_good(tmp_path) is None
    good = commit(checkpoints, 5)
    checkpoints.prune()
    assert checkpoints.newest_good(tmp_path) == good
    assert not (home(checkpoints) / f"{damaged.name}.json").exists()


def test_nothing_is_committed_that_refers_to_what_is_gone(checkpoints: Checkpoints) -> None:
    gone = File(path="000000000001-00000000/best", size=1, sha256="0" * 64)
    with pytest.raises(OrreryError, match="000000000001-00000000/best"):
        commit(checkpoints, 2, also=(gone,))
    assert checkpoints.newest_step() == 0


def test_nothing_is_committed_twice(checkpoints: Checkpoints) -> None:
    saved = commit(checkpoints, 1)
    with pytest.raises(OrreryError, match="there already"):
        checkpoints.commit(saved)


def test_all_goes_when_the_training_is_over(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 1)
    checkpoints.remove_all()
    assert not home(checkpoints).exists()
    checkpoints.remove_all()


def test_a_bucket_is_as_good_as_a_folder(s3_bucket: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(s3_bucket), FOLDER, keep=1)
    before, damaged = commit(checkpoints, 1), commit(checkpoints, 2)
    checkpoints.store.put(checkpoints.path(damaged.files[0].path), b"x" * damaged.files[0].size)
    with capture_logs() as logs:
        assert checkpoints.newest_good(tmp_path) == before
    assert damaged.files[0].path in logs[0]["event"]
    commit(checkpoints, 3)
    checkpoints.prune()
    assert len(checkpoints.store.names(FOLDER)) == 2
    checkpoints.remove_all()
    assert checkpoints.store.names(FOLDER) == []
