"""A knowledge base from its documents to answers with sources, and what becomes of them overnight: `make demo-rag`.

Orrery's own handbook is collected, cut, embedded, indexed, proven on its labelled questions and made live by the Dag
`handbook.reindex`, as Airflow runs it (`dag.test()`, without a scheduler); a service answers a question. Then one page
changes, one comes, one goes, as on any day; the Dag runs again while the service answers on, and the answers follow.
Works on a copy below var/demo-rag, which stays to be looked at. Ends non-zero when anything is not as it says.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from orrery import platform
from orrery.errors import OrreryError, TryAgain, UserError
from orrery.ledger import Ledger
from orrery.local import interpreter

PROJECT = "handbook"
READY_S = 60.0
# What happens to the documents on that day. The questions whose passage went with a page go with it, as a person who
# removes a page would remove them: else the gate would, rightly, keep the generation that finds less.
CHANGED, WAS, IS = "guides/housekeeping.md", "ten minutes apart", "twenty-five minutes apart"
REMOVED = "guides/sagemaker.md"
ADDED = "guides/maintenance-window.md"
PAGE = """# Maintenance window of the store

The object store is maintained on the first Sunday of each month, from 04:00 to 06:00 UTC. Steps that end within it are
tried again by themselves; nothing needs to be done.

## Before the window

Pause `orrery.housekeeping`: it refuses a store whose listing breaks off, and its refusal would wake somebody.
"""
FIRST = "Which exit code means that the user has to act, and is it retried?"
CHANGE = "How far may this machine's clock and the store's clock be apart before housekeeping removes nothing?"
NEW = "When is the object store's maintenance window?"
GONE = "What does a managed spot job on SageMaker wait for at most?"
console = Console(highlight=False, soft_wrap=True)


class Wrong(UserError):
    """The demo did not come out as it says."""


class Place:
    """Where the demo works: a copy of the project, and a store, a ledger and an Airflow of their own."""

    def __init__(self) -> None:
        self.home = platform.home()
        self.root = self.home / "var" / "demo-rag"
        self.project = self.root / "projects" / PROJECT
        self.log = self.root / "steps.log"

    def make(self) -> None:
        """Begin anew, and point everything here."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(platform.projects_folder() / PROJECT, self.project)
        airflow = self.root / "airflow"
        dags = self.root / "dags"
        dags.mkdir()
        shutil.copy(self.home / "dags" / f"{PROJECT}.py", dags)
        os.environ |= {
            "ORRERY_HOME": str(self.home),
            "ORRERY_PROJECTS": str(self.root / "projects"),
            "ORRERY_STORE": f"file://{self.root / 'store'}",
            "ORRERY_LEDGER": f"sqlite:///{self.root / 'ledger.db'}",
            "ORRERY_PROFILE": "local",
            "AIRFLOW_HOME": str(airflow),
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(self.root / "plugins"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{airflow}/airflow.db",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING",
        }

    def change(self) -> None:
        """Change one page, add one, remove one; the questions follow."""
        documents = self.project / "documents"
        page = documents / CHANGED
        text = page.read_text(encoding="utf-8")
        if WAS not in text or not (documents / REMOVED).is_file():
            raise Wrong(f"the handbook has changed: {CHANGED} must say {WAS!r}, and {REMOVED} must be there")
        page.write_text(text.replace(WAS, IS), encoding="utf-8")
        (documents / ADDED).write_text(PAGE, encoding="utf-8")
        (documents / REMOVED).unlink()
        questions, gone = self.project / "questions.jsonl", Path(REMOVED).name
        lines = questions.read_text(encoding="utf-8").replace(WAS, IS).splitlines(keepends=True)
        questions.write_text("".join(line for line in lines if f'"{gone}"' not in line), encoding="utf-8")


class Airflow:
    """Runs the Dag in this process; what its steps say goes to a file, and a line per step to the terminal."""

    def __init__(self, place: Place) -> None:
        self.place = place
        (place.root / "plugins").mkdir()
        with self._quiet():
            from orrery.orchestration import once

            once.prepare()
        self.told: set[int] = set()

    def reindex(self, reason: str) -> dict[str, dict[str, Any]]:
        """Run the whole Dag; return each step's entry in the ledger. Raises `Wrong` when it fails."""
        over = threading.Event()
        teller = threading.Thread(target=self._tell, args=(over,), daemon=True)
        teller.start()
        try:
            with self._quiet():
                from orrery.orchestration import once

                dags = Path(os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
                state = once.run(dags, f"{PROJECT}.reindex", {"reason": reason})
        finally:
            over.set()
            teller.join()
        if state != "success":
            raise Wrong(f"{PROJECT}.reindex ended {state}", hint=f"its steps' log: {self.place.log}")
        return {e.payload["verb"]: e.payload for e in self._entries()}

    def _entries(self) -> list[Any]:
        return Ledger(os.environ["ORRERY_LEDGER"]).find(PROJECT, "run", phase="done")

    def _tell(self, over: threading.Event) -> None:
        last = False
        while not last:
            last = over.wait(0.5)
            with suppress(OrreryError):
                for entry in self._entries():
                    if entry.id not in self.told:
                        self.told.add(entry.id)
                        console.print(f"  {_line(entry.payload)}")

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Send what Airflow and the steps print to the log file."""
        with self.place.log.open("a") as log:
            sys.stdout.flush()
            sys.stderr.flush()
            kept = os.dup(1), os.dup(2)
            # The terminal stays ours: rich writes to what it was given before.
            console.file = os.fdopen(os.dup(1), "w", buffering=1)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                for handler in logging.getLogger().handlers:
                    handler.flush()
                os.dup2(kept[0], 1)
                os.dup2(kept[1], 2)
                console.file.close()
                console.file = sys.stdout
                for number in kept:
                    os.close(number)


def _line(payload: dict[str, Any]) -> str:
    spent = (payload.get("seconds") or {}).get("total")
    took = f"{spent:5.1f} s" if spent else "       "
    if payload["status"] != "done":
        return f"[red]✗[/] {payload['verb']:9} {escape(str(payload.get('error', payload['status'])))}"
    figures = ", ".join(f"{name} {value:.4g}" for name, value in list((payload.get("metrics") or {}).items())[:5])
    said = payload.get("skipped") or payload.get("verdict") or ""
    return f"[green]✓[/] {payload['verb']:9} {took}  {escape(' · '.join(filter(None, [said[:90], figures])))}"


class Service:
    """The service of `orrery serve`, on a free port of this machine."""

    def __init__(self, place: Place) -> None:
        self.log = place.root / "service.log"
        tokens = place.root / "tokens.yaml"
        python = str(interpreter("serve"))
        base = [python, "-m", "orrery.serving"]
        made = subprocess.run(
            [*base, "token", "demo", "--groups", "oncall", "--tokens", str(tokens)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            raise Wrong(f"no token could be made: {made.stderr.strip()}")
        self.token = made.stdout.strip()
        self.port = _free_port()
        with self.log.open("w") as log:
            argv = [*base, PROJECT, "--port", str(self.port), "--tokens", str(tokens)]
            self.process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)
        self.http.headers["Authorization"] = f"Bearer {self.token}"

    def wait(self) -> None:
        """Wait until it answers. Raises `Wrong` with its last words."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if self.http.get("/health/ready").status_code == 200:
                    return
            time.sleep(0.2)
        raise Wrong(f"the service is not ready\n{self.log.read_text()[-2000:]}")

    def ask(self, question: str) -> dict[str, Any]:
        """Ask; return the answer. Raises `TryAgain` when it is none."""
        got = self.http.post("/query", json={"question": question})
        if got.status_code != 200:
            raise TryAgain(f"{question!r} was answered with {got.status_code}: {got.text[:500]}")
        found: dict[str, Any] = got.json()
        return found

    def generation(self) -> str:
        """Return which generation answers now."""
        return str(self.http.get("/info").json()["generation"])

    def stop(self) -> None:
        """End it."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Asking(threading.Thread):
    """Asks on and on, as people do while an index is made anew."""

    def __init__(self, service: Service) -> None:
        super().__init__(daemon=True)
        self.service, self.over = service, threading.Event()
        self.answered, self.failed, self.generations = 0, list[str](), list[str]()

    def run(self) -> None:
        """Ask twice a second until told to stop."""
        while not self.over.wait(0.5):
            try:
                generation = str(self.service.ask(FIRST)["generation"])
            except (OrreryError, httpx.HTTPError) as e:
                self.failed.append(str(e))
                continue
            self.answered += 1
            if generation not in self.generations:
                self.generations.append(generation)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def show(question: str, answer: dict[str, Any]) -> None:
    """Print a question, its answer and its sources."""
    console.print(f"\n[bold]? {escape(question)}[/]")
    said = "[yellow]abstains[/] " if answer["abstained"] else ""
    console.print(f"  {said}{escape(' '.join(str(answer['answer']).split())[:500])}")
    for source in answer["sources"][:3]:
        where = " › ".join(source["heading"]) if isinstance(source["heading"], list) else source["heading"]
        console.print(f"    [dim]{escape(str(source['uri']))}  {escape(str(where))}  {source['score']:.2f}[/]")
    console.print(f"    [dim]generation {escape(str(answer['generation']))}, model {escape(str(answer['model']))}[/]")


def _told(answer: dict[str, Any]) -> str:
    """Return what an answer says, and what its sources show."""
    return " ".join([str(answer["answer"]), *(str(s["excerpt"]) for s in answer["sources"])])


def _uris(answer: dict[str, Any]) -> list[str]:
    return [str(source["uri"]) for source in answer["sources"]]


def check(wanted: bool, what: str) -> None:
    """Raise `Wrong` unless it holds."""
    if not wanted:
        raise Wrong(f"not as it should be: {what}")
    console.print(f"  [green]✓[/] {what}")


def demo(place: Place, began: float) -> dict[str, Any]:
    """Do it all; return what the report says."""
    report: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    console.print("[bold]Airflow and a copy of the handbook[/]")
    place.make()
    airflow = Airflow(place)
    console.print(f"  ready after {time.monotonic() - began:.0f} s\n[bold]{PROJECT}.reindex, the first night[/]")
    first = airflow.reindex("the first night")
    service = Service(place)
    try:
        service.wait()
        answer = service.ask(FIRST)
        report["first_answer_s"] = round(time.monotonic() - began, 1)
        show(FIRST, answer)
        check(bool(answer["sources"]), f"an answer with sources after {report['first_answer_s']:.0f} s")
        before = {question: service.ask(question) for question in (CHANGE, NEW, GONE)}
        live = service.generation()
        check(REMOVED in " ".join(_uris(before[GONE])), f"{REMOVED} is a source")

        console.print(f"\n[bold]{CHANGED} changes, {ADDED} comes, {REMOVED} goes; {PROJECT}.reindex again[/]")
        place.change()
        asking = Asking(service)
        asking.start()
        second = airflow.reindex("the second night")
        check(second["promote"]["status"] == "done" and not second["promote"].get("skipped"), "it was promoted")
        until = time.monotonic() + READY_S
        while service.generation() == live and time.monotonic() < until:
            time.sleep(0.2)
        asking.over.set()
        asking.join()
        after = {question: service.ask(question) for question in (CHANGE, NEW, GONE)}
        for question, found in after.items():
            show(question, found)
        console.print()
        check(IS in _told(after[CHANGE]) and WAS not in _told(after[CHANGE]), "the changed page answers as it is now")
        check(any(ADDED in uri for uri in _uris(after[NEW])), "the new page is a source")
        check(not any(REMOVED in uri for uri in _uris(after[GONE])), "the removed page is a source no more")
        check(asking.answered > 0 and not asking.failed, f"{asking.answered} questions meanwhile, none failed")
    finally:
        service.stop()
    report |= {
        "seconds": round(time.monotonic() - began, 1),
        "embedded": [run["embed"]["metrics"].get("embedded") for run in (first, second)],
        "questions_meanwhile": asking.answered,
        "metrics": second["evaluate"]["metrics"],
    }
    return report


def main() -> int:
    """Entry of `make demo-rag`."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began, place = time.monotonic(), Place()
    try:
        report = demo(place, began)
    except OrreryError as e:
        console.print(f"[red]error:[/] {escape(str(e))}")
        return e.exit_code
    (place.root / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(
        f"\n[bold]done in {report['seconds']:.0f} s[/]; all of it is in {place.root}: report.json, steps.log, the store"
    )
    orrery = Path(sys.executable).with_name("orrery")
    console.print(f"to look at it: ORRERY_STORE=file://{place.root}/store {orrery} serve {PROJECT}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
