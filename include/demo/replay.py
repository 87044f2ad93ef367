"""A year of real flights, month by month, through Airflow: `make replay`.

January to March are ingested and the first model is trained. Then each month of April to December lands, is ingested
by a backfill of its partition, and the rest follows by assets: scores by the champion of that moment, labels, the
monitor, a request, a training, the gate. Beside it, without Airflow but through the same steps, the arms with other
seeds and the planted challengers (arms.py). In the end months.py measures and draws what each arm would have been
worth: frozen (the first model for ever), blind (each month's new model, unasked) and gated.

Everything is below var/replay, a house of its own with its own Airflow (port 8090) and MLflow (5510): `make demo` and
the projects of this repository are not touched. A replay that was stopped, or whose Airflow was killed, goes on where
it was; `rm -rf var/replay` (after `make replay-down`) starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orrery import partitions, platform, requests, servers
from orrery.airflow_api import AirflowApi, Run
from orrery.errors import OrreryError, TryAgain, UserError
from orrery.ledger import Ledger
from orrery.local import interpreter, venvs
from orrery.store import Store

PROJECT = "flight_delay"
HERE = Path(__file__).resolve().parent
FIRST = ("2013-01", "2013-02", "2013-03")
MONTHS = tuple(f"2013-{month:02d}" for month in range(4, 13))
# Whose candidates can still serve a month of the replay.
ENDS = (FIRST[-1], *MONTHS[:-1])
ARMS = ("frozen", "blind", "gated")
DAGS = ("ingest", "request", "score", "labels", "monitor")
PARTS = ("dags", "plugins", "include", "docker", "airflow_settings.yaml")
DEFAULTS = {"ORRERY_AIRFLOW_PORT": "8090", "ORRERY_MLFLOW_PORT": "5510"}
# Addresses of the house that the shell belongs to, which are not the replay's.
FOREIGN = ("ORRERY_STORE", "ORRERY_LEDGER", "ORRERY_MLFLOW", "ORRERY_DATA", "ORRERY_FEAST", "ORRERY_PROJECTS",
           "ORRERY_AIRFLOW_DB", "ORRERY_MLFLOW_DB", "ORRERY_CACHE", "ORRERY_PLATFORM", "ORRERY_TUNING")  # fmt: skip
# Of a month's runs, until somebody should look. Airflow waits up to five minutes for a worker that was killed.
PATIENCE_S = 900.0
STILL_S = 60.0
console = Console(highlight=False, soft_wrap=True)


def house(root: Path) -> Path:
    """Make the replay's own house, and point this process and all that it starts to it."""
    home = root / "var" / "replay"
    home.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        link = home / part
        if not link.is_symlink():
            link.symlink_to(root / part)
    os.environ.setdefault("ORRERY_VENVS", str(venvs()))
    os.environ["ORRERY_HOME"] = str(home)
    for name in FOREIGN:
        os.environ.pop(name, None)
    for name, value in DEFAULTS.items():
        os.environ[name] = os.environ.get(name.replace("ORRERY_", "ORRERY_REPLAY_"), value)
    return home


class Replay:
    """The year as it goes by in Airflow."""

    def __init__(self, home: Path, api: AirflowApi) -> None:
        self.home, self.api = home, api
        self.book, self.store = Ledger(platform.load().ledger), Store(platform.load().store)
        self.began = time.monotonic()

    def month(self, *months: str) -> None:
        """Land months, backfill their ingest, and wait until all that follows from them has ended."""
        if self._settled(months):
            self.say(f"{months[-1]}: done before")
            return
        land(months)
        there = {run.partition_key for run in self.api.runs(f"{PROJECT}.ingest")}
        new = [month for month in months if month not in there]
        if new:
            first, last = partitions.bounds(new[0], "month")[0], partitions.bounds(new[-1], "month")[1]
            self.api.backfill(f"{PROJECT}.ingest", first, last - timedelta(seconds=1), {"reason": "make replay"})
        self._settle(months)

    def _settle(self, months: tuple[str, ...]) -> None:
        """Wait until the months' runs have ended; start anew what of Airflow has died meanwhile."""
        began = moved = time.monotonic()
        seen: object = None
        while True:
            try:
                if self._settled(months):
                    return
                now = [(run.dag_id, run.run_id, run.state) for run in self._runs()]
                if now != seen:
                    seen, moved = now, time.monotonic()
                still = time.monotonic() - moved > STILL_S
                if still and any(server.state != "healthy" for server in servers.statuses()):
                    raise TryAgain("Airflow is not healthy")
            except TryAgain as e:
                console.print(f"[yellow]{escape(e.message)}[/]: starting it again")
                servers.up(console=Console(quiet=True))
                moved = time.monotonic()
            if time.monotonic() - began > PATIENCE_S:
                open_ = ", ".join(
                    f"{run.dag_id} {run.partition_key} {run.state}" for run in self._runs() if not run.done
                )
                raise TryAgain(
                    f"{months[-1]} has not ended after {PATIENCE_S:.0f} s: {open_ or 'no run is open'}",
                    hint=f"look at {self.api.url}, then `make replay` again: it goes on where it was",
                )
            time.sleep(1.0)

    def _settled(self, months: tuple[str, ...]) -> bool:
        """Tell whether all that follows from these months has ended well. Raises `UserError` for a red run."""
        runs = self._runs()
        for run in runs:
            if run.done and not run.ok:
                raise UserError(f"{run.dag_id} {run.partition_key} failed:\n{self.api.failures(run)}")
        ended = {(run.dag_id, run.partition_key) for run in runs if run.ok}
        # Without a champion nothing is scored, so there is nothing to be monitored.
        dags = DAGS[:3] if months == FIRST else DAGS
        expected = {(f"{PROJECT}.{dag}", month) for month in months for dag in dags}
        asked = requests.find(self.book, PROJECT)
        return expected <= ended and all(run.done for run in runs) and not any(request.open for request in asked)

    def _runs(self) -> list[Run]:
        mine = (run for run in self.api.runs() if run.dag_id.startswith(f"{PROJECT}."))
        return [run for run in mine if run.dag_id != f"{PROJECT}.watch"]

    def say(self, text: str) -> None:
        """Say something with the time since the start."""
        console.print(f"{time.monotonic() - self.began:5.0f} s  {text}")

    def told(self, month: str) -> str:
        """Return what came of a month, in a line."""
        health = self._last("monitor", month)
        parts = [f"monitor: {health.get('verdict')}"] if health else []
        numbers = health.get("metrics", {}) if health else {}
        if "observed" in numbers:
            promised = f", promised {numbers['promised']:.4f}" if "promised" in numbers else ""
            parts.append(f"AUC {numbers['observed']:.4f}{promised}")
        parts.append(f"gate: {self.decided(month) or 'nothing was trained'}")
        return "; ".join(parts)

    def decided(self, month: str) -> str:
        """Return what the gate said of the training that ended with this month."""
        gates = [e.payload for e in self.book.find(PROJECT, "decision") if e.payload["verb"] == "gate"]
        mine = [p for p in gates if p["key"].endswith(f"..{month}")]
        if not mine:
            return ""
        promoted = mine[-1]["verdict"] == "promote"
        reasons = mine[-1]["reasons"]  # of a refusal, what speaks against it comes first
        why = (
            next((r for r in reasons if "the champion of" in r and "95 %" in r), reasons[0]) if promoted else reasons[0]
        )
        return f"{'promoted' if promoted else 'kept'}: {why}"

    def _last(self, verb: str, key: str) -> dict[str, Any]:
        found = [
            e.payload for e in self.book.find(PROJECT, "run") if (e.payload["verb"], e.payload["key"]) == (verb, key)
        ]
        return found[-1] if found else {}

    # -- what the arms were worth ------------------------------------------------------------------

    def plan(self, arms: Path) -> dict[str, Any]:
        """Return what months.py measures: which model served which month, by arm and seed."""
        scores = {month: self._needed("scores", month) for month in MONTHS}
        served = {m: self.store.manifest(path) for m, path in scores.items()}
        gated = {m: manifest.inputs["model"][0].path for m, manifest in served.items() if manifest}
        candidates = {end: self._needed("candidate", self._window(end)) for end in ENDS}
        seeds = {"0": self._arms(candidates, gated, self.store)}
        for file in sorted(arms.glob("seed-*.jsonl")):
            lines = {line["end"]: line for line in map(json.loads, file.read_text().splitlines())}
            before = {end: line["candidate"] for end, line in lines.items()}
            champions = {m: lines[end]["champion"] for m, end in zip(MONTHS, ENDS, strict=True)}
            seeds[file.stem.removeprefix("seed-")] = self._arms(
                before, champions, Store(f"file://{arms}/{file.stem}/store")
            )
        return {
            "store": _folder(self.store),
            "months": list(MONTHS),
            "seeds": seeds,
            "scores": scores,
            "marks": [[m, self.decided(m)] for m in MONTHS],
        }

    def _arms(self, candidates: dict[str, str], gated: dict[str, str], store: Store) -> dict[str, Any]:
        blind = {month: candidates[end] for month, end in zip(MONTHS, ENDS, strict=True)}
        frozen = dict.fromkeys(MONTHS, candidates[ENDS[0]])
        return {"store": _folder(store), "frozen": frozen, "blind": blind, "gated": gated}

    def _window(self, end: str) -> str:
        return f"{FIRST[0]}..{end}"

    def _needed(self, dataset: str, key: str) -> str:
        found = self.store.latest(PROJECT, dataset, key)
        if found is None:
            raise UserError(f"the replay has no {dataset} of {key}", hint="make replay again: it makes what is missing")
        return found.manifest


def _folder(store: Store) -> str:
    return store.uri.removeprefix("file://")


def land(months: tuple[str, ...]) -> None:
    """Play the upstream system: land these months where the platform's `data` says."""
    script("land.py", "--out", platform.load().data, "--months", *months, path=str(venvs() / "upstream"))


def script(name: str, *args: str, path: str = "") -> None:
    """Run a script of this folder in the `ml` environment. Raises `UserError` with what it said."""
    env = {**os.environ, **({"PYTHONPATH": path} if path else {})}
    argv = [str(interpreter("ml")), str(HERE / name), *args]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


@contextmanager
def beside(home: Path) -> Iterator[Callable[[], Path]]:
    """Have the arms follow in a process of their own; yields what waits for them and returns their folder."""
    arms, log = home / "var" / "arms", home / "var" / "log" / "arms.log"
    arms.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    store = _folder(Store(platform.load().store))
    argv = [sys.executable, str(HERE / "arms.py"), "--store", store, "--arms", str(arms), *ENDS]
    with log.open("ab") as output:
        env = {**os.environ, "ORRERY_PARENT": str(os.getpid())}
        process = subprocess.Popen(argv, env=env, stdout=output, stderr=output)
    try:

        def wait() -> Path:
            while process.poll() is None:
                time.sleep(0.5)
            if process.returncode:
                raise UserError(f"the arms failed:\n{log.read_text()[-3000:]}", hint=f"see {log}")
            return arms

        yield wait
    finally:
        process.terminate()
        process.wait()


def tell(home: Path) -> dict[str, Any]:
    """Bring the house up, play the year, measure; return the report."""
    began = time.monotonic()
    servers.up()
    with AirflowApi.of() as api, beside(home) as arms:
        api.wait_for_dags(*(f"{PROJECT}.{dag}" for dag in (*DAGS, "watch", "train")))
        # Here the backfill says what is ingested when; the sensor would find each month as well.
        api.pause(f"{PROJECT}.watch")
        replay = Replay(home, api)
        replay.month(*FIRST)
        if replay.book.champion(PROJECT) is None:
            raise UserError("there is no champion after the first window", hint=replay.decided(FIRST[-1]))
        replay.say(f"{FIRST[-1]}: {escape(replay.told(FIRST[-1]))}")
        for month in MONTHS:
            replay.month(month)
            replay.say(f"{month}: {escape(replay.told(month))}")
        replay.say("the year is over in Airflow; waiting for the other seeds and the planted challengers")
        plan = replay.plan(arms())
        planted = [json.loads(line) for line in (home / "var" / "arms" / "planted.jsonl").read_text().splitlines()]
    out = home / "var" / "report"
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    script("months.py", str(out / "plan.json"), str(out))
    report: dict[str, Any] = json.loads((out / "replay.json").read_text())
    report |= {"planted": planted, "marks": plan["marks"], "seconds": round(time.monotonic() - began, 1)}
    report["at"] = datetime.now(UTC).isoformat(timespec="seconds")
    (out / "replay.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def show(report: dict[str, Any], home: Path) -> None:
    """Print the closing tables."""
    table = Table(box=None, title="AUC by month, mean over seeds", title_justify="left", title_style="bold")
    for column in ("month", *ARMS, "Airflow's own (seed 0)", "decided when its labels were in"):
        table.add_column(column, justify="left" if column in ("month", "decided when its labels were in") else "right")
    for month, mark in report["marks"]:
        cells = [f"{_mean([by[month] for by in report['auc'][arm].values()]):.4f}" for arm in ARMS]
        table.add_row(month, *cells, f"{report['served'][month]:.4f}", escape(mark.partition(":")[0]))
    means = report["mean"]
    table.add_row("mean", *(f"[bold]{means[arm]:.4f}[/]" for arm in ARMS), "", "")
    console.print(table)
    less = {arm: f"{means['gated'] - means[arm]:+.4f}" for arm in ARMS}
    console.print(
        f"\ngated less frozen {less['frozen']}, less blind {less['blind']}"
        f" ({len(report['auc']['gated'])} seeds; no refit after the gate: what was judged is what serves)"
    )
    planted = report["planted"]
    refused = sum(line["bad_verdict"] == "kept" for line in planted)
    better = sum(line["good_is_better"] for line in planted)
    accepted = sum(line["good_verdict"] == "promote" for line in planted)
    console.print(
        f"planted bad challengers refused: {refused} of {len(planted)}; better ones found better: {better} of "
        f"{len(planted)}, promoted: {accepted} (the others were not surely above the baseline)"
    )
    out = home / "var" / "report"
    console.print(f"[bold]picture:[/] {out / 'replay.png'}   [bold]table:[/] {out / 'replay.md'}")
    console.print(f"spent {report['seconds']:.0f} s; its Airflow still runs, to look at: `make replay-down` stops it")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> int:
    """Entry of `make replay`; 0 when the year went by."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--down", action="store_true", help="stop the replay's Airflow and MLflow")
    options = parser.parse_args()
    try:
        home = house(platform.home())
        if options.down:
            servers.down()
            return 0
        report = tell(home)
    except (OrreryError, OSError) as e:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[bold red]the replay stopped:[/] {escape(str(e))}"
        )
        return e.exit_code if isinstance(e, OrreryError) else 64
    except KeyboardInterrupt:
        console.print("\nstopped; `make replay` goes on where it was, `make replay-down` stops its servers")
        return 130
    show(report, home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
