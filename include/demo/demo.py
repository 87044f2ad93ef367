"""The whole loop on real flights, seen through Airflow's REST API: `make demo`.

January to March land; the watch Dag finds them and has them ingested; their features complete a window, so a
training is asked for and starts by itself; the champion is promoted. April lands and is scored; its labels are in,
so the monitor compares what was promised with what happened, a training on all four months is asked for, and the
gate decides whether it replaces the champion. The demo itself only lands files. Ends non-zero, with the failing
task's log, when any of the runs fails. Writes var/demo/report.json, when all is well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from orrery import platform, requests, servers
from orrery.airflow_api import AirflowApi, Run
from orrery.errors import OrreryError, TryAgain, UserError
from orrery.ledger import Ledger
from orrery.local import interpreter, venvs

PROJECT = "flight_delay"
WINDOW = ("2013-01", "2013-02", "2013-03")
ASKED = f"{WINDOW[0]}..{WINDOW[-1]}"
SCORED = "2013-04"
GROWN = f"{WINDOW[0]}..{SCORED}"
HERE = Path(__file__).resolve().parent
MARKS = {
    "success": "[green]✓[/]",
    "failed": "[red]✗[/]",
    "upstream_failed": "[red]–[/]",
    "running": "[cyan]●[/]",
    "up_for_retry": "[yellow]↻[/]",
    "skipped": "[dim]»[/]",
}
console = Console(highlight=False, soft_wrap=True)


class Story:
    """What is shown while it runs: a table that redraws on a terminal, a line per change in a log."""

    def __init__(self, api: AirflowApi, began: float) -> None:
        self.api, self.began = api, began
        self.watched: list[tuple[str, str]] = []
        self.states: dict[tuple[str, str, str], str] = {}
        self.troubles: dict[str, str] = {}
        # Runs of an earlier demo on the same Airflow are not this one's.
        self.earlier = {run.run_id for run in self.runs()}

    def runs(self) -> list[Run]:
        """Return the runs of the demo's project, earlier ones as well."""
        return [run for run in self.api.runs() if run.dag_id.startswith(f"{PROJECT}.")]

    def wait(self, watched: list[tuple[str, str]], what: str, timeout: float = 600) -> list[Run]:
        """Wait for one run per (Dag, partition) to end; raise with the log when one fails."""
        self.watched = [*self.watched, *(w for w in watched if w not in self.watched)]
        deadline = time.monotonic() + timeout
        live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        if live:
            live.start()
        try:
            while True:
                runs = [self._look(dag, key) for dag, key in watched]
                if live:
                    live.update(self.table())
                self._refuse_failed([run for run in runs if run is not None])
                done = [run for run in runs if run is not None and run.ok]
                if len(done) == len(watched):
                    return done
                if time.monotonic() > deadline:
                    logs = "".join(f"\n{log}" for log in self.troubles.values())
                    raise TryAgain(
                        f"{what} has not ended after {timeout:.0f} s{logs}", hint="see `make status` and Airflow's UI"
                    )
                time.sleep(1.0)
        finally:
            if live:
                live.stop()

    def _refuse_failed(self, runs: list[Run]) -> None:
        for run in runs:
            if run.done and not run.ok:
                raise UserError(f"{run.dag_id} {_key(run)} failed:\n{self.api.failures(run)}")

    def _look(self, dag: str, key: str) -> Run | None:
        runs = [run for run in self.api.runs(dag) if _key(run) == key and run.run_id not in self.earlier]
        if not runs:
            return None
        for task in self.api.tasks(runs[0]):
            state, at = task.state or "waiting", (dag, key, task.task_id)
            if self.states.get(at) != state:
                self.states[at] = state
                if state == "up_for_retry":
                    # Airflow will try for ten minutes and more: say now what is wrong.
                    self.troubles[task.task_id] = self.api.failures(runs[0], state=state, lines=30)
                    console.print(escape(self.troubles[task.task_id]))
                if not console.is_terminal and state in ("success", "failed", "skipped", "up_for_retry"):
                    spent = f" ({task.seconds:.0f} s)" if task.seconds else ""
                    console.print(f"{time.monotonic() - self.began:5.0f} s  {dag} {key} {task.task_id}: {state}{spent}")
        return runs[0]

    def settle(self, timeout: float = 300) -> None:
        """Wait for the runs that nobody waited for (each month asks for its scores); raise when one failed."""
        deadline = time.monotonic() + timeout
        while True:
            # The watch Dag always runs.
            runs = [r for r in self.runs() if r.run_id not in self.earlier and r.dag_id != f"{PROJECT}.watch"]
            self._refuse_failed(runs)
            open_ = [f"{run.dag_id} {_key(run)}" for run in runs if not run.done]
            if not open_:
                return
            if time.monotonic() > deadline:
                raise TryAgain(f"not ended after {timeout:.0f} s: {', '.join(open_)}", hint="see Airflow's UI")
            time.sleep(1.0)

    def table(self) -> Table:
        """Return the runs and the states of their tasks."""
        table = Table(box=None, show_header=False, pad_edge=False)
        for dag, key in self.watched:
            tasks = [f"{MARKS.get(s, '·')} {t}" for (d, k, t), s in self.states.items() if (d, k) == (dag, key)]
            table.add_row(f"[bold]{dag}[/]", key, "  ".join(tasks))
        table.add_row(f"[dim]{time.monotonic() - self.began:.0f} s[/]", "", "")
        return table


def _key(run: Run) -> str | None:
    """Return the partition or the window that a run is about: an event's, or what it was asked for."""
    return run.partition_key or run.conf.get("partition") or run.conf.get("window")


def land(months: tuple[str, ...]) -> None:
    """Play the upstream system: land these months where the platform's `data` says."""
    env = {**os.environ, "PYTHONPATH": str(venvs() / "upstream")}
    argv = [str(interpreter("ml")), str(HERE / "land.py"), "--out", platform.load().data, "--months", *months]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the upstream data could not be landed:\n{done.stdout}{done.stderr}")


def measure(partition: str) -> dict[str, Any]:
    """Return how good the scores of a partition were."""
    argv = [str(interpreter("ml")), str(HERE / "measure.py"), PROJECT, partition]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=platform.home(), check=False)
    if done.returncode:
        raise UserError(f"the scores could not be measured:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def timed(seconds: dict[str, float], name: str, do: Callable[[], Any]) -> Any:
    """Do something and note how long it took."""
    began = time.monotonic()
    value = do()
    seconds[name] = round(time.monotonic() - began, 1)
    return value


def tell() -> dict[str, Any]:
    """Bring everything up, run the story, and return the report."""
    began, seconds = time.monotonic(), dict[str, float]()
    book = Ledger(platform.load().ledger)
    before = len(book.find(PROJECT, "run"))
    timed(seconds, "servers", servers.up)
    with AirflowApi.of() as api:
        runs = loop(api, book, began, seconds)
    quality = timed(seconds, "measure", lambda: measure(SCORED))
    seconds["total"] = round(time.monotonic() - began, 1)
    steps = [e.payload for e in book.find(PROJECT, "run")[before:]]
    verdict, evaluation = _last(steps, "gate", ASKED), _last(steps, "evaluate", ASKED)
    health, retrained = _last(steps, "monitor", SCORED), _last(steps, "gate", GROWN)
    asked = requests.find(book, PROJECT, GROWN)[-1]
    return {
        "verdict": verdict["verdict"],
        "reasons": verdict["reasons"],
        "monitor": {k: health.get(k) for k in ("verdict", "reasons", "metrics")},
        "request": {"window": asked.window, "source": asked.source, "by": asked.by, "why": asked.why},
        "retrained": {k: retrained.get(k) for k in ("verdict", "reasons")},
        "holdout": evaluation["metrics"],
        "scored": quality,
        "seconds": seconds,
        "steps": [{k: p.get(k) for k in ("verb", "key", "skipped", "seconds")} for p in steps],
        "runs": runs,
    }


def loop(api: AirflowApi, book: Ledger, began: float, seconds: dict[str, float]) -> dict[str, str]:
    """Land the months; all the rest follows by itself. Return the ids of the trainings and the scoring."""
    dags = ("watch", "ingest", "request", "train", "score", "labels", "monitor")
    api.wait_for_dags(*(f"{PROJECT}.{dag}" for dag in dags))
    story = Story(api, began)
    try:
        return tasks(api, book, story, seconds)
    finally:
        if console.is_terminal:  # in a log each change has a line
            console.print(story.table())


def tasks(api: AirflowApi, book: Ledger, story: Story, seconds: dict[str, float]) -> dict[str, str]:
    """Follow the runs in their order; return the ids of the trainings and the scoring."""
    asked_before = {request.window for request in requests.find(book, PROJECT)}
    console.print(f"landing {WINDOW[0]} to {WINDOW[-1]} from the upstream system")
    timed(seconds, "land", lambda: land(WINDOW))
    ingest = [(f"{PROJECT}.ingest", key) for key in WINDOW]
    timed(seconds, "ingest", lambda: story.wait(ingest, "ingest"))
    if ASKED in asked_before:
        # A window is asked for by itself once; a second demo asks as a person would.
        api.trigger(f"{PROJECT}.train", {"window": ASKED, "reason": "make demo, again"})
    train = timed(seconds, "train", lambda: story.wait([(f"{PROJECT}.train", ASKED)], "training", 900))[0]
    if book.champion(PROJECT) is None:
        why = "; ".join(_reasons(book)) or "see the task `gate`"
        raise UserError("there is no champion: the gate kept the candidate", hint=why)
    console.print(f"landing {SCORED}")
    timed(seconds, "land_april", lambda: land((SCORED,)))
    timed(seconds, "ingest_april", lambda: story.wait([(f"{PROJECT}.ingest", SCORED)], "ingest"))
    score = timed(seconds, "score", lambda: story.wait([(f"{PROJECT}.score", SCORED)], "scoring"))[0]
    timed(seconds, "monitor", lambda: story.wait([(f"{PROJECT}.monitor", SCORED)], "monitoring"))
    if GROWN in asked_before:
        api.trigger(f"{PROJECT}.train", {"window": GROWN, "reason": "make demo, again"})
    again = timed(seconds, "retrain", lambda: story.wait([(f"{PROJECT}.train", GROWN)], "the second training", 900))[0]
    story.settle()
    return {"train": train.run_id, "score": score.run_id, "retrain": again.run_id}


def _last(steps: list[dict[str, Any]], verb: str, key: str) -> dict[str, Any]:
    """Return how a step ended at last."""
    return next(p for p in reversed(steps) if (p["verb"], p["key"]) == (verb, key))


def _reasons(book: Ledger) -> list[str]:
    """Return the reasons of the gate's last decision, the failed checks first."""
    decisions = [e.payload for e in book.find(PROJECT, "decision") if e.payload["verb"] == "gate"]
    return list(decisions[-1]["reasons"]) if decisions else []


def show(report: dict[str, Any]) -> None:
    """Print the closing table."""
    quality, holdout = report["scored"], report["holdout"]
    table = Table(
        title=f"{PROJECT}: champion version {quality['model_version']}, which scored {SCORED}",
        title_justify="left",
        title_style="bold",
        box=None,
    )
    # On a second run with another model the gate may have kept the champion: the holdout's figure is the candidate's.
    who = "champion" if report["verdict"] == "promote" else "candidate, kept out"
    for column in ("AUC", "champion", "baseline"):
        table.add_column(column, justify="left" if column == "AUC" else "right")
    table.add_row(f"holdout, end of March ({who})", f"{holdout['auc']:.4f}", f"{holdout['baseline_auc']:.4f}")
    table.add_row(
        f"{SCORED} ({quality['rows_with_label']:,} flights)", f"{quality['auc']:.4f}", f"{quality['baseline_auc']:.4f}"
    )
    console.print(table)
    told("verdict on the first model", report["verdict"], report["reasons"])
    console.print(f"[bold]scored:[/] {quality['rows_scored']:,} of {quality['rows']:,} rows of {SCORED}")
    told(f"monitor of {SCORED}", report["monitor"]["verdict"], report["monitor"]["reasons"])
    asked = report["request"]
    console.print(f"[bold]request:[/] {asked['window']}, {asked['source']}, by {asked['by']}: {escape(asked['why'])}")
    told(f"verdict on {GROWN}", report["retrained"]["verdict"], report["retrained"]["reasons"])
    steps = Table(box=None)
    console.print()
    for column in ("step", "on", "total s", "start", "import", "work", "commit", ""):
        steps.add_column(column, justify="left" if column in ("step", "on", "") else "right")
    for step in report["steps"]:
        s = step["seconds"] or {}
        cells = [f"{s[k]:.1f}" if k in s else "" for k in ("total", "start", "import", "work", "commit")]
        steps.add_row(step["verb"], step["key"], *cells, "skipped" if step["skipped"] else "")
    console.print(steps)
    spent = ", ".join(f"{k} {v:.0f} s" for k, v in report["seconds"].items())
    console.print(f"\n[bold]spent:[/] {spent}")


def told(what: str, verdict: str, reasons: list[str]) -> None:
    """Print a verdict and its reasons."""
    console.print(f"[bold]{what}:[/] {verdict}")
    for reason in reasons:
        console.print(f"  {escape(reason)}")


def main() -> int:
    """Entry of `make demo`; 0 when all went well."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    target = platform.home() / "var" / "demo" / "report.json"
    try:
        target.unlink(missing_ok=True)  # the report of an earlier demo says nothing about this one
        report = tell()
    except (OrreryError, OSError) as e:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]the demo failed:[/] {escape(str(e))}")
        return e.exit_code if isinstance(e, OrreryError) else 64
    except KeyboardInterrupt:
        console.print("\nstopped; the servers still run: `make status`, `make down`")
        return 130
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    console.print(f"[bold]report:[/] {target}")
    servers.status()
    console.print("`make down` stops the servers; `orrery ledger flight_delay` tells who promoted what and why.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
