"""Housekeeping of the store: what goes, what stays, and that nothing that is needed ever goes."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from core_house import House
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from s3 import s3_bucket, s3_endpoint

from orrery import bundle, platform
from orrery.contract import StepConfig
from orrery.errors import LeaseHeld, OrreryError, UserError
from orrery.housekeeping import decisions, inventory, machine, report
from orrery.housekeeping import house as whole
from orrery.housekeeping.inventory import Object
from orrery.housekeeping.references import DAY
from orrery.housekeeping.sweep import Report, Sweep, counts
from orrery.lease import Lease
from orrery.ledger import Ledger
from orrery.plan import safe_name
from orrery.platform import Retention
from orrery.store import File, Manifest, Ref, Store, content_digest

__all__ = ["s3_bucket", "s3_endpoint"]
P = "delays"
TERMS = Retention(attempts="90d", checkpoints="14d", outputs="60d", share=1.0)
CHAIN = {
    "ingest": "raw",
    "validate": "clean",
    "materialize": "features",
    "train": "candidate",
    "evaluate": "evaluation",
}


@dataclass
class World:
    """A store and a ledger in which months have passed: what is written gets the age that the test says."""

    folder: Path
    terms: Retention = TERMS
    store: Store = field(init=False)
    ledger: Ledger = field(init=False)
    count: int = 0
    now: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(f"file://{self.folder}/store")
        self.ledger = Ledger(f"sqlite:///{self.folder}/ledger.db")
        Path(self.store.root).mkdir(exist_ok=True)

    @contextlib.contextmanager
    def aged(self, days: float) -> Iterator[None]:
        """What is written within is so many days old; as is what the ledger records."""
        before = {o.path: o.at for o in inventory.listing(self.store)}
        first = self.ledger.recent(P, limit=1)
        yield
        at = self.now - days * DAY
        for one in inventory.listing(self.store):
            if before.get(one.path) != one.at:
                os.utime(f"{self.store.root}/{one.path}", (at, at))
        from datetime import UTC, datetime

        import sqlalchemy as sa

        from orrery.ledger import entries

        when = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
        with self.ledger.engine.begin() as connection:
            newer = entries.c.id > (first[0].id if first else 0)
            connection.execute(sa.update(entries).where(newer).values(at=when))

    def name(self) -> str:
        self.count += 1
        return f"{self.count:032x}"

    def bundle(self, code: str) -> str:
        digest = content_digest({"x": File(path="x", size=1, sha256=code)})
        self.store.put_if_absent(bundle.path_of(digest), code.encode())
        return digest

    def config(
        self, verb: str, key: str, inputs: dict[str, tuple[Ref, ...]], code: str, address: str | None, **params: Any
    ) -> StepConfig:
        run = f"r{self.count}"
        return StepConfig(
            project=P, verb=verb, key=key, partitions=(key,), params=params, inputs=inputs, store=self.store.uri,
            bundle=self.bundle(code), address=address, run=run, task=verb,
            folder=f"{P}/runs/{run}/{safe_name(f'{verb}-{key}')}/1",
        )  # fmt: skip

    def attempt(self, config: StepConfig, *, recorded: bool = True, **payload: Any) -> str:
        """Write an attempt's folder, and its end into the ledger."""
        self.store.put(f"{config.folder}/config.json", config.model_dump_json().encode())
        self.store.put(f"{config.folder}/attempt.json", b"{}")
        self.store.put(f"{config.folder}/evidence/page.html", b"<p>")
        if recorded:
            told = {"verb": config.verb, "key": config.key, "folder": config.folder, "status": "done", **payload}
            self.ledger.record(P, "run", config.folder, "done", "t", told)
        return config.folder

    def output(
        self, verb: str, key: str, inputs: dict[str, tuple[Ref, ...]] | None = None, *, publish: bool = True,
        code: str = "code", recorded: bool = True, **facts: Any,
    ) -> Manifest:  # fmt: skip
        """Commit an output as a step does, with its attempt, markers, lease and pointer."""
        inputs, address = inputs or {}, self.name()
        config = self.config(
            verb, key, inputs, code, address, **({"study": facts["study"]} if "study" in facts else {})
        )
        writer = f"a1-{self.count:08x}"
        base = f"{P}/{verb}/{address}"
        self.store.put(f"{base}/lease/000001.json", b'{"owner": "x", "attempt": "y", "done": true}')
        data = f"{address}".encode()
        self.store.put(f"{base}/{writer}/out", data)
        files = {"out": File(path=f"{writer}/out", size=len(data), sha256=address)}
        manifest = Manifest(
            project=P, verb=verb, key=key, address=address, digest=content_digest(files), files=files, inputs=inputs,
            fingerprint={"project": config.bundle}, attempt=config.folder, facts=facts, created="2013-01-01T00:00:00+00:00",
        )  # fmt: skip
        for refs in inputs.values():
            for ref in refs:
                self.store.put_if_absent(f"{P}/dependents/{ref.path.split('/')[-2]}/{verb}.{address}", b"")
        self.store.put_if_absent(manifest.path, manifest.model_dump_json().encode())
        self.attempt(config, recorded=recorded, output=manifest.path)
        if publish and verb in CHAIN:
            self.store.publish(P, CHAIN[verb], key, manifest, "now")
        return manifest

    def promote(self, model: Manifest, evaluation: Manifest, version: str) -> None:
        told = {"verb": "register", "version": version, "model": model.path, "key": "x", "status": "done"}
        self.ledger.record(P, "run", f"{P}/register/{version}", "done", "t", told)
        evidence = {"evaluation": evaluation.path}
        self.ledger.record(
            P, "promotion", f"v{version}", "done", "t", {"version": version, "model": model.path, "evidence": evidence}
        )

    def sweep(self, **kwargs: Any) -> Report:
        held = self.folder / "held"
        held.mkdir(exist_ok=True)
        given = {"run": f"keep-{time.monotonic_ns()}", "held": held, **kwargs}
        return Sweep(self.store, self.ledger, given.pop("terms", self.terms), **given)()

    def whole(self, path: str) -> None:
        """Assert that an output can be read, with all that it was made from, down to the raw data."""
        manifest = self.store.manifest(path)
        assert manifest is not None, f"{path} is gone"
        assert self.store.missing_files(manifest) == []
        assert self.store.exists(bundle.path_of(manifest.fingerprint["project"])), f"{path}: its code is gone"
        for refs in manifest.inputs.values():
            for ref in refs:
                self.store.need(ref)
                self.whole(ref.path)

    def below(self, folder: str) -> list[str]:
        """Return the files below a folder; empty folders go a day later."""
        return [o.path for o in inventory.listing(self.store, folder)]

    def paths(self) -> set[str]:
        return {o.path for o in inventory.listing(self.store) if not o.path.startswith("_housekeeping")}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def kinds(found: Report) -> dict[str, int]:
    return {kind: told["units"] for kind, told in counts(found.removed).items()}


def month(world: World, key: str) -> Manifest:
    """Bring one month in, train on it, evaluate; return the training."""
    raw = world.output("ingest", key)
    clean = world.output("validate", key, {"raw": (raw.ref,)})
    features = world.output("materialize", key, {"clean": (clean.ref,)})
    model = world.output("train", key, {"features": (features.ref,)})
    world.output("evaluate", key, {"candidate": (model.ref,)})
    return model


# -- attempts ------------------------------------------------------------------------------------------


def test_old_attempts_go_once_their_end_is_on_record(world: World) -> None:
    with world.aged(100):
        old = month(world, "2013-01")
        lost = world.attempt(world.config("train", "2013-09", {}, "code", world.name()), recorded=False)
    with world.aged(10):
        new = month(world, "2013-02")
    found = world.sweep()
    assert world.below(old.attempt) == []
    assert world.store.exists(f"{new.attempt}/evidence/page.html")
    assert world.store.exists(f"{lost}/config.json"), "nobody has recorded its end: its run may be cleared"
    assert kinds(found)["attempt"] == 5
    assert all("days ago" in r.why for r in found.removed if r.kind == "attempt")
    world.whole(old.path)


def test_an_attempt_that_nobody_recorded_is_given_twice_the_time(world: World) -> None:
    with world.aged(181):
        lost = world.attempt(world.config("train", "2013-01", {}, "code", None), recorded=False)
        for i in range(3):
            world.attempt(world.config("train", f"2013-0{i + 2}", {}, f"x{i}", world.name()))
    world.sweep()
    assert world.below(lost) == []


def test_what_was_promoted_stays_with_the_attempts_that_made_it(world: World) -> None:
    with world.aged(400):
        model = month(world, "2013-01")
        evaluation = world.store.latest_manifest(P, "evaluation", "2013-01")
        assert evaluation is not None
        world.promote(model, evaluation, "1")
        month(world, "2013-01")  # landed again: everything of the champion is superseded
    with world.aged(100):
        month(world, "2013-01")
    found = world.sweep()
    assert kinds(found)["output"] == 5, "the second landing, which was superseded too, is nobody's"
    world.whole(model.path)
    world.whole(evaluation.path)
    for kept in (model, evaluation):
        assert world.store.exists(f"{kept.attempt}/config.json"), "`orrery reproduce` reads it"
        assert world.store.exists(f"{kept.attempt}/evidence/page.html")


# -- outputs -------------------------------------------------------------------------------------------


def test_outputs_stay_for_ever_unless_the_platform_says_how_long(world: World) -> None:
    with world.aged(1000):
        month(world, "2013-01")
        month(world, "2013-01")
    found = world.sweep(terms=Retention(share=1.0))
    assert set(kinds(found)) == {"attempt"}
    manifests = [p for p in world.paths() if p.endswith("manifest.json")]
    assert len(manifests) == 10
    for path in manifests:
        world.whole(path)


def test_a_superseded_output_is_withdrawn_and_goes_a_day_later(world: World) -> None:
    with world.aged(100):
        old = world.output("ingest", "2013-01")
    with world.aged(80):
        new = world.output("ingest", "2013-01")
    with world.aged(30):
        world.output("validate", "2013-01", {"raw": (new.ref,)})
    assert [p.number for p in world.store.pointers(P, "raw", "2013-01")] == [1, 2]
    found = world.sweep()
    assert kinds(found) | {"attempt": 0} == {"pointer": 1, "output": 1, "attempt": 0}
    assert world.store.manifest(old.path) is None
    assert world.store.exists(old.uri("out")), "who has opened it reads on"
    assert [p.number for p in world.store.pointers(P, "raw", "2013-01")] == [2]
    assert kinds(world.sweep()) == {}, "the same day changes nothing more"
    later = world.sweep(ahead=2 * DAY)
    assert kinds(later)["withdrawn"] == 1
    assert not world.store.exists(old.uri("out"))
    world.whole(new.path)
    assert world.store.publish(P, "raw", "2013-01", old, "now") is not None  # numbers go on from the highest
    assert [p.number for p in world.store.pointers(P, "raw", "2013-01")] == [2, 3]


def test_superseded_counts_from_when_the_next_version_came(world: World) -> None:
    with world.aged(500):
        old = world.output("ingest", "2013-01")
    with world.aged(59):
        world.output("ingest", "2013-01")
    world.sweep()
    world.whole(old.path)


def test_what_a_kept_output_was_made_from_stays_down_to_the_raw_data(world: World) -> None:
    with world.aged(300):
        model = month(world, "2013-01")
    with world.aged(299):
        month(world, "2013-01")
    with world.aged(200):
        # An evaluation that counts compares with the old model: it, and all below it, is needed.
        month(world, "2013-02")
        now = world.store.latest_manifest(P, "candidate", "2013-02")
        assert now is not None
        world.output("evaluate", "2013-02", {"candidate": (now.ref,), "champion": (model.ref,)})
    world.sweep()
    world.sweep(ahead=3 * DAY)
    world.whole(model.path)
    for dataset in CHAIN.values():
        for key in world.store.keys(P, dataset):
            found = world.store.latest(P, dataset, key)
            assert found is not None
            world.whole(found.manifest)


def test_a_used_output_is_as_young_as_its_last_use(world: World) -> None:
    with world.aged(300):
        trial = world.output("trial", "2013-01", publish=False, study="a" * 32)
    with world.aged(20):  # the search was run again, and found it done
        told = {"verb": "trial", "key": "2013-01", "folder": f"{P}/runs/again/trial/1", "output": trial.path}
        world.ledger.record(P, "run", told["folder"], "done", "t", told)
    world.sweep()
    world.whole(trial.path)
    world.sweep(ahead=50 * DAY)
    assert world.store.manifest(trial.path) is None


def test_inputs_of_an_attempt_that_is_kept_can_be_read_again(world: World) -> None:
    with world.aged(300):
        raw = world.output("ingest", "2013-01")
        world.output("ingest", "2013-01")
    with world.aged(5):
        folder = world.attempt(world.config("validate", "2013-01", {"raw": (raw.ref,)}, "edited", world.name()))
    world.sweep()
    config = StepConfig.model_validate_json(world.store.read(f"{folder}/config.json"))
    world.whole(config.inputs["raw"][0].path)
    assert world.store.exists(bundle.path_of(config.bundle))


def test_what_is_taken_up_while_it_goes_comes_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the removal a step finds the output done, and publishes it again."""
    with world.aged(200):
        old = world.output("ingest", "2013-01")
        world.output("ingest", "2013-01")
    before = Sweep._of_output

    def meanwhile(self: Sweep, removal: decisions.Removal) -> str:
        said = before(self, removal)
        world.store.publish(P, "raw", "2013-01", old, "now")
        return said

    monkeypatch.setattr(Sweep, "_of_output", meanwhile)
    found = world.sweep()
    assert any("is back" in line for line in found.kept) and "output" not in kinds(found)
    world.whole(old.path)


def test_a_bundle_that_is_taken_up_while_it_goes_comes_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.aged(200):
        month(world, "2013-01")
        digest, other = world.bundle("an edit that was tried once"), world.bundle("another one")
    before = Sweep._delete

    def meanwhile(self: Sweep, paths: list[str]) -> None:
        before(self, paths)
        if bundle.path_of(digest) in paths:
            config = world.config("validate", "2013-01", {}, "code", world.name()).model_copy(update={"bundle": digest})
            world.attempt(config, recorded=False)

    monkeypatch.setattr(Sweep, "_delete", meanwhile)
    found = world.sweep()
    assert world.store.read(bundle.path_of(digest)) == b"an edit that was tried once"
    assert not world.store.exists(bundle.path_of(other))
    assert kinds(found)["bundle"] == 1 and list((world.folder / "held").iterdir()) == []


def test_unreadable_documents_stop_what_they_could_refer_to(world: World) -> None:
    with world.aged(200):
        old = world.output("ingest", "2013-01")
        damaged = world.output("ingest", "2013-01")
        digest = world.bundle("unused")
    with world.aged(10):
        world.store.put(f"{P}/runs/r99/validate-2013-01/1/config.json", b"{torn")
    found = world.sweep()
    assert world.store.manifest(old.path) is not None and world.store.exists(bundle.path_of(digest))
    assert any("cannot be read" in note for note in found.notes)
    assert damaged is not None


def test_another_projects_files_and_strangers_are_left_alone(world: World) -> None:
    with world.aged(500):
        month(world, "2013-01")
        for path in ("notes/readme.txt", "mlflow/1/abc/artifacts/model.onnx", f"{P}/train/{world.name()}/what.bin"):
            world.store.put(path, b"mine")
    found = world.sweep()
    assert world.store.exists("mlflow/1/abc/artifacts/model.onnx") and any("none of Orrery's" in n for n in found.notes)
    with world.aged(500):
        world.bundle("other")
    only = world.sweep(only=P)
    assert "bundle" not in kinds(only), "of one project alone nobody knows who else uses it"


# -- checkpoints, leftovers ----------------------------------------------------------------------------


def saved(world: World, address: str) -> str:
    base = f"{P}/train/{address}/checkpoints"
    world.store.put(f"{base}/000000000100-0000aaaa/part.safetensors", b"weights")
    world.store.put(f"{base}/000000000100-0000aaaa.json", b"{}")
    return base


def test_checkpoints_of_a_training_that_never_finished_go(world: World) -> None:
    dead, alive, waits = world.name(), world.name(), world.name()
    with world.aged(15):
        folders = [saved(world, address) for address in (dead, alive, waits)]
        world.attempt(world.config("train", "2013-01", {}, "code", dead))
    with world.aged(13):
        world.store.put(f"{P}/train/{alive}/lease/000002.json", b"{}")  # another attempt has begun
        world.attempt(world.config("train", "2013-02", {}, "code2", waits), recorded=False)  # is waiting for a machine
    found = world.sweep()
    assert [world.below(folder) != [] for folder in folders] == [False, True, True]
    assert [r.why for r in found.removed if r.kind == "checkpoints"] == [
        "the training has not finished, its last sign of life was 15 days ago"
    ]


def test_documents_of_checkpoints_go_before_their_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.aged(30):
        base = saved(world, world.name())
    before, order = Sweep._delete, []

    def noted(self: Sweep, paths: list[str]) -> None:
        order.extend(paths)
        before(self, paths)

    monkeypatch.setattr(Sweep, "_delete", noted)
    world.sweep()
    assert order == [f"{base}/000000000100-0000aaaa.json", f"{base}/000000000100-0000aaaa/part.safetensors"]


def test_a_sleeping_writer_is_fenced_before_its_files_go(world: World) -> None:
    address = world.name()
    base = f"{P}/validate/{address}"
    with world.aged(3):
        sleeper = Lease(world.store, f"{base}/lease", "r1/validate", f"{P}/runs/r1/validate/1")
        sleeper.acquire()
        world.store.put(f"{base}/a1-0000000a/quarantine/x.parquet", b"rows")
    assert kinds(world.sweep())["leftover"] == 1
    assert world.below(f"{base}/a1-0000000a") == []
    with pytest.raises(OrreryError, match="has taken over"):
        sleeper.check()


def test_a_writer_at_work_and_what_a_manifest_names_stay(world: World) -> None:
    busy, done = world.name(), world.output("validate", "2013-01")
    base = f"{P}/validate/{busy}"
    with world.aged(3):
        world.store.put(f"{base}/a1-0000000a/x", b"rows")
        world.store.put(f"{P}/validate/{done.address}/a2-0000000b/x", b"a twin's, which came second")
        world.store.put(f"{P}/dependents/{done.address}/train.{busy}", b"")
        world.store.put(f"{P}/dependents/{done.address}/train.{world.name()}", b"")
        os.utime(f"{world.store.root}/{done.path}", (world.now - 3 * DAY,) * 2)
        os.utime(f"{world.store.root}/{P}/validate/{done.address}/lease/000001.json", (world.now - 3 * DAY,) * 2)
        for path in [p for p in world.paths() if p.startswith(done.attempt)]:
            os.utime(f"{world.store.root}/{path}", (world.now - 3 * DAY,) * 2)
    world.store.put(f"{base}/lease/000001.json", b"{}")  # renewed just now
    found = world.sweep()
    assert world.store.exists(f"{base}/a1-0000000a/x")
    world.whole(done.path)
    assert kinds(found) == {"leftover": 1, "marker": 2}, found.removed


def test_files_that_never_got_their_name_and_empty_folders_go(world: World) -> None:
    with world.aged(3):
        month(world, "2013-01")
        stray = Path(world.store.root) / P / "runs" / ".config.json.0123456789ab"
        stray.write_bytes(b"{")
        (Path(world.store.root) / P / "runs" / "gone" / "train").mkdir(parents=True)
        (fresh := Path(world.store.root) / P / "runs" / "fresh").mkdir()
        for folder in ("gone/train", "gone"):
            os.utime(Path(world.store.root) / P / "runs" / folder, (world.now - 3 * DAY,) * 2)
    found = world.sweep()
    assert kinds(found) == {"temporary": 1} and not stray.exists()
    assert fresh.exists() and not (fresh.parent / "gone").exists()


def test_only_the_highest_lease_counts(world: World) -> None:
    with world.aged(3):
        for n in range(1, 5):
            world.store.put(f"{P}/champion/lease/{n:06d}.json", b"{}")
            world.store.put(f"{P}/ingest/at-2013-01/lease/{n:06d}.json", b"{}")
    world.sweep()
    assert world.store.names(f"{P}/champion/lease") == ["000004.json"]
    assert world.store.names(f"{P}/ingest/at-2013-01/lease") == ["000004.json"]


# -- what looks wrong ----------------------------------------------------------------------------------


def test_a_large_share_is_refused_and_nothing_goes(world: World) -> None:
    with world.aged(200):
        for _ in range(3):
            month(world, "2013-01")
    before = world.paths()
    found = world.sweep(share=0.25)
    assert found.removed == [] and world.paths() == before
    assert found.refused == [
        "delays: 15 of 15 attempts (100%) would go, and one run may remove 25%",
    ]
    assert world.sweep(share=1.0).removed


def test_a_ledger_of_another_store_is_refused(world: World) -> None:
    with world.aged(200):
        month(world, "2013-01")
        month(world, "2013-01")
    before = world.paths()
    world.ledger = Ledger(f"sqlite:///{world.folder}/other.db")
    found = world.sweep()
    assert "is it this store's ledger?" in found.refused[0]
    assert world.paths() == before


def test_a_listing_that_lacks_what_is_there_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.aged(200):
        model = month(world, "2013-01")
        world.promote(model, model, "1")
    before, complete = world.paths(), inventory.listing
    lacking = lambda store, folder="": (o for o in complete(store, folder) if "/train/" not in o.path)  # noqa: E731
    monkeypatch.setattr("orrery.housekeeping.sweep.listing", lacking)
    with pytest.raises(UserError, match="the listing lacks it"):
        world.sweep()
    assert world.paths() == before


def test_task_logs_go_a_run_at_a_time(world: World) -> None:
    old, used, new = (f"{inventory.LOGS}/dag_id=delays.train/run_id=r{n}" for n in (1, 2, 3))
    with world.aged(40):
        world.store.put(f"{old}/task_id=train/attempt=1.log", b"one")
        world.store.put(f"{old}/task_id=train/attempt=1.log.trigger.7.log", b"two")
        world.store.put(f"{used}/task_id=train/attempt=1.log", b"one")
        world.store.put(f"{inventory.LOGS}/stray.log", b"of no run")
    with world.aged(20):
        world.store.put(f"{used}/task_id=train/attempt=2.log", b"cleared later")
        world.store.put(f"{new}/task_id=train/attempt=1.log", b"one")
    assert kinds(world.sweep()) == {}, "for ever, where nobody says how long"
    terms = TERMS.model_copy(update={"logs": "30d"})
    assert "log" not in kinds(world.sweep(terms=terms, only=P))
    found = world.sweep(terms=terms)
    assert counts(found.removed)["log"] == {"units": 1, "objects": 2, "bytes": 6} and kinds(found) == {"log": 1}
    assert world.below(old) == [] and len(world.below(used)) == 2 and len(world.below(new)) == 1
    assert world.store.exists(f"{inventory.LOGS}/stray.log")
    assert "runs' task logs" in "\n".join(report.lines(found))


def test_a_log_that_is_written_while_its_run_goes_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"{inventory.LOGS}/dag_id=delays.train/run_id=r1"
    with world.aged(40):
        world.store.put(f"{run}/task_id=train/attempt=1.log", b"one")
    before = Sweep._folder

    def meanwhile(self: Sweep, removal: decisions.Removal, first: tuple[str, ...]) -> str:
        world.store.put(f"{run}/task_id=train/attempt=2.log", b"cleared")
        return before(self, removal, first)

    monkeypatch.setattr(Sweep, "_folder", meanwhile)
    found = world.sweep(terms=TERMS.model_copy(update={"logs": "30d"}))
    assert kinds(found) == {} and len(world.below(run)) == 2 and "written in since" in found.kept[0]


def test_a_wrong_clock_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    month(world, "2013-01")
    before = world.paths()
    monkeypatch.setattr("orrery.housekeeping.sweep.time.time", lambda: world.now + 40 * DAY)
    with pytest.raises(UserError, match="clock"):
        world.sweep()
    assert world.paths() == before


def test_one_at_a_time(world: World) -> None:
    month(world, "2013-01")
    with Lease(world.store, "_housekeeping/lease", "housekeeping/other", "other"):
        sweep = Sweep(world.store, world.ledger, TERMS, "mine", patience=0.5)
        with pytest.raises(LeaseHeld):
            sweep()


def test_a_dry_run_says_and_changes_nothing(world: World) -> None:
    with world.aged(200):
        month(world, "2013-01")
        month(world, "2013-01")
    before = world.paths()
    found = world.sweep(dry_run=True)
    assert world.paths() == before and found.removed == []
    said = "\n".join(report.lines(found))
    assert "10 would go" in said and "nothing that is kept refers to it" in said
    assert world.ledger.find(P, "housekeeping") == []


# -- the record ----------------------------------------------------------------------------------------


def test_the_ledger_says_what_went(world: World) -> None:
    with world.aged(200):
        month(world, "2013-01")
    found = world.sweep(run="daily")
    intent, done = world.ledger.find(P, "housekeeping")
    assert intent.phase == "intent" and done.phase == "done" and done.payload == intent.payload
    assert done.payload["removed"]["attempt"] == {
        "units": 5,
        "objects": 15,
        "bytes": done.payload["removed"]["attempt"]["bytes"],
    }
    from orrery import ledger_text

    assert ledger_text.line(intent, [intent, done]) == ""
    assert ledger_text.line(done, [intent, done]).startswith("removed: 5 attempt")
    assert report.told(found)["removed"]["attempt"]["units"] == 5


def test_terms_that_could_touch_what_is_in_use_are_refused() -> None:
    for field_, value in {
        "attempts": "1h",
        "checkpoints": "1h",
        "outputs": "1d",
        "leftovers": "1h",
        "pods": "1m",
    }.items():
        with pytest.raises(ValueError, match="may still be used"):
            Retention.model_validate({field_: value})
    assert Retention().outputs is None


def test_the_whole_of_it_by_the_command_line(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    from orrery.commands import housekeeping

    store = house.store
    store.put("x/y", b"strange")
    machine_ = machine.local._machine()
    left = house.home / "var" / "tmp" / f"{machine_}-999999-abc"
    left.mkdir(parents=True)
    (left / "f").write_bytes(b"1234")
    housekeeping(dry_run=True, project=None, share_=None, as_json=False)
    assert left.exists() and "its step has ended" in capsys.readouterr().out
    housekeeping(dry_run=False, project=None, share_=None, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["on_this_machine"] == {"units": 1, "bytes": 4} and not left.exists()
    with pytest.raises(OrreryError, match="no project"):
        whole.keep(whole.Asked("r", "t", project="../x"), print)


def test_studies_of_searches_that_left_nothing_go(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(platform.load().tuning) / P
    folder.mkdir(parents=True)
    for name in ("a", "b", "c"):
        for suffix in ("", ".lock"):
            (folder / f"{name * 32}.journal{suffix}").write_bytes(b"{}")
            if name != "c":
                os.utime(folder / f"{name * 32}.journal{suffix}", (time.time() - 20 * DAY,) * 2)
    found = machine.studies({P: {"a" * 32}}, Retention())
    assert sorted(one.path.name for one in found) == [f"{'b' * 32}.journal", f"{'b' * 32}.journal.lock"]
    assert machine.studies({}, Retention()) == [], "of a project that the store does not know nothing is known"
    assert len(machine.remove(found, print)) == 2 and len(list(folder.iterdir())) == 4


# -- S3 ------------------------------------------------------------------------------------------------


def test_the_same_on_a_bucket(world: World, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An S3 server gives no object another age than its own: the sweep looks ahead instead."""
    world.store = Store(f"{s3_bucket}/some/prefix")
    old = month(world, "2013-01")
    address = world.name()
    base = saved(world, address)
    world.bundle("never used")
    month(world, "2013-01")
    assert {o.path for o in inventory.listing(world.store, f"{P}/train/{address}")} == {
        f"{base}/000000000100-0000aaaa.json",
        f"{base}/000000000100-0000aaaa/part.safetensors",
    }
    monkeypatch.setattr("orrery.housekeeping.sweep.PAGE", 7)
    found = world.sweep(ahead=100 * DAY)
    assert kinds(found) == {"pointer": 5, "output": 5, "attempt": 10, "checkpoints": 1, "bundle": 1}
    assert world.store.manifest(old.path) is None and world.store.names(old.attempt) == []
    for dataset in CHAIN.values():
        now = world.store.latest(P, dataset, "2013-01")
        assert now is not None
        world.whole(now.manifest)
    later = world.sweep(ahead=102 * DAY)
    assert kinds(later)["withdrawn"] == 5 and not world.store.exists(old.uri("out"))
    assert set(kinds(world.sweep(ahead=102 * DAY))) == {"marker", "lease"}


def test_a_listing_in_pages(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_bucket)
    for i in range(25):
        store.put(f"a/b{i:04d}", b"x")
    monkeypatch.setattr("orrery.housekeeping.inventory.PAGE", 10)
    found = list(inventory.listing(store))
    assert [o.path for o in found] == [f"a/b{i:04d}" for i in range(25)] and found[0].size == 1


# -- the law -------------------------------------------------------------------------------------------

KEYS = ("2013-01", "2013-02")
STEP = st.tuples(
    st.sampled_from(
        [
            "ingest",
            "validate",
            "materialize",
            "train",
            "evaluate",
            "sample",
            "trial",
            "failed",
            "promote",
            "checkpoint",
            "leftover",
        ]
    ),
    st.sampled_from(KEYS),
    st.sampled_from(["one", "two"]),
    st.integers(0, 40),
)


def history(world: World, steps: list[tuple[str, str, str, int]]) -> None:
    """Live through a history, oldest first: each step comes so many days after the one before."""
    age = sum(days for *_, days in steps) + 1.0
    feeds = {"validate": "raw", "materialize": "clean", "train": "features", "evaluate": "candidate"}
    version = 0
    for verb, key, code, days in steps:
        age -= days
        with world.aged(age):
            if verb == "promote":
                model, judged = (world.store.latest_manifest(P, d, key) for d in ("candidate", "evaluation"))
                if model is not None and judged is not None:
                    version += 1
                    world.promote(model, judged, str(version))
                continue
            made_from = feeds.get({"sample": "validate", "trial": "train", "failed": "train"}.get(verb, verb))
            source = world.store.latest_manifest(P, made_from, key) if made_from else None
            if made_from and source is None:
                continue
            inputs = {made_from: (source.ref,)} if source is not None and made_from else {}
            if verb in ("sample", "trial"):
                world.output("validate" if verb == "sample" else "trial", key, inputs, publish=False, code=code)
            elif verb == "failed":
                world.attempt(world.config("train", key, inputs, code, world.name()))
            elif verb == "checkpoint":
                saved(world, world.name())
            elif verb == "leftover":
                world.store.put(f"{P}/score/{world.name()}/a1-0000000a/x", b"1")
            else:
                world.output(verb, key, inputs, code=code)


def needed(world: World) -> None:
    """Assert that all that anybody can ask for is there."""
    for dataset in CHAIN.values():
        for key in world.store.keys(P, dataset):
            now = world.store.latest(P, dataset, key)
            assert now is not None
            world.whole(now.manifest)  # what the planner skips by, and what it hands to the next step
    for entry in world.ledger.find(P, "promotion"):
        for path in (entry.payload["model"], entry.payload["evidence"]["evaluation"]):
            world.whole(path)
            found = world.store.manifest(path)
            assert found is not None and world.store.exists(f"{found.attempt}/config.json")
    for folder in inventory.taken(inventory.listing(world.store)).projects.get(P, inventory.Project()).planned:
        config = StepConfig.model_validate_json(world.store.read(f"{P}/runs/{folder}/config.json"))
        assert world.store.exists(bundle.path_of(config.bundle))
        for refs in config.inputs.values():
            for ref in refs:
                world.whole(ref.path)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing after it is done."""


def killed_after(world: World, calls: int, sweep: Callable[[], Report]) -> None:
    """Sweep, and die at the nth change of the store."""
    left = [calls]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    real = {name: getattr(os, name) for name in ("unlink", "replace", "link")}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in real.items():
            patch.setattr(os, name, dying(function))
        with contextlib.suppress(Killed):
            sweep()


@settings(
    max_examples=30, deadline=None, suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # a world takes a second: shrinking one takes minutes
)  # fmt: skip
@given(steps=st.lists(STEP, min_size=5, max_size=30), kill=st.integers(1, 60))
def test_whatever_goes_nothing_that_is_needed_goes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, str, int]], kill: int
) -> None:
    world = World(tmp_path_factory.mktemp("world"))
    history(world, [*(("ingest", k, "one", 1) for k in KEYS), *steps])
    killed_after(world, kill, lambda: world.sweep(run="killed"))
    needed(world)
    first = world.sweep(run="killed")  # the same run again: its lease is its own
    needed(world)
    assert first.refused == []
    assert kinds(world.sweep()) == {}, "twice is the same as once"
    killed_after(world, kill, lambda: world.sweep(run="killed-later", ahead=3 * DAY))
    needed(world)
    world.sweep(run="killed-later", ahead=3 * DAY)
    needed(world)
    for _ in range(4):  # an output is withdrawn, its files go, what was noted of it goes, its leases
        world.sweep(ahead=6 * DAY)
        needed(world)
    assert set(kinds(world.sweep(ahead=6 * DAY))) <= {"lease"}, "its own, of the run before"


def test_decisions_are_a_pure_function_of_a_listing() -> None:
    found = inventory.taken(
        [Object("delays/train/0123/x", 1, 0.0), Object("../x", 1, 0.0), Object("a/b/c/.x.0123456789ab", 1, 0.0)]
    )
    assert found.unknown.count == 2 and len(found.temporary) == 1
