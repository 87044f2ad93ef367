"""The step as its own process: what it prints, and that nothing of it is left when it is stopped or killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scoring_house import House, features

from orrery.contract import Result, StepConfig

PATIENCE_S = 90.0


def argv(house: House, config: StepConfig) -> list[str]:
    house.store.put(f"{config.folder}/config.json", config.model_dump_json().encode())
    step = "import sys, time; from orrery.step import main; sys.exit(main(sys.argv[1:], time.time()))"
    root = f"{config.store}/{config.folder}"
    return [sys.executable, "-c", step, "--config", f"{root}/config.json", "--result", f"{root}/result.json"]


def environment(house: House, **more: str) -> dict[str, str]:
    """Hardly anything: the step needs what is in its config, and a mark by which its processes are known."""
    (house.folder / "tmp").mkdir(exist_ok=True)
    own = {"PATH": os.environ["PATH"], "TMPDIR": str(house.folder / "tmp"), "ORRERY_TEST_MARK": str(house.folder)}
    return {**own, **more}


def family(house: House) -> list[str]:
    """Command lines of all live processes that carry this test's mark in their environment."""
    mark, found = f"ORRERY_TEST_MARK={house.folder}".encode(), []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120])
        except OSError:
            continue
    return found


def until(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def java_and_workers(house: House) -> bool:
    running = family(house)
    return any("java" in c for c in running) and sum("pyspark.daemon" in c for c in running) >= 2


@pytest.fixture
def blocked(house: House) -> Iterator[tuple[House, StepConfig, subprocess.Popen[bytes]]]:
    """A step whose workers wait for ever for their model's bytes."""
    model = house.model()
    path = Path(house.store.full(model.uri("model.onnx")))
    path.unlink()
    os.mkfifo(path)
    config = house.config(house.features(features(250_000)), model, params={"spark_master": "local[2]"})
    process = subprocess.Popen(
        argv(house, config), env=environment(house), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    yield house, config, process
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_runs_quietly_with_the_wheels_java_where_the_machine_has_none(house):
    tools = house.folder / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "dirname", "env", "uname", "ps", "cat", "readlink", "nice"):
        if there := shutil.which(name):
            (tools / name).symlink_to(there)
    config = house.config(house.features(features(1_000)), house.model(), params={"spark_master": "local[2]"})
    env = environment(house, PATH=str(tools), ORRERY_CACHE=str(house.folder / "cache"))
    done = subprocess.run(argv(house, config), env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((house.folder / "cache").glob("java-*/bin/java"))) == 1
    result = json.loads(house.store.read(f"{config.folder}/result.json"))
    assert result["metrics"]["rows"] == 1_000
    # Nothing but our own line or two: no warnings of the JVM, no progress bar.
    assert done.stderr == ""
    assert all("INFO" in line for line in done.stdout.splitlines()), done.stdout
    until(lambda: not family(house), "all processes gone")
    assert list((house.folder / "tmp").iterdir()) == []  # no temporary file stays either


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_amid_its_tasks_leaves_no_process_and_nothing_visible(blocked, number):
    house, config, process = blocked
    until(lambda: java_and_workers(house), "the JVM and two workers at work")
    process.send_signal(number)  # to the step alone, not to its process group
    code = process.wait(PATIENCE_S)
    until(lambda: not family(house), f"all processes gone after {number.name}")
    assert code == (143 if number == signal.SIGTERM else -9)
    assert not house.store.exists(f"flights/score/{config.address}/manifest.json")
    assert house.store.latest("flights", "scores", "2013-03") is None
    if number == signal.SIGTERM:
        result = json.loads(house.store.read(f"{config.folder}/result.json"))
        assert result["status"] == "interrupted"
        output = process.stdout.read().decode()
        assert "Traceback" not in output
        assert "py4j" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_spark_starts_leaves_no_process(blocked, number):
    house, _, process = blocked
    until(lambda: any("java" in c for c in family(house)), "a JVM")
    process.send_signal(number)
    process.wait(PATIENCE_S)
    until(lambda: not family(house), f"all processes gone after {number.name}")


def test_killed_between_its_parts_and_the_commit_then_run_again(house):
    table = features(300_000)
    config = house.config(house.features(table), house.model("slow"), params={"spark_master": "local[2]"})
    process = subprocess.Popen(
        argv(house, config), env=environment(house), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    folder = Path(house.store.full(f"flights/score/{config.address}"))
    until(lambda: any(folder.glob("*/parts/part-*.parquet")), "a part is written")
    process.kill()
    process.wait()
    until(lambda: not family(house), "all processes gone")
    assert not (folder / "manifest.json").exists()
    assert house.store.latest("flights", "scores", "2013-03") is None
    again = config.model_copy(update={"attempt": 2, "folder": "flights/runs/r1/score/2"})
    done = subprocess.run(argv(house, again), env=environment(house), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(house.store.read(f"{again.folder}/result.json"))
    manifest = house.store.manifest(result["output"])
    assert house.store.missing_files(manifest) == []
    assert result["metrics"]["rows"] == 300_000
    assert all("/parts/" in f.path for n, f in manifest.files.items() if n.startswith("part-"))
    assert len({f.path.split("/")[0] for f in manifest.files.values()}) == 1  # of the second attempt alone


@pytest.mark.slow
def test_a_bucket_is_read_and_written_without_a_jar(tmp_path, s3_bucket, expected):
    house, table = House(tmp_path, f"{s3_bucket}/orrery"), features(120_000)
    config = house.config(house.features(table), house.model(), params={"spark_master": "local[2]"})
    credentials = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    done = subprocess.run(argv(house, config), env=environment(house, **credentials), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = Result.model_validate_json(house.store.read(f"{config.folder}/result.json"))
    scores = house.scores(result)
    assert scores["key"].equals(table["key"])
    np.testing.assert_allclose(scores["prediction"].to_numpy(), expected("binary", table), rtol=1e-6)


def test_a_jvm_that_is_killed_is_told_in_one_sentence(blocked):
    house, config, process = blocked
    until(lambda: java_and_workers(house), "the JVM and two workers at work")
    for each in Path("/proc").glob("[0-9]*"):
        try:
            ours = str(house.folder).encode() in (each / "environ").read_bytes()
            if ours and (each / "exe").readlink().name == "java":
                os.kill(int(each.name), signal.SIGKILL)
        except OSError:
            continue
    assert process.wait(PATIENCE_S) == 1
    error = json.loads(house.store.read(f"{config.folder}/result.json"))["error"]
    assert error["message"] == "Spark: its JVM ended (exit code -9)"
    assert "out of memory" in error["hint"]
    until(lambda: not family(house), "all processes gone")
