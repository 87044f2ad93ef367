"""What came of one run, verdict first: from the ledger, and from Airflow the state of what has not ended yet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orrery import attempts, budgets, platform, requests
from orrery.attempts import Attempt, folder_of
from orrery.budgets import Budgets
from orrery.contract import Result
from orrery.errors import OrreryError
from orrery.ledger import Entry, Ledger
from orrery.orchestration import links
from orrery.spec import load_model

# The order in which a run's tasks are told; what is not named comes last.
ORDER = (
    *("watch", "ingest", "validate", "request", "materialize", "train", "evaluate", "gate", "approve", "register"),
    *("promote", "rollback", "score", "labels", "monitor", "report"),
)
KNOWLEDGE = ("collect", "chunk", "embed", "index", "evaluate", "gate", "promote")

# Tone of a word: good, attention, bad, quiet (nothing happened), live (it still goes on).
TONES = {
    **dict.fromkeys(("promoted", "rolled back", "scored", "done", "none", "promote", "success", "approved"), "good"),
    **dict.fromkeys(("watch", "waiting for approval", "asked", "up for retry", "stopped"), "attention"),
    **dict.fromkeys(("failed", "retrain", "upstream failed", "rejected"), "bad"),
    **dict.fromkeys(("running", "queued", "scheduled", "deferred", "up for reschedule", "restarting"), "live"),
}
ENDED = frozenset({"success", "failed"})
STATUS = {
    "user": "failed: someone must act",
    "try_again": "failed: something outside was not available",
    "interrupted": "stopped",
    "bug": "failed",
}


@dataclass(frozen=True)
class Task:
    """One task of the run as Airflow has it; seconds is None until it has ended."""

    name: str
    state: str
    attempt: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """The run as Airflow has it. `name` is how store and ledger call it; `first`, before it was ever cleared."""

    project: str
    dag_id: str
    run_id: str
    name: str
    state: str
    partition: str = ""
    source: str = ""
    by: str = ""
    why: str = ""
    asked: str = ""
    started: str = ""
    ended: str = ""
    first: str = ""
    tasks: tuple[Task, ...] = ()


def tone(word: str) -> str:
    """Return how a word is to be coloured: good, attention, bad, live or quiet."""
    return TONES.get(word, "bad" if word.startswith("failed") else "quiet")


def read(book: Ledger, run: Run) -> dict[str, Any]:
    """Return all that the Verdict tab shows."""
    entries = book.find(run.project, "run", prefix=f"{run.project}/runs/{run.name}/")
    approvals = book.find(run.project, "approval", prefix=f"{run.name}/")
    name = (run.first or run.name) if run.dag_id.endswith(".rollback") else run.name
    changes = [
        e
        for e in book.find(run.project, "promotion", "rollback", phase="done", prefix=name)
        if re.fullmatch("(-[0-9a-f]{8})?", e.key.removeprefix(name))  # runner._intend's names
    ]
    steps = _steps(run, _last(entries))
    for step in steps:
        mine = [e for e in entries if (e.payload.get("verb"), e.payload.get("key")) == (step["verb"], step["key"])]
        step["tried"] = _tried(run.project, step["verb"], attempts.of(mine), step["again"])
    live = run.state not in ENDED
    return {
        "project": run.project,
        "dag_id": run.dag_id,
        "run_id": run.run_id,
        "state": run.state,
        "live": live,
        "verdict": _verdict(run, steps, approvals, changes),
        "asked": {
            "for": run.partition or next((s["key"] for s in reversed(steps) if s["key"]), ""),
            "by": run.by,
            "source": run.source,
            "why": run.why,
            "at": run.asked,
            "started": run.started,
            "ended": run.ended,
        },
        "requests": _requests(book, run),
        "approvals": [_approval(e) for e in approvals],
        "steps": steps,
    }


def _last(entries: Sequence[Entry]) -> dict[tuple[str, str], Entry]:
    """Return how each step ended at last, by (verb, key); one refused before it was known on what was tried again."""
    last: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        verb, key = str(entry.payload.get("verb", "")), str(entry.payload.get("key", ""))
        last.pop((verb, ""), None)
        last[verb, key] = entry
    return last


def _steps(run: Run, last: Mapping[tuple[str, str], Entry]) -> list[dict[str, Any]]:
    """Return one row per step: what the ledger tells, and the tasks of Airflow of which it does not know yet."""
    tasks = {t.name: t for t in run.tasks}
    rows = [_step(run, entry, tasks.get(verb)) for (verb, _), entry in last.items()]
    told = {verb for verb, _ in last}
    rows += [_waiting(task) for task in run.tasks if task.name not in told]
    order = KNOWLEDGE if "collect" in (*told, *tasks) else ORDER
    place = {verb: i for i, verb in enumerate(order)}
    return sorted(rows, key=lambda row: (place.get(row["verb"], len(place)), row["key"]))


def _step(run: Run, entry: Entry, task: Task | None) -> dict[str, Any]:
    p = entry.payload
    outcome = "done"
    if p.get("status") != "done":
        outcome = STATUS.get(str(p.get("status")), "failed")
    elif p.get("skipped"):
        outcome = "skipped" if p.get("verdict") in (None, "skipped") else str(p["verdict"])
    elif p.get("verdict"):
        outcome = str(p["verdict"])
    again = task is not None and task.state in ("running", "up_for_retry", "queued", "scheduled", "restarting")
    number = folder_of(p).rpartition("/")[2]
    return {
        "verb": str(p.get("verb", "")),
        "key": str(p.get("key", "")),
        "state": (task.state if task else "") or "",
        "outcome": outcome,
        "again": again and p.get("status") != "done",
        "attempt": int(number) if number.isdecimal() else 1,
        "seconds": (p.get("seconds") or {}).get("total"),
        "skipped": str(p.get("skipped") or ""),
        "error": str(p.get("error") or ""),
        "reasons": [str(r) for r in p.get("reasons") or ()],
        "metrics": {k: v for k, v in (p.get("metrics") or {}).items() if isinstance(v, int | float)},
        "links": links.shown(Result(links=dict(p.get("links") or {})), run.dag_id),
    }


def _tried(project: str, verb: str, history: Sequence[Attempt], going: bool) -> str:
    """Return what the attempts came to; while it goes on, of how many that may be, and where the next one goes on."""
    if not going:
        return budgets.summary(history)
    try:
        most = budgets.of(verb, load_model(platform.project_folder(project)))
    except OrreryError:  # the project is gone, or being edited
        most = Budgets()
    return ", ".join(part for part in (most.told(history), budgets.goes_on(history)) if part)


def _waiting(task: Task) -> dict[str, Any]:
    said = {"success": "done", "removed": "skipped", "awaiting_input": "waiting for approval", "": "waiting"}
    outcome = said.get(task.state, task.state.replace("_", " "))
    return {
        "verb": task.name,
        "key": "",
        "state": task.state,
        "outcome": outcome,
        "again": False,
        "attempt": task.attempt,
        "seconds": task.seconds,
        "skipped": "",
        "error": "",
        "reasons": [],
        "metrics": {},
        "links": {},
    }


def _verdict(
    run: Run, steps: Sequence[Mapping[str, Any]], approvals: Sequence[Entry], changes: Sequence[Entry]
) -> dict[str, Any]:
    """Return the run's one word, a sentence, and why."""
    failed = [s for s in steps if s["error"] and not s["again"]]
    decided = next((s for s in reversed(steps) if s["verb"] in ("gate", "monitor") and s["outcome"] != "waiting"), None)
    reasons = list(decided["reasons"]) if decided else []
    # A monitor that leaves an earlier partition out, which it cannot judge, is green.
    going = run.state == "success" or any(s["state"] == "running" for s in steps)
    if failed and (run.state == "failed" or not going):
        word = "failed"
        title = f"{failed[0]['verb']} {failed[0]['key']}".strip() + " failed"
        reasons = [*(s["error"] for s in failed), *reasons]
    elif changes:
        change = changes[-1]
        word = "promoted" if change.kind == "promotion" else "rolled back"
        title = f"version {change.payload.get('version')} is champion"
        title += f" after version {change.payload['from']}" if change.payload.get("from") else ""
        reasons = reasons or [r for r in [str(change.payload.get("reason") or "")] if r]
    elif _pending(approvals) or any(t.state == "awaiting_input" for t in run.tasks):
        word, title = "waiting for approval", "the gate says promote; a person is asked"
    elif run.state not in ENDED and not (decided and decided["verb"] == "gate" and decided["outcome"] == "kept"):
        word = "running" if run.state == "running" else run.state
        now = [t.name for t in run.tasks if t.state in ("running", "deferred", "up_for_retry")]
        title = f"{' and '.join(now)} of {run.partition}".removesuffix(" of ") if now else "nothing has started yet"
    elif decided and decided["verb"] == "gate":
        word = {"promote": "promote"}.get(decided["outcome"], decided["outcome"])
        title = "the champion stays" if word == "kept" else "the candidate is better"
    elif decided:
        word = decided["outcome"]
        title = MONITORED.get(word, "")
    else:
        word, title, reasons = _plain(run, steps)
    return {"word": word, "title": title, "reasons": reasons, "tone": tone(word)}


MONITORED = {
    "none": "nothing asks for a new training",
    "watch": "worse than promised, not yet for long enough to act",
    "retrain": "worse than promised: a new training is worth it",
}


def _plain(run: Run, steps: Sequence[Mapping[str, Any]]) -> tuple[str, str, list[str]]:
    """Return word, sentence and reasons of a run without a decision."""
    if run.state == "failed":
        first = next((s for s in steps if s["state"] == "failed"), None)
        return "failed", f"{first['verb']} failed" if first else "the run failed", []
    done = [s for s in steps if s["outcome"] not in ("skipped", "waiting", "upstream failed")]
    reasons = [r for s in steps for r in s["reasons"]]
    if not done:
        return "nothing to do", next((s["skipped"] for s in steps if s["skipped"]), "every step was skipped"), []
    last = done[-1]
    word = "scored" if last["verb"] == "score" else "done"
    return word, f"{last['verb']} {last['key']}".strip(), reasons


def _pending(approvals: Sequence[Entry]) -> bool:
    done = {e.key for e in approvals if e.phase == "done"}
    return any(e.phase == "intent" and e.key not in done for e in approvals)


def _approval(entry: Entry) -> dict[str, Any]:
    p = entry.payload
    asked = entry.phase == "intent"
    return {
        "at": entry.at,
        "answer": "asked" if asked else "approved" if p.get("approved") is True else "rejected",
        "by": ", ".join(map(str, p.get("approvers") or ())) if asked else str(p.get("by") or entry.actor),
        "why": "" if asked else str(p.get("comment") or ""),
        "until": str(p.get("until") or ""),
        "otherwise": str(p.get("otherwise") or ""),
    }


def _requests(book: Ledger, run: Run) -> list[dict[str, Any]]:
    """Return the requests that this run took up."""
    told = ("at", "by", "source", "window", "why")
    return [
        {name: getattr(r, name) for name in told} for r in requests.of_run(book, run.project, run.first or run.name)
    ]
