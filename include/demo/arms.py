"""The replay's arms beside Airflow's: other seeds, and challengers that were planted, through the same steps.

Each arm is a store and a ledger of its own. As soon as Airflow has made a month's features, every arm takes them up
(hard links: not a byte is copied), trains on the window that ends with the month, evaluates, and asks the gate, by the
engine's own planner and runner. What the gate accepts is the arm's champion from then on.

An arm begins with the model of the first window as its champion, whatever the gate thinks of it: what is compared is
what retraining adds to one and the same start.

    seed-1, seed-2   the loop with other seeds than the spec's
    planted          a model that is not good (one epoch of large batches) challenges the champion of seed-1: it must be
                     refused; then the planted one is the champion, and the candidate of seed-1 must be better

One line of JSON per month and arm in ARMS/<arm>.jsonl; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from orrery import partitions, platform, requests
from orrery.contract import Result
from orrery.errors import INTERRUPTED, Interrupted, OrreryError, TryAgain
from orrery.ledger import Ledger
from orrery.local import LocalProcess
from orrery.parent import follow_parent
from orrery.plan import Planner, Request
from orrery.runner import run
from orrery.store import Store

PROJECT = "flight_delay"
SEEDS = (1, 2)
PLANTED = "planted"
# What Airflow has made of a month, which an arm takes up: outputs, and which of them counts.
MADE = ("ingest", "validate", "materialize", "datasets/raw", "datasets/clean", "datasets/features")
BAD = {"epochs": 1, "batch_size": 4096}
BAD_SEED = 99
LOOK_EVERY_S = 2.0


class Arm:
    """A loop without Airflow: its own store and ledger below `home`."""

    def __init__(self, home: Path, name: str) -> None:
        self.name, self.home, self.told = name, home / name, home / f"{name}.jsonl"
        self.home.mkdir(parents=True, exist_ok=True)
        os.environ["ORRERY_STORE"] = f"file://{self.home}/store"
        os.environ["ORRERY_LEDGER"] = f"sqlite:///{self.home}/ledger.db"
        self.planner = Planner(PROJECT)
        self.book = Ledger(platform.load().ledger)

    def lines(self) -> list[dict[str, Any]]:
        """Return what has been done, oldest first. A last line that was cut off is none."""
        if not self.told.exists():
            return []
        return [json.loads(line) for line in self.told.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def tell(self, line: Mapping[str, Any]) -> None:
        """Add a line, in one write."""
        text = "".join(json.dumps(one) + "\n" for one in (*self.lines(), line))
        part = self.told.with_suffix(".part")
        part.write_text(text)
        part.replace(self.told)

    def take_up(self, folder: Path, *parts: str) -> None:
        """Link what another store has and this one has not."""
        for part in parts:
            for file in (f for f in (folder / PROJECT / part).rglob("*") if f.is_file()):
                mine = self.home / "store" / file.relative_to(folder)
                mine.parent.mkdir(parents=True, exist_ok=True)
                if not mine.exists():
                    with suppress(FileNotFoundError):  # a temporary file of a step that is still at work
                        os.link(file, mine)

    def window(self, end: str) -> tuple[str, ...]:
        """Return the partitions of the window that the calendar would ask for."""
        spec, there = self.planner.spec, self.planner.store.keys(PROJECT, "features")
        return partitions.window(requests.training_window(spec, end, there), spec.grain)

    def step(self, verb: str, window: tuple[str, ...], what: str, **options: Any) -> Result:
        """Carry one step to its end."""
        # A run of its own for each process: what a killed one has left behind may still be ending.
        name = f"replay-{self.name}-{window[-1]}-{what}-{os.getpid()}"
        for attempt in Retrying(
            stop=stop_after_attempt(5), wait=wait_fixed(10), retry=retry_if_exception_type((TryAgain, Interrupted))
        ):
            with attempt:
                number = attempt.retry_state.attempt_number
                request = Request(PROJECT, verb, window, name, verb, number, actor="replay", options=options)
                return run(self.planner, request, LocalProcess())
        raise AssertionError("tenacity raises what it gives up on")

    def train(self, window: tuple[str, ...], what: str, **options: Any) -> str:
        """Train, and return the manifest of the model, which is the window's candidate now."""
        self.step("train", window, what, **options)
        found = self.planner.store.latest(PROJECT, "candidate", partitions.window_name(window))
        assert found is not None
        return found.manifest

    def judge(self, window: tuple[str, ...], what: str) -> Result:
        """Let the gate decide on the window's candidate against this arm's champion."""
        self.step("evaluate", window, what)
        return self.step("gate", window, what)

    def crown(self, model: str, window: str, key: str, reason: str) -> None:
        """Make a model the champion of this arm."""
        now = self.book.champion(PROJECT)
        if now is not None and now.model == model:
            return
        version = str(int(now.version) + 1 if now else 1)
        payload = {"from": now.version if now else None, "version": version, "model": model}
        self.book.record(
            PROJECT, "promotion", key, "done", "replay", {**payload, "window": window, "reason": reason, "evidence": {}}
        )


def seed_month(arm: Arm, end: str, seed: int) -> dict[str, Any]:
    """Carry one month of an arm that differs by its seed."""
    window = arm.window(end)
    name = partitions.window_name(window)
    candidate = arm.train(window, "candidate", seed=seed)
    verdict = arm.judge(window, "candidate")
    first = arm.book.champion(PROJECT) is None
    if first or verdict.verdict == "promote":
        arm.crown(candidate, name, end, "the arm's start" if first else "the gate promoted it")
    champion = arm.book.champion(PROJECT)
    assert champion is not None
    return {
        "end": end,
        "window": name,
        "candidate": candidate,
        "verdict": "start" if first else verdict.verdict,
        "reasons": verdict.reasons,
        "champion": champion.model,
    }


def planted_month(arm: Arm, end: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """Let a planted bad model challenge, and be challenged. `before` is the line of seed-1 for this month."""
    window = arm.window(end)
    name = partitions.window_name(window)
    bad = arm.train(window, "bad", seed=BAD_SEED, overrides=BAD)
    arm.crown(before["champion"], name, f"{end}-true", "the champion of seed-1")
    refused = arm.judge(window, "bad")
    last = next((line["bad"] for line in reversed(arm.lines())), bad)
    arm.crown(last, name, f"{end}-bad", "planted")
    arm.train(window, "good", seed=SEEDS[0])
    accepted = arm.judge(window, "good")
    better = next(c for c in accepted.facts["checks"] if c["name"] == "better_than_champion")
    return {
        "end": end,
        "window": name,
        "bad": bad,
        "bad_verdict": refused.verdict,
        "bad_reasons": refused.reasons,
        "good_verdict": accepted.verdict,
        "good_reasons": accepted.reasons,
        "good_is_better": better["passed"],
    }


def wait_for(store: Store, end: str) -> None:
    """Wait until Airflow has made a month's features."""
    while end not in store.keys(PROJECT, "features"):
        time.sleep(LOOK_EVERY_S)


def main() -> int:
    """Follow Airflow through the months; 0 when all arms are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="folder of the store that Airflow's steps write to")
    parser.add_argument("--arms", type=Path, required=True, help="folder of the arms")
    parser.add_argument("ends", nargs="+", help="months, such as 2013-03, whose windows are trained on")
    options = parser.parse_args()
    # The step that is running ends with this process, also when that is told to stop or the replay dies.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))
    follow_parent()
    try:
        source = Store(f"file://{options.store}")
        for end in options.ends:
            wait_for(source, end)
            follow(options.store, options.arms, end)
    except OrreryError as e:
        print(f"the replay's arms: {e}", file=sys.stderr)
        return e.exit_code if isinstance(e, TryAgain) else 64
    return 0


def follow(store: Path, home: Path, end: str) -> None:
    """Carry all arms through one month."""
    for seed in SEEDS:
        arm = Arm(home, f"seed-{seed}")
        arm.take_up(store, *MADE)
        if end not in [line["end"] for line in arm.lines()]:
            arm.tell(seed_month(arm, end, seed))
    true = Arm(home, f"seed-{SEEDS[0]}")
    before = next(line for line in true.lines() if line["end"] == end)
    arm = Arm(home, PLANTED)
    arm.take_up(store, *MADE)
    arm.take_up(true.home / "store", "train")
    if end not in [line["end"] for line in arm.lines()]:
        arm.tell(planted_month(arm, end, before))


if __name__ == "__main__":
    sys.exit(main())
