"""Saving while the training goes on: what comes back, at any number of processes, and what a killed save leaves."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from structlog.testing import capture_logs
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from orrery.errors import OrreryError
from orrery.store import Store
from orrery.training import tensorfiles
from orrery.training.checkpoints import Checkpoints
from orrery.training.place import Place
from orrery.training.saving import Loaded, ShardedSaver

FOLDER = "flights/train/abc/checkpoints"
ALONE = Place()


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def saver(uri: str, place: Place = ALONE, **more: Any) -> ShardedSaver:
    return ShardedSaver(Checkpoints(Store(uri), FOLDER), place, Path(os.environ["SCRATCH"]), **more)


def state(value: float, best: float | None = None) -> dict[str, Any]:
    """A state whose every number follows from `value`."""
    tree: dict[str, Any] = {
        "model": {"layer.weight": torch.full((5, 3), value), "layer.bias": torch.full((5,), value + 0.5)},
        "optimizer": {
            "state": {i: {"step": torch.tensor(value), "exp_avg": torch.full((5, 3), -value)} for i in range(2)},
            "param_groups": [{"lr": value / 7, "betas": (0.9, 0.95), "fused": None, "params": [0, 1]}],
        },
    }
    if best is not None:
        tree["best"] = {"layer.weight": torch.full((5, 3), best)}
    return tree


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def home(uri: str) -> Path:
    return Path(uri.removeprefix("file://")) / FOLDER


def files(uri: str, kind: str) -> list[Path]:
    return sorted(p for p in home(uri).rglob("*") if p.name.startswith(kind))


def save(uri: str, step: int, tree: dict[str, Any], place: Place = ALONE) -> int:
    """Save once, whatever it takes, and return the newest committed step."""
    one = saver(uri, place)
    one.begin(step, tree, {"loss": float("inf"), "history": [{"auc": 0.1 + 0.2}]}, {"rank": place.rank})
    one.wait()
    one.close()
    return one.committed()


def load(uri: str, tree: dict[str, Any], place: Place = ALONE) -> Loaded | None:
    one = saver(uri, place)
    try:
        return one.load(tree)
    finally:
        one.close()


def test_what_was_saved_comes_back_to_the_last_bit_into_the_same_tensors(folder: str) -> None:
    assert load(folder, state(0.0)) is None
    assert save(folder, 12, state(3.25, best=1.5)) == 12
    tree = state(0.0, best=0.0)
    weight, group = tree["model"]["layer.weight"], tree["optimizer"]["param_groups"][0]
    loaded = load(folder, tree)
    assert loaded == Loaded(
        12, {"loss": float("inf"), "history": [{"auc": 0.1 + 0.2}]}, {"rank": 0}, 1, loaded.path if loaded else ""
    )
    assert same(tree, state(3.25, best=1.5))
    assert tree["model"]["layer.weight"] is weight and isinstance(group["betas"], tuple)


def test_what_the_tree_lacks_is_made(folder: str) -> None:
    """An optimizer that has not stepped has no state yet, and a new training no best weights."""
    save(folder, 1, state(2.0, best=1.0))
    tree: dict[str, Any] = {"model": state(0.0)["model"]}
    load(folder, tree)
    tree["optimizer"]["param_groups"][0]["betas"] = (0.9, 0.95)
    assert same(tree, state(2.0, best=1.0))


def test_best_weights_that_the_checkpoint_lacks_are_taken_out(folder: str) -> None:
    save(folder, 1, state(2.0))
    tree = state(0.0, best=7.0)
    load(folder, tree)
    assert same(tree, state(2.0))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str
)
def test_any_type_and_shape(folder: str, dtype: torch.dtype) -> None:
    shapes = [(), (0,), (1,), (3, 0, 2), (2, 3, 4)]
    tree = {"t": {str(s): (torch.arange(max(1, torch.Size(s).numel()))[: torch.Size(s).numel()] % 2).to(dtype).reshape(s)
                  for s in shapes}}  # fmt: skip
    tree["t"]["turned"] = torch.arange(6).reshape(2, 3).to(dtype).T
    save(folder, 1, tree)
    read = {"t": {name: torch.ones_like(t).contiguous() for name, t in tree["t"].items()}}
    load(folder, read)
    assert same(read, tree)


def test_the_files_are_safetensors_and_nothing_is_pickled(folder: str) -> None:
    save(folder, 1, state(2.0, best=1.0))
    for path in home(folder).rglob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert all(entry["dtype"] == "F32" for entry in header.values())
    assert {p.suffix for p in home(folder).rglob("*") if p.is_file()} == {".json", ".safetensors"}


class Slow(ShardedSaver):
    """Waits for `go` before it writes."""

    go: threading.Event

    def _write(self, *given: Any) -> Any:
        assert self.go.wait(30)
        return super()._write(*given)


def test_the_tensors_may_change_as_soon_as_begin_returns(folder: str, tmp_path: Path) -> None:
    one = Slow(Checkpoints(Store(folder), FOLDER), Place(), tmp_path / "scratch")
    one.go = threading.Event()
    tree, shared = state(3.0, best=1.0), {"history": [1]}
    one.begin(1, tree, shared, {})
    for tensor in (tree["model"]["layer.weight"], tree["best"]["layer.weight"], tree["optimizer"]["state"][0]["step"]):
        tensor.fill_(-99.0)
    tree["optimizer"]["param_groups"][0]["lr"] = -99.0
    shared["history"].append(2)
    assert one.wait(0.05) is False and one.committed() == 0
    one.go.set()
    assert one.wait() is True and one.committed() == 1
    read = state(0.0, best=0.0)
    loaded = load(folder, read)
    assert same(read, state(3.0, best=1.0)) and loaded is not None and loaded.shared == {"history": [1]}


def test_a_second_begin_waits_for_the_first_and_counts_the_wait(folder: str, tmp_path: Path) -> None:
    one = Slow(Checkpoints(Store(folder), FOLDER), Place(), tmp_path / "scratch")
    one.go = threading.Event()
    one.begin(1, state(1.0), {}, {})
    assert one.cost() < 0.2
    threading.Timer(0.3, one.go.set).start()
    one.begin(2, state(2.0), {}, {})
    assert one.committed() == 1 and one.cost() > 0.2
    one.close()
    assert one.committed() == 2


def test_best_weights_are_written_once_and_kept_until_others_are_better(folder: str) -> None:
    one, tree = saver(folder), state(1.0, best=1.0)
    for step in range(1, 6):
        one.begin(step, tree, {}, {})
    one.wait()
    [best] = files(folder, "best")
    assert best.parent.name.startswith("000000000001") and len(files(folder, "state")) == 2
    again = saver(folder)  # a new process goes on
    read = state(0.0)
    again.load(read)
    assert same(read, state(1.0, best=1.0))
    again.begin(6, read, {}, {})
    again.wait()
    assert files(folder, "best") == [best]
    read["best"]["layer.weight"].fill_(2.0)
    again.begin(7, read, {}, {})
    again.begin(8, read, {}, {})
    again.wait()
    assert [p.parent.name[:12] for p in files(folder, "best")] == ["000000000007"]
    load(folder, read := state(0.0))
    assert same(read, state(1.0, best=2.0))


def test_a_damaged_newest_is_passed_over(folder: str) -> None:
    save(folder, 1, state(1.0))
    save(folder, 2, state(2.0))
    newest = files(folder, "state")[-1]
    data = bytearray(newest.read_bytes())
    data[-3] ^= 4
    newest.write_bytes(data)
    read = state(0.0)
    with capture_logs() as logs:
        loaded = load(folder, read)
    assert loaded is not None and loaded.step == 1 and same(read, state(1.0))
    assert f"{newest.parent.name}/{newest.name}" in logs[0]["event"]


@pytest.mark.parametrize("what", ["shape", "dtype", "more"])
def test_another_model_is_refused(folder: str, what: str) -> None:
    save(folder, 1, state(1.0))
    tree = state(0.0)
    if what == "more":
        tree["model"]["other"] = torch.zeros(1)
    else:
        tree["model"]["layer.bias"] = torch.zeros(6) if what == "shape" else torch.zeros(5, dtype=torch.float64)
    with pytest.raises(OrreryError, match="model/other" if what == "more" else "model/layer.bias"):
        load(folder, tree)


def test_a_full_disk_is_a_warning_and_the_next_save_is_made(folder: str, tmp_path: Path) -> None:
    """A real failing write: this process may write no file longer than 100 kB."""

    def work(place: Place) -> Any:
        tree = {"model": {"w": torch.ones(100_000)}}
        one = saver(folder, place)
        one.begin(1, tree, {}, {})
        one.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if place.rank == place.world - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with capture_logs() as logs:
            two = {"model": {"w": torch.full((100_000,), 2.0)}, "optimizer": {"v": torch.full((100_000,), 2.0)}}
            one.begin(2, two, {}, {})
            one.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        left = sorted(p.name[:12] for p in home(folder).iterdir() if p.is_dir()) if place.rank == 0 else []
        committed = one.committed()
        one.begin(3, {"model": {"w": torch.full((100_000,), 3.0)}}, {}, {})
        one.wait()
        then = one.committed()
        one.close()
        return [e["event"] for e in logs], left, committed, then

    for world in (1, 2):
        shutil.rmtree(home(folder), ignore_errors=True)
        answers = run(work, world, tmp_path)
        warnings, left, _, _ = answers[0]
        assert len(warnings) == 1 and "the training goes on" in warnings[0] and "File too large" in warnings[0]
        assert left == ["000000000001"]
        assert {(before, then) for _, _, before, then in answers} == {(1, 3)}


KILLED = ["at the first byte", "between two tensors", "before the index", "before the document", "in the document"]


@pytest.mark.parametrize("where", KILLED)
def test_a_save_killed_anywhere_leaves_nothing_visible(folder: str, tmp_path: Path, where: str) -> None:
    save(folder, 1, state(1.0, best=1.0))
    tree = state(2.0, best=2.0)

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def work(_: Place) -> None:
        patch = pytest.MonkeyPatch()
        if where == "at the first byte":
            patch.setattr(tensorfiles, "write", die)
        elif where == "between two tensors":
            real, seen = tensorfiles._bytes, []
            patch.setattr(tensorfiles, "_bytes", lambda t: die() if seen else (seen.append(1), real(t))[1])
        elif where == "before the index":
            patch.setattr(tensorfiles.Writer, "finish", die)
        elif where == "before the document":
            patch.setattr(Checkpoints, "commit", die)
        else:
            patch.setattr(os, "link", die)
        save(folder, 2, tree)

    assert run(work, 1, tmp_path) == [-signal.SIGKILL]
    read = state(0.0)
    loaded = load(folder, read)
    assert loaded is not None and loaded.step == 1 and same(read, state(1.0, best=1.0))
    one = saver(folder)
    for step in (2, 3, 4):
        one.begin(step, state(float(step)), {}, {})
    one.wait()
    assert {p.name[:12] for p in home(folder).iterdir() if p.name[0] != "."} == {"000000000003", "000000000004"}


def test_ranks_share_the_writing_of_what_is_whole(folder: str, tmp_path: Path) -> None:
    tree = {"model": {str(i): torch.full((10_000,), float(i)) for i in range(10)}}
    assert run(lambda place: save(folder, 1, tree, place), 2, tmp_path) == [1, 1]
    sizes = [path.stat().st_size for path in files(folder, "state")]
    assert len(sizes) == 2 and abs(sizes[0] - sizes[1]) < 200

    def read(place: Place) -> Any:
        got = {"model": {str(i): torch.zeros(10_000) for i in range(10)}}
        loaded = load(folder, got, place)
        return same(got, tree), loaded and (loaded.own, loaded.world)

    assert run(read, 2, tmp_path) == [(True, ({"rank": 0}, 2)), (True, ({"rank": 1}, 2))]
    assert run(read, 1, tmp_path) == run(read, 3, tmp_path)[:1] == [(True, (None, 2))]


def test_sharded_tensors_come_back_at_another_number_of_processes(folder: str, tmp_path: Path) -> None:
    """Seven rows over 2, then 3, then 1 process: uneven, and one shard may be empty (2 rows over 3)."""
    whole = {"w": torch.arange(21.0).reshape(7, 3), "few": torch.arange(2.0)}

    def sharded(world: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (world,))
        return {"model": {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in tensors.items()}}

    def write(place: Place) -> int:
        return save(folder, 1, sharded(place.world, whole), place)

    def read(place: Place) -> bool:
        tree = sharded(place.world, {name: torch.zeros_like(t) for name, t in whole.items()})
        load(folder, tree, place)
        assert isinstance(tree["model"]["w"], DTensor)
        found = {name: t.full_tensor() for name, t in tree["model"].items()}
        save(folder, 2, tree, place)
        return same(found, whole)

    assert run(write, 2, tmp_path) == [1, 1]
    assert run(read, 3, tmp_path) == [True] * 3
    single = {"model": {name: torch.zeros_like(t) for name, t in whole.items()}}
    loaded = load(folder, single)
    assert loaded is not None and (loaded.step, loaded.world) == (2, 3) and same(single["model"], whole)


def test_training_collectives_run_beside_a_save(folder: str, tmp_path: Path) -> None:
    def work(place: Place) -> tuple[int, float]:
        one, tree = saver(folder, place), {"model": {"w": torch.ones(300_000)}}
        total = torch.zeros(1)
        for step in range(1, 31):
            if step % 3 == 1:
                one.begin(step, tree, {}, {})
            grad = torch.full((1,), float(place.rank + step))
            dist.all_reduce(grad)
            total += grad
        one.close()
        return one.committed(), float(total)

    assert run(work, 2, tmp_path) == [(28, 960.0)] * 2


def test_ranks_that_save_different_things_are_told_and_commit_nothing(folder: str, tmp_path: Path) -> None:
    def work(place: Place) -> tuple[int, list[str]]:
        one = saver(folder, place)
        with capture_logs() as logs:
            one.begin(place.rank + 1, state(1.0), {}, {})
            one.close()
        return one.committed(), [e["event"] for e in logs]

    (first, told), (second, _) = run(work, 2, tmp_path)
    assert (first, second) == (0, 0) and "do not save the same" in told[0]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_that_is_gone_holds_nobody_up(folder: str, tmp_path: Path, how: str) -> None:
    """Its connection breaks when it dies; a stopped one is given up after the time limit."""

    def work(place: Place) -> tuple[int, float]:
        first = saver(folder, place)
        first.begin(1, state(1.0), {}, {})
        first.wait()
        one = saver(folder, place, timeout=timedelta(seconds=3))  # no disk is waited for under this one
        if place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        began = time.monotonic()
        for step in (2, 3):
            one.begin(step, state(2.0), {}, {})
        one.close()
        return first.committed() + one.committed(), time.monotonic() - began

    [survivor] = run(work, 2, tmp_path, answers=1)
    assert survivor[0] == 1 and survivor[1] < (3 if how == "killed" else 40)
    read = state(0.0)
    loaded = load(folder, read)
    assert loaded is not None and loaded.step == 1 and same(read, state(1.0))


def test_a_bucket_holds_what_a_folder_holds(s3_bucket: str, tmp_path: Path) -> None:
    tree = state(4.0, best=2.0)
    assert run(lambda place: save(s3_bucket, 1, tree, place), 2, tmp_path) == [1, 1]

    def read(place: Place) -> bool:
        got = state(0.0)
        load(s3_bucket, got, place)
        got["optimizer"]["param_groups"][0]["betas"] = (0.9, 0.95)
        return same(got, tree)

    assert run(read, 2, tmp_path) == [True, True]
    assert run(read, 1, tmp_path) == [True]
