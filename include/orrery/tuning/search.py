"""A whole search on this machine: its trials a few at a time, each a step in a process of its own, then the decision.

What is committed is not done again, so a search that was broken off goes on where it was. Light.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from orrery import platform
from orrery.contract import Result
from orrery.errors import Interrupted, TryAgain
from orrery.faults import Fault
from orrery.local import LocalProcess, relay
from orrery.plan import Planner, Request
from orrery.runner import StepFailed, run
from orrery.spec import METRICS
from orrery.tuning import planning
from orrery.twin import Twin, launcher

# Attempts of one trial: a process that was killed is taken up again at once, with the same parameters.
TRIES = 4

Say = Callable[[str], None]


@dataclass
class Search:
    """One search, as it goes on. `say` is given a line per trial that has ended; `asked` is the request for `tune`.

    `faults` are rehearsed.
    """

    asked: Request
    say: Say
    faults: tuple[Fault, ...] = ()
    _launchers: list[LocalProcess | Twin] = field(default_factory=list, init=False)
    _stopped: bool = field(default=False, init=False)
    _done: dict[int, Result] = field(default_factory=dict, init=False)
    _told: set[str] = field(default_factory=set, init=False)
    _began: float = field(default_factory=time.monotonic, init=False)

    def run(self) -> Result:
        """Run what is left of the search; return the decision. Raises the first trial's error."""
        terms = planning.terms(Planner(self.asked.project))
        self.say(f"{terms.trials} trials, {min(terms.parallel, terms.trials)} at a time")
        with ThreadPoolExecutor(terms.parallel) as pool:
            futures = {pool.submit(self._trial, number): number for number in range(terms.trials)}
            try:
                self._follow(futures, terms.trials)
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for launcher in list(self._launchers):
                    launcher.stop()
                raise
        return run(Planner(self.asked.project), self.asked, self._launcher(LocalProcess(), "tune"))

    def _launcher(self, local: LocalProcess, name: str) -> LocalProcess | Twin:
        where = platform.load()
        return launcher(local, self.faults, where, lambda line: self.say(f"{name}: {line}"))

    def _follow(self, futures: dict[Future[Result], int], count: int) -> None:
        """Say each end as it comes; raise the first error."""
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
            # FIRST_EXCEPTION wakes for errors alone; the others are seen at the next half second.
            for future in ended | {f for f in waiting if f.done()}:
                waiting.discard(future)
                self._done[futures[future]] = future.result()
                self.say(self._line(futures[future], count))

    def _line(self, number: int, count: int) -> str:
        """Return how a trial ended, how far the search is, and the best so far."""
        result, metric = self._done[number], str(self._done[number].facts.get("primary"))
        value = result.metrics.get(metric)
        ended = f"{metric} {value:.4f}" if value is not None else f"{result.verdict}"
        ended += " (done before)" if result.skipped else f" in {result.seconds.get('total', 0.0):.0f} s"
        values = {n: r.metrics[metric] for n, r in self._done.items() if metric in r.metrics}
        best = max(values, key=lambda n: values[n] if METRICS[metric] else -values[n], default=None)
        found = f"; best: trial {best}, {values[best]:.4f}" if best is not None else ""
        return f"{len(self._done)} of {count}: trial {number}: {ended}{found}{self._left(count)}"

    def _left(self, count: int) -> str:
        fresh = sum(not result.skipped for result in self._done.values())
        left = count - len(self._done)
        if not fresh or not left:
            return ""
        seconds = (time.monotonic() - self._began) / fresh * left
        return f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"

    def _trial(self, number: int) -> Result:
        """Run one trial to its end, in as many attempts as it takes."""
        options = {"number": number}
        asked = replace(self.asked, verb="trial", task=f"trial.{number}", options=options)
        for attempt in range(1, TRIES + 1):
            local = LocalProcess(on_line=lambda line: relay(line, self._heard(number)))
            process = self._launcher(local, f"trial {number}")
            self._launchers.append(process)
            if self._stopped:
                raise Interrupted("the search was stopped")
            try:
                return run(Planner(self.asked.project), replace(asked, attempt=attempt), process)
            except (Interrupted, TryAgain, StepFailed) as e:
                if attempt == TRIES or self._stopped:
                    raise
                self.say(f"trial {number} goes on in attempt {attempt + 1}: {e.message}")
            finally:
                self._launchers.remove(process)
        raise AssertionError("unreachable")

    def _heard(self, number: int) -> Callable[[int, str, dict[str, Any]], None]:
        """Return what is done with a trial's log: warnings are shown; the rest of several at once would be noise."""

        def emit(level: int, event: str, fields: dict[str, Any]) -> None:
            if level >= logging.WARNING and event not in self._told:  # what all trials say is said once
                self._told.add(event)
                self.say(f"trial {number}: {event}")

        return emit
