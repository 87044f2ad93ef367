"""One attempt of a step: every kind of end, and that a kill anywhere leaves nothing half-visible."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import core_verbs
import pytest
from core_house import House, ended
from core_verbs import wait_for

from orrery import lease, step
from orrery.bundle import FORKED
from orrery.contract import Result, StepConfig
from orrery.errors import Fenced, RequestError, TryAgain, UserError
from orrery.lease import Lease
from orrery.step import Work
from orrery.store import Store

OUT = b'{"value":1.0}\n'


def only(house: House) -> bytes:
    """Return the bytes of the one output, which must be whole, published and alone."""
    (manifest,) = house.manifests()
    assert house.store.missing_files(manifest) == []
    (pointer,) = house.store.pointers(house.project, "probed", manifest.key)
    assert pointer.manifest == manifest.path
    return house.store.read(manifest.uri("out.json"))


# -- how it ends -------------------------------------------------------------------------------------


def test_done_then_nothing_more_to_do(house: House) -> None:
    code, result, log = house.step(house.config())
    assert (code, result.status, result.error) == (0, "done", None)
    assert result.metrics == {"value": 1.0}
    assert "probe 2013-01: done" in log
    assert only(house) == OUT
    assert set(result.seconds) == {"start", "import", "work", "commit", "total"}
    assert all(0 <= s <= result.seconds["total"] for s in result.seconds.values())
    (manifest,) = house.manifests()
    assert result.output == manifest.path
    assert result.digest == manifest.digest
    second, again = house.tell(house.config(run="run-2"))
    assert second == 0
    assert again is not None and again.skipped is not None
    assert again.digest == manifest.digest
    assert again.metrics == result.metrics
    assert house.manifests() == [manifest]
    assert only(house) == OUT


@pytest.mark.parametrize(
    ("mode", "code", "status", "kind", "message"),
    [
        ("user", 64, "user", "UserError", "the column is not there"),
        ("again", 75, "try_again", "TryAgain", "the server is down"),
        ("full", 75, "try_again", "TryAgain", "no space left"),
        ("bug", 1, "bug", "ZeroDivisionError", "division by zero"),
        ("exit", 1, "bug", "SystemExit", "0"),
    ],
)
def test_each_kind_of_end(house: House, mode: str, code: int, status: str, kind: str, message: str) -> None:
    config = house.config(mode=mode)
    ended_with, result = house.tell(config)
    assert result is not None and result.error is not None
    assert (ended_with, result.status, result.error.kind) == (code, status, kind)
    assert message in result.error.message
    assert house.manifests() == []
    assert house.store.keys(house.project, "probed") == []
    if status == "bug":
        assert f"mode_{mode}" in result.error.details["traceback"]
        assert "Traceback" in (house.home / "log").read_text()
    else:
        assert "traceback" not in result.error.details
        assert "Traceback" not in (house.home / "log").read_text()
    # What the failed work wrote is gone; the lease is released, so another run need not wait.
    left = [
        p for p in Path(house.home, "store", "delays", "probe").rglob("*") if p.is_file() and "lease" not in p.parts
    ]
    assert left == []
    code, result = house.tell(house.config(run="run-2", mode="done"))
    assert code == 0
    assert only(house) == OUT


@pytest.mark.parametrize("mode", ["fork_return", "fork_raise"])
def test_a_fork_that_comes_back_from_the_work_ends_there(house: House, mode: str) -> None:
    """It must neither commit nor clean up: what it would remove is the output of the process that goes on."""
    code, result = house.tell(house.config(mode=mode))
    assert (code, result and result.metrics) == (0, {"value": 1.0})
    assert only(house) == OUT
    assert (house.marks / "forked").read_text() == str(FORKED)
    log = (house.home / "log").read_text()
    assert "probe 2013-01 has forked: the forked process ends here" in log
    assert (log.count("probe 2013-01: done"), "in the fork" in log) == (1, False)


def test_superseding_is_a_warning_only_when_something_is_stale(house: House) -> None:
    assert house.tell(house.config())[0] == 0
    code, _, log = house.step(house.config(value=2.0, run="run-2"))
    line = next(s for s in log.splitlines() if "supersedes an earlier version" in s)
    assert (code, "stale=nothing" in line, "warning" in line.lower()) == (0, True, False), line
    (before,) = [m for m in house.manifests() if m.result["metrics"] == {"value": 2.0}]
    house.commit("look", "looked", "2013-01", inputs={"probed": (before.ref,)})
    house.store.put_if_absent(
        f"{house.project}/dependents/{before.address}/look.{house.manifests('look')[0].address}", b""
    )
    code, _, log = house.step(house.config(value=3.0, run="run-3"))
    line = next(s for s in log.splitlines() if "supersedes an earlier version" in s)
    assert (code, "look 2013-01" in line, "warning" in line.lower()) == (0, True, True), line


def test_evidence_is_kept_when_the_step_fails(house: House) -> None:
    config = house.config(mode="user")
    _, result = house.tell(config)
    assert result is not None and result.error is not None
    path = f"{config.folder}/evidence/report.html"
    assert result.links == {"report": path}
    assert result.error.hint == "add it"
    assert house.store.read(path) == b"<p>why</p>"


def test_numbers_that_are_not_finite_are_left_out_and_said(house: House) -> None:
    code, result = house.tell(house.config(mode="nan"))
    assert code == 0
    assert result is not None
    assert result.metrics == {"value": 1.0}
    assert "metric auc is not a finite number: nan" in result.reasons
    assert "metric loss is not a finite number: inf" in result.reasons
    done = house.planner().plan(house.request(options={"mode": "done", "marks": str(house.marks)})).done
    assert done is not None and done.metrics == {"value": 1.0}


def test_sigterm_in_the_middle(house: House) -> None:
    config = house.config(mode="wait")
    process = house.start(config)
    wait_for(house.marks / "started")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=60)
    result = house.result(config)
    assert process.returncode == 143
    assert result.status == "interrupted"
    assert result.error is not None and "SIGTERM" in result.error.message
    assert "Traceback" not in log
    assert house.manifests() == []
    (house.marks / "go").touch()
    assert house.tell(house.config(2, mode="wait"))[0] == 0
    assert only(house) == OUT


def test_sigterm_is_not_swallowed_by_a_broad_except(house: House) -> None:
    config = house.config(mode="stubborn")
    process = house.start(config)
    wait_for(house.marks / "started")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert house.result(config).status == "interrupted"
    assert house.manifests() == []


def test_sigterm_at_any_moment_leaves_a_result(house: House) -> None:
    """No moment between the start of the attempt and its end may lose the result document."""
    chance, told = random.Random(7), 0
    for n in range(12):
        config = house.config(n + 1, value=n + 10, mode="chunks")
        child = house.fork(config)
        time.sleep(chance.uniform(0, 0.04))
        os.kill(child, signal.SIGTERM)
        code = ended(child)
        if code == -signal.SIGTERM:
            continue  # before the handler was there: the plain end of a process, which the runner reads as interrupted
        assert code in (0, 143)
        assert house.result(config).status == ("done" if code == 0 else "interrupted")
        told += 1
    assert told


def test_a_result_that_cannot_be_written(house: House, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = f"file://{tmp_path}/file/result.json"
    assert house.tell(house.config(), target)[0] == 64
    assert only(house) == OUT
    log = (house.home / "log").read_text()
    assert "the result could not be written to" in log
    assert house.tell(house.config(mode="again", value=2), target)[0] == 75


def test_a_store_that_is_away_at_the_end_is_waited_for(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, refusals = Store.put_if_absent, tmp_path / "refusals"

    def away(self: Store, path: str, data: bytes) -> bool:
        if path.endswith("manifest.json") and (not refusals.exists() or refusals.stat().st_size < 2):
            with refusals.open("a") as f:
                f.write("x")
            raise TryAgain("the store is away")
        return real(self, path, data)

    monkeypatch.setattr(Store, "put_if_absent", away)
    code, result = house.tell(house.config())  # in a child of this process, which is patched alike
    assert (code, result and result.status) == (0, "done")
    assert refusals.read_text() == "xx" and only(house) == OUT


def test_a_config_that_is_none(house: House) -> None:
    base = house.config()
    (house.home / "store" / "x").mkdir(parents=True)
    result = f"{house.uri}/x/result.json"

    def told(data: bytes | None) -> str:
        uri = f"{house.uri}/x/config.json"
        if data is not None:
            house.store.put("x/config.json", data)
        with pytest.raises(RequestError) as e:
            step._read_config(uri)
        assert step.failed(e.value).status == "user"
        return str(e.value)

    assert "there is no config document" in told(None)
    assert "Invalid JSON" in told(b"{")
    assert "attempt" in told(base.model_dump_json().replace('"attempt":1', '"attempt":"many"').encode())
    assert "password" in told(base.model_dump_json()[:-1].encode() + b', "password": "x"}')
    assert house.tell(base.model_copy(update={"verb": "prob"}), result)[0] == 64
    assert "unknown step" in house.store.read("x/result.json").decode()
    assert house.tell(base.model_copy(update={"params": {"mod": 1}}), result)[0] == 64
    assert "probe: mod: Extra inputs" in house.store.read("x/result.json").decode()


# -- killed ------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_sigkill_at_random_moments_then_once_more(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(3)
    kills = int(os.environ.get("ORRERY_FAULT_KILLS", "15"))
    commits, hits = set(), 0
    for n in range(kills):
        child = house.fork(house.config(n + 1, mode="chunks"))
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        hits += ended(child) == -signal.SIGKILL
        for manifest in house.manifests():  # there or not there, never half
            assert house.store.missing_files(manifest) == []
            commits.add(manifest.digest)
    assert hits
    code, result = house.tell(house.config(kills + 1, mode="chunks"))
    assert (code, result.status if result else None) == (0, "done")
    assert only(house) == OUT
    (manifest,) = house.manifests()
    assert commits <= {manifest.digest}
    assert result is not None and result.digest == manifest.digest
    left = [p for p in Path(house.home, "store", "delays", "datasets").rglob("*") if p.is_file()]
    assert len([p for p in left if not p.name.startswith(".")]) == 1
    fresh = house.config(run="run-9", mode="chunks").model_copy(update={"address": "f" * 32, "publish": False})
    _, other = house.tell(fresh)
    assert other is not None and other.digest == manifest.digest


def test_an_orphan_that_writes_beside_its_retry(house: House) -> None:
    first = house.fork(house.config(1, mode="wait"))
    wait_for(house.marks / "started")
    (house.marks / "started").unlink()
    second = house.fork(house.config(2, mode="wait"))  # the same run and task: it takes over at once
    wait_for(house.marks / "started")
    (house.marks / "go").touch()
    codes = {ended(first), ended(second)}
    first_result, second_result = house.result(house.config(1)), house.result(house.config(2))
    assert second_result.status == "done"
    assert codes <= {0, 143}
    if first_result.status != "done":  # fenced off, unless its retry had committed before it looked
        assert first_result.error is not None and first_result.error.kind == "Fenced"
    assert only(house) == OUT


def test_the_orphan_is_fenced_and_its_late_commit_refused(house: House, tmp_path: Path) -> None:
    config = house.config()
    work = Work(config, house.store, tmp_path)
    with Lease(house.store, f"delays/probe/{config.address}/lease", "run-1/probe", "old") as mine:
        work._lease = mine
        work.write_json("out.json", {"value": 1.0})
        assert house.tell(house.config(2))[0] == 0
        (before,) = house.manifests()
        with pytest.raises(Fenced, match="has taken over"):
            work.commit(Result())
        work._lease = None  # an orphan that looked just before: the manifest is there, and stays
        assert work.commit(Result()) == before
    assert only(house) == OUT


def look(house: House, attempt: int, value: float, marks: Path | None = None) -> StepConfig:
    """Return the config of a verb that observes, as `ingest` does."""
    options = {"mode": "observe", "value": value, "marks": str(marks or "")}
    return house.planner().plan(house.request("look", attempt=attempt, options=options)).config


def test_an_orphan_does_not_publish_what_was_there_before_over_its_retry(house: House) -> None:
    """It commits nothing, since its content is committed already; so it must be fenced where it publishes."""
    assert house.tell(look(house, 1, 1))[0] == 0
    assert house.tell(look(house, 2, 2))[0] == 0
    assert house.tell(look(house, 3, 1))[0] == 0
    orphan = house.fork(look(house, 4, 1, house.marks))
    wait_for(house.marks / "started")
    assert house.tell(look(house, 5, 2))[0] == 0
    (house.marks / "go").touch()
    assert ended(orphan) == 143
    result = house.result(look(house, 4, 1, house.marks))
    assert result.error is not None and result.error.kind == "Fenced"
    now = house.store.latest_manifest("delays", "looked", "2013-01")
    assert now is not None and now.result["metrics"] == {"value": 2.0}
    assert len(house.store.pointers("delays", "looked", "2013-01")) == 4


def test_the_fence_is_asked_again_when_another_has_published_meanwhile(house: House) -> None:
    """Between the look at the lease and the pointer, a retry may do both."""
    old, new = house.commit("look", "other", "1"), house.commit("look", "other", "2")
    asked = []

    def fence() -> None:
        asked.append(1)
        if len(asked) == 1:
            house.store.publish("delays", "looked", "2013-01", new, "now")
            return
        raise Fenced("replaced")

    with pytest.raises(Fenced):
        house.store.publish("delays", "looked", "2013-01", old, "now", fence)
    assert house.store.latest_manifest("delays", "looked", "2013-01") == new


def test_the_result_is_that_of_the_commit_that_stands(house: House, tmp_path: Path) -> None:
    """What was measured beside the content differs between two attempts; it must fit the evidence that is kept."""
    house.tell(look(house, 1, 1))
    (first,) = house.manifests("look")
    changed = json.loads(house.store.read(first.path))
    changed["result"]["metrics"] = {"value": 7.0}
    house.store.put(first.path, json.dumps(changed).encode())
    _, again = house.tell(look(house, 2, 1))
    assert again is not None
    assert again.metrics == {"value": 7.0}
    assert again.skipped is not None and "is committed already" in again.skipped


def files(store: Store, folder: str) -> list[str]:
    found = store.fs.find(store.full(folder))
    return sorted(p.split(f"{folder}/")[1] for p in found if "/lease/" not in p)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize("where", ["work", "dependents", "manifest", "answer"])
def test_what_failed_leaves_no_files(
    house: House, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    """Also what others wrote for the attempt (Spark's workers), and when it fails in the commit."""
    config = house.config()
    config = config.model_copy(update={"inputs": {"raw": (house.commit("ingest", "raw", "2013-01").ref,)}})
    store = house.store if kind == "folder" else Store(request.getfixturevalue("s3_bucket"))
    folder = f"{config.project}/{config.verb}/{config.address}"
    put = Store.put_if_absent

    def run(work: Work, params: object) -> Result:
        work.store.put(f"{work.attempt_folder}/parts/0.parquet", b"rows")
        work.adopt("part", "parts/0.parquet", 4, "0" * 64)
        if where == "work":
            raise UserError("it cannot")
        return Result()

    def failing(self: Store, path: str, data: bytes) -> bool:
        if (where == "dependents" and "/dependents/" in path) or (
            where == "manifest" and path.endswith("manifest.json")
        ):
            raise TryAgain("no space left")
        done = put(self, path, data)
        if where == "answer" and path.endswith("manifest.json"):
            raise TryAgain("the answer was lost")
        return done

    monkeypatch.setattr(core_verbs, "run", run)
    monkeypatch.setattr(Store, "put_if_absent", failing)
    monkeypatch.setattr(step, "COMMITTING_S", 0.0)
    with pytest.raises((UserError, TryAgain)):
        step.execute(config, store, tmp_path, {})
    # A bucket may still take a manifest that it did not answer to: its files are kept.
    kept = where == "answer" or (kind == "bucket" and where == "manifest")
    assert any("parts/0.parquet" in f for f in files(store, folder)) is kept


def test_two_runs_at_once_do_the_work_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    first = house.fork(house.config(run="run-1", mode="wait"))
    wait_for(house.marks / "started")
    second = house.fork(house.config(run="run-2", mode="wait"))
    (house.marks / "go").touch()
    assert (ended(first), ended(second)) == (0, 0)
    assert house.result(house.config(run="run-2")).skipped is not None
    assert only(house) == OUT


def test_a_kill_between_manifest_and_pointer_is_repaired(house: House, tmp_path: Path) -> None:
    config = house.config()
    work = Work(config, house.store, tmp_path)
    work.write_json("out.json", {"value": 1.0})
    manifest = work.commit(Result(metrics={"value": 1.0}))
    assert house.store.latest("delays", "probed", "2013-01") is None
    plan = house.planner().plan(house.request(attempt=2, options={"marks": str(house.marks)}))
    assert plan.done is None  # committed is not enough: nobody finds it
    code, result = house.tell(plan.config)
    assert code == 0
    assert result is not None and result.skipped is not None
    assert house.store.latest_manifest("delays", "probed", "2013-01") == manifest
    assert only(house) == OUT


# -- what is committed -------------------------------------------------------------------------------


def test_damaged_output_is_told_not_overwritten(house: House) -> None:
    config = house.config()
    house.tell(config)
    (manifest,) = house.manifests()
    Path(house.store.full(manifest.uri("out.json"))).unlink()
    code, result = house.tell(house.config(2))
    assert code == 64
    assert result is not None and result.error is not None
    assert "out.json is gone" in result.error.message
    assert "delete that folder" in result.error.hint


def test_a_new_version_supersedes_and_lists_what_is_stale(house: House) -> None:
    house.tell(house.config())
    (old,) = house.manifests()
    child = house.commit("train", "candidate", "2013-01", inputs={"of": (old.ref,)})
    house.store.put_if_absent(f"delays/dependents/{old.address}/train.{child.address}", b"")
    _, result = house.tell(house.config(2, value=2))
    assert result is not None
    assert result.facts["supersedes"] == old.path
    assert result.facts["stale"] == ["train 2013-01"]
    assert [p.supersedes for p in house.store.pointers("delays", "probed", "2013-01")] == [None, old.path]


def test_a_sample_or_a_repeat_publishes_nothing(house: House) -> None:
    code, result = house.tell(house.config(publish=False))
    assert code == 0
    assert result is not None and result.output is not None
    assert house.store.keys("delays", "probed") == []


def test_inputs_are_entered_as_dependents_before_the_commit(house: House) -> None:
    raw = house.commit("ingest", "raw", "2013-01")
    config = house.config().model_copy(update={"inputs": {"raw": (raw.ref,)}})
    house.tell(config)
    (manifest,) = house.manifests()
    assert house.store.dependents(raw) == [manifest]
    assert manifest.inputs["raw"] == (raw.ref,)


def test_no_secret_goes_into_documents(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "ORRERY_SOURCE_FLIGHTS",
        "MLFLOW_TRACKING_PASSWORD",
        "AIRFLOW__CORE__FERNET_KEY",
    ):
        monkeypatch.setenv(name, "hunter2")
    for n, mode in enumerate(("done", "bug", "user"), 1):
        house.tell(house.config(n, mode=mode, value=n))
    texts = [p.read_bytes() for p in (house.home / "store").rglob("*") if p.is_file()]
    assert len(texts) > 10
    assert not any(b"hunter2" in t for t in texts)
    assert "hunter2" not in (house.home / "log").read_text()


def test_a_config_is_frozen_and_small(house: House) -> None:
    config = house.config()
    assert StepConfig.model_validate_json(config.model_dump_json()) == config
    assert len(config.model_dump_json()) < 4000
    with pytest.raises(ValueError, match="frozen"):
        config.key = "2014-01"  # type: ignore[misc]
    with pytest.raises(ValueError, match="less than or equal to 1"):
        StepConfig.model_validate(json.loads(config.model_dump_json()) | {"sample": 2})


def test_inputs_are_checked_against_what_was_planned(house: House, tmp_path: Path) -> None:
    raw = house.commit("ingest", "raw", "2013-01")
    config = house.config().model_copy(update={"inputs": {"raw": (raw.ref, raw.ref), "one": (raw.ref,)}})
    work = Work(config, house.store, tmp_path)
    assert work.inputs("raw") == [raw, raw]
    assert work.input("one") == raw
    assert work.open_input(raw, "out.json").read_bytes() == house.store.read(raw.uri("out.json"))
    with pytest.raises(RequestError, match="needs one input 'raw', was given 2"):
        work.input("raw")
    Path(house.store.full(raw.uri("out.json"))).unlink()
    with pytest.raises(UserError, match="its manifest is not"):
        work.open_input(raw, "out.json")
