"""pods: what 200 pods at once ask of the API server, and what our operator adds to each; beside Airflow's own operator.

One cluster (tests/cluster, a process of its own) whose containers only sleep: all begin together and end spread over the
second half of two minutes, as steps do. Each operator's 200 tasks are carried as Airflow carries them: a worker executes and
defers, one event loop runs all the triggers, a worker resumes. The rival is KubernetesPodOperator(deferrable=True) with
its defaults (a poll each 2 s), which neither plans nor records anything; longer pods cost it more, us nothing.

`pods_requests`: requests of ours per pod; the ratio is against the rival's (bar 0.2).
`pods_overhead`: seconds that ours adds to a pod's own time: execute (plan, write, create, defer), from the container's
end to the trigger's event, resume (read the result, judge, record, delete); the ratio is against the rival's (bar 0.5 s).
Airflow's own hop (about 2 s, see README) is in neither.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tests", "tests/core"):
    sys.path.insert(0, str(ROOT / folder))
PODS, RUN_S = 200, 120.0
PLATFORM = """\
version: 1
environments:
  airflow: {image: "orrery/airflow:1"}
compute:
  cpu-light: {cpu: 10m, memory: 64Mi}
kubernetes: {connection: cluster}
"""


# -- the cluster, a process of its own -----------------------------------------------------------------


def serve(state: Path) -> None:
    """Serve until standard input ends. Containers end when `go` is there, spread over the second half of the time."""
    from cluster.api import Cluster

    chance = random.Random(0)

    async def play(pod: dict[str, Any], say: Callable[[str], None]) -> int:
        say("the step begins")
        while not (state / "go").exists():
            await asyncio.sleep(0.2)
        await asyncio.sleep(float((state / "go").read_text()) * chance.uniform(0.5, 1.0))
        say("the step ends")
        if folder := (pod["metadata"].get("annotations") or {}).get("orrery/folder"):
            result = {"version": 1, "status": "done", "output": "made", "digest": "made"}
            (state / "store" / folder / "result.json").write_text(json.dumps(result))
        (state / "ends" / pod["metadata"]["name"]).write_text(str(time.time()))
        return 0

    with Cluster(state / "cluster", play=play) as cluster:
        print(cluster.url, cluster.connection(), flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def served(state: Path) -> Iterator[tuple[str, str]]:
    """Yield the URL and an Airflow connection of a new cluster."""
    for name in ("store", "ends"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "go").unlink(missing_ok=True)
    argv = [sys.executable, __file__, "--serve", str(state)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        url, _, connection = process.stdout.readline().strip().partition(" ")
        yield url, connection
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def requests(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/_cluster/requests", timeout=30) as answer:
        return dict(json.loads(answer.read()))


# -- one operator's tasks --------------------------------------------------------------------------------


def context(task: str, number: int) -> Any:
    ti = SimpleNamespace(
        dag_id="delays.score", task_id=task, try_number=1, start_date=datetime.now(UTC), map_index=-1,
        run_id=f"r{number}", xcom_push=lambda key, value: None, xcom_pull=lambda **_: None,
    )  # fmt: skip
    run = SimpleNamespace(
        dag_id="delays.score", run_id=f"r{number}", run_type="manual", clear_number=0, conf={}, partition_key=None,
        triggering_user_name="eve", logical_date=None,
    )  # fmt: skip
    store = SimpleNamespace(get=lambda *_, **__: None, set=lambda *_, **__: None, delete=lambda *_, **__: None)
    return {
        "ti": ti, "dag_run": run, "run_id": f"r{number}", "dag": SimpleNamespace(parent_dag=None, dag_id="delays.score"),
        "params": {"partition": "2013-01"}, "task_state_store": store, "task": None,
    }  # fmt: skip


def ours(number: int) -> Any:
    from orrery.orchestration.pods import PodStepOperator

    operator = PodStepOperator(task_id="probe", project="delays", verb="probe", compute="cpu-light")
    operator._options = lambda _: {"value": float(number)}  # type: ignore[method-assign]
    return operator


def stock(number: int) -> Any:
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

    return KubernetesPodOperator(
        task_id=f"t{number}", name=f"stock-{number}", namespace="orrery", image="orrery/airflow:1", cmds=["orrery"],
        kubernetes_conn_id="cluster", deferrable=True, do_xcom_push=False,
    )  # fmt: skip


def carry(make: Callable[[int], Any], state: Path, url: str) -> dict[str, float]:
    """Carry all tasks to their end; return requests per pod and the seconds that were added to each."""
    from airflow.sdk.exceptions import TaskDeferred

    executed: list[float] = []
    waits: list[tuple[int, Any]] = []
    for number in range(PODS):
        began = time.perf_counter()
        try:
            make(number).execute(context(f"t{number}", number))
        except TaskDeferred as deferral:
            path, kwargs = deferral.trigger.serialize()
            waits.append((number, (deferral, path, json.loads(json.dumps(kwargs, default=str)), kwargs)))
        executed.append(time.perf_counter() - began)
    assert len(waits) == PODS, f"{len(waits)} tasks deferred"
    events = asyncio.run(wait([w[1] for w in waits], state))
    lags, resumed = [], []
    for (number, (deferral, *_)), (event, at) in zip(waits, events, strict=True):
        name = event.get("pod") or event["name"]
        lags.append(at - float((state / "ends" / name).read_text()))
        began = time.perf_counter()
        getattr(make(number), deferral.method_name)(
            context(f"t{number}", number), event=event, **(deferral.kwargs or {})
        )
        resumed.append(time.perf_counter() - began)
    asked = requests(url)
    print(json.dumps(asked), file=sys.stderr)
    return {
        "requests": sum(asked.values()) / PODS, "execute": statistics.mean(executed),
        "lag": statistics.mean(lags), "resume": statistics.mean(resumed),
    }  # fmt: skip


async def wait(deferrals: list[Any], state: Path) -> list[tuple[dict[str, Any], float]]:
    """Be the triggerer: one loop for all; return each event and when it came."""
    from importlib import import_module

    async def one(path: str, kwargs: dict[str, Any]) -> tuple[dict[str, Any], float]:
        module, _, name = path.rpartition(".")
        trigger = getattr(import_module(module), name)(**kwargs)
        event = await anext(trigger.run())
        return dict(event.payload), time.time()

    tasks = [asyncio.create_task(one(path, kwargs)) for _, path, _, kwargs in deferrals]
    await asyncio.sleep(5)  # all have begun to watch or to poll
    (state / "go.part").write_text(str(RUN_S))
    (state / "go.part").rename(state / "go")
    return list(await asyncio.gather(*tasks))


def measure(make: Callable[[int], Any], state: Path) -> dict[str, float]:
    with served(state) as (url, connection):
        os.environ["AIRFLOW_CONN_CLUSTER"] = connection
        return carry(make, state, url)


def prepare(home: Path) -> None:
    """Make the house of ours, and Airflow's; before either is imported."""
    os.environ.update(
        AIRFLOW_HOME=str(home / "airflow"), AIRFLOW__CORE__LOAD_EXAMPLES="False", AIRFLOW__LOGGING__LOGGING_LEVEL="ERROR",
        AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{home}/airflow.db",
    )  # fmt: skip
    import core_house
    import core_verbs

    house = core_house.build(home / "house")
    (house.home / "include" / "platform.yaml").write_text(PLATFORM)
    os.environ.update(core_house.environment(house) | {"ORRERY_PROFILE": "kubernetes"})
    core_verbs.register()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    home = Path(tempfile.mkdtemp(prefix="bench-pods-"))
    try:
        prepare(home)
        logging.disable(logging.WARNING)
        state = home / "house"
        mine = measure(ours, state)
        rival = measure(stock, home / "stock")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    added, theirs = (sum(m[part] for part in ("execute", "lag", "resume")) for m in (mine, rival))
    print(f"ours {mine}\nstock {rival}", file=sys.stderr)
    parts = ", ".join(f"{part} {mine[part]:.3f}" for part in ("execute", "lag", "resume"))
    against = f"KubernetesPodOperator deferrable, {PODS} pods of {RUN_S / 2:.0f}-{RUN_S:.0f} s"
    rows = [
        {"name": "pods_requests", "value": round(mine["requests"], 3), "unit": "requests/pod",
         "ratio": round(mine["requests"] / rival["requests"], 3), "against": f"{against}: {rival['requests']:.1f}"},
        {"name": "pods_overhead", "value": round(added, 3), "unit": "s/pod", "ratio": round(added / theirs, 3),
         "against": f"the same: {theirs:.2f} s; ours: {parts}"},
    ]  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
