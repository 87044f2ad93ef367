"""The laptop's twin of a cluster: a step as a process here, which meets what a cluster does to pods. Light.

What `faults` describe is done to the true process by the true signals, and what a cluster would tell of its pod is
given to the judge of real pods (`cluster.rehearsed`). So results, causes, budgets and decisions are those of a pod.
What befalls an attempt is written into its document first: the next attempt, of whichever process, is not hit again,
and the ledger keeps it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from orrery import attempts, budgets, lastwords, runner
from orrery.attempts import Attempt
from orrery.cluster.rehearsed import Pod
from orrery.contract import Result, StepConfig
from orrery.endings import Ending
from orrery.errors import INTERRUPTED, Interrupted, TryAgain
from orrery.faults import KINDS, Fault
from orrery.goodput import OFTEN
from orrery.local import LocalProcess
from orrery.placement import placement
from orrery.plan import Planner
from orrery.planner import BasePlanner, Plan, Request, grace
from orrery.platform import Compute, Platform
from orrery.spec import seconds
from orrery.store import OUTAGE, Store

log = logging.getLogger("orrery.twin")
LOOK_S = 0.05
WORDS, AWAY = "last-words", "store-is-away"  # files in a folder of the rehearsal's own


@dataclass
class Twin:
    """Launches a step by `local`, and lets the faults that are about it befall it. `say` is told of each."""

    local: LocalProcess
    faults: tuple[Fault, ...]
    platform: Platform
    say: Callable[[str], None] = log.warning
    _stopped: threading.Event = field(default_factory=threading.Event, init=False)

    def __call__(self, plan: Plan) -> int | Ending:
        book = Book(plan)
        due = [f for f in self.faults if f.meets(plan.config.verb, plan.config.key) and not f.spent(book.before)]
        for fault in (f for kind in KINDS for f in due if f.kind == kind and not f.how.while_it_runs):
            if (ending := self._keep_back(fault, plan, book)) is not None:
                return ending
        running = [f for f in due if f.how.while_it_runs]
        if not running:
            return self.local(plan)
        with _prepared(plan, running) as folder, Scene(self, plan, book, running, folder) as scene:
            code = self.local(plan)
            words = scene.words
        for fault in scene.open if scene.fatal is None else ():
            self.say(f"rehearsal: {fault.text} has not come: the step ended before")
        return code if scene.fatal is None else self._ending(scene.fatal, plan, code, words)

    def stop(self) -> None:
        """End the step, or the wait for its place. Safe at any time, from any thread."""
        self._stopped.set()
        self.local.stop()

    def _keep_back(self, fault: Fault, plan: Plan, book: Book) -> Ending | None:
        """Keep a step from starting: for a while, for good, or for as long as its class waits."""
        book.record(fault)
        pod = self._pod(plan)
        if not fault.how.waits:
            ending = pod.held(fault.kind)
            self.say(f"rehearsal: {fault.text}: {ending.message}")
            return _marked(ending, fault)
        longest = fault.wait if fault.wait is not None else float(seconds(self.compute(plan).wait))
        lasts = longest if fault.lasts is None else fault.lasts
        words, ending = (pod.refused if fault.kind == "quota" else pod.waits)(longest)
        self.say(f"rehearsal: {fault.text}: waits, at most {longest:.0f} s: {words}")
        began = time.monotonic()
        stopped = self._stopped.wait(min(lasts, longest))
        plan.told[runner.WAITED] = plan.told.get(runner.WAITED, 0.0) + time.monotonic() - began
        if stopped:
            return Ending(kind="exited", code=INTERRUPTED, message="was told to stop while it waited to be placed")
        if lasts >= longest:
            return _marked(ending, fault)
        self.say(f"rehearsal: {fault.text}: there is room now")
        return None

    def _ending(self, fault: Fault, plan: Plan, code: int, words: str) -> Ending:
        """Return what a cluster would have made of it. A lost machine is noticed after the time that the fault says."""
        pod = self._pod(plan)
        if fault.kind == "node_lost":
            self._stopped.wait(fault.lasts or 0.0)
            return _marked(pod.lost(fault.lasts or 0.0), fault)
        return _marked(pod.ended(fault.kind, 128 - code if code < 0 else code, words), fault)

    def _pod(self, plan: Plan) -> Pod:
        compute, environment = self.compute(plan), self.platform.environments.get(plan.verb.environment)
        return Pod(plan.config, compute, compute.image or (environment.image if environment else plan.verb.environment))

    def compute(self, plan: Plan) -> Compute:
        """Return the compute class of a plan; one that platform.yaml does not name is the default one."""
        return self.platform.compute.get(plan.compute, Compute())

    def grace(self, fault: Fault, plan: Plan) -> float:
        """Return the seconds from SIGTERM to SIGKILL."""
        if fault.grace is not None:
            return fault.grace
        return float(grace(self.compute(plan), plan.outlive))


def _marked(ending: Ending, fault: Fault) -> Ending:
    """Return an ending that says that it was rehearsed."""
    told = f"this was a rehearsal: {fault.text}"
    return ending.model_copy(update={"hint": "\n  → ".join(filter(None, (told, ending.hint)))})


def launcher(
    local: LocalProcess, faults: tuple[Fault, ...], platform: Platform, say: Callable[[str], None] = log.warning
) -> LocalProcess | Twin:
    """Return what launches a step here: the process alone when nothing is to be rehearsed."""
    return Twin(local, faults, platform, say) if faults else local


def run(
    planner: BasePlanner,
    request: Request,
    faults: tuple[Fault, ...],
    say: Callable[[str], None] = log.warning,
    started: Callable[[Plan], None] | None = None,
) -> Result:
    """Carry a request to its end here, without Airflow: after an attempt that was given a fault comes another at once.

    Budgets and placement are Airflow's. An attempt that fails of itself ends it, as without a rehearsal.
    """
    launch = launcher(LocalProcess(), faults, planner.platform, say)
    most, history = planner.budgets(request.verb), list[Attempt]()
    while True:
        if request.verb == "train" and history and isinstance(planner, Planner):
            place = placement(history, planner.spec.train, planner.platform.compute, datetime.now(UTC))
            request = replace(request, compute=place.compute, placed=place.reason)
        try:
            return runner.run(planner, request, launch, started)
        except (Interrupted, TryAgain, runner.StepFailed) as e:
            history = runner.recorded(planner.ledger, request.project, request.run, request.task, request.key)
            if not faults or not history or not history[-1].injected or most.over(history):
                raise
            request = replace(request, attempt=request.attempt + 1)
            say(f"rehearsal: {e.message}")
            say(f"rehearsal: {budgets.sentence(request.attempt, most, history)}")


class Book:
    """What has befallen the attempts of one task and key, in their documents; this attempt's is written on."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config = plan, plan.config
        self.store = Store(self.config.store)
        self.before = [text for folder in _earlier(self.store, self.config) for text in _injected(self.store, folder)]
        self.mine: list[str] = []

    def record(self, fault: Fault) -> None:
        """Write it down before it is done: whoever dies of it may not be able to."""
        self.mine.append(fault.text)
        self.plan.told["injected"] = list(self.mine)
        attempt = attempts.read(self.store, self.config.folder)
        if attempt is not None:
            told = attempt.model_copy(update={"injected": tuple(self.mine)})
            attempts.write(self.store, self.config.folder, told)


def _earlier(store: Store, config: StepConfig) -> list[str]:
    slot = config.folder.rpartition("/")[0]
    return [f"{slot}/{n}" for n in store.names(slot) if n.isdecimal() and int(n) < config.attempt]


def _injected(store: Store, folder: str) -> tuple[str, ...]:
    attempt = attempts.read(store, folder)
    return attempt.injected if attempt is not None else ()


@contextlib.contextmanager
def _prepared(plan: Plan, running: list[Fault]) -> Iterator[Path]:
    """Let the step write its last words, hear of an outage by a file, and tell how far it is as often as is needed."""
    with tempfile.TemporaryDirectory(prefix="orrery-twin-") as folder:
        here = Path(folder)
        plan.environment[lastwords.VARIABLE] = str(here / WORDS)
        if any(f.kind == "store" for f in running):
            plan.environment[OUTAGE] = str(here / AWAY)
        if any(f.step is not None for f in running):
            plan.environment[OFTEN] = str(LOOK_S)
        yield here


class Scene:
    """A thread beside the running step that does to it what is due. One of them ends the step: `fatal`."""

    def __init__(self, twin: Twin, plan: Plan, book: Book, faults: list[Fault], folder: Path) -> None:
        self.twin, self.plan, self.book, self.folder = twin, plan, book, folder
        self.open = list(faults)  # what has not come yet
        self.fatal: Fault | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="twin", daemon=True)
        self._began = 0.0
        self._until = self._kill = math.inf  # the end of an outage; of the grace

    @property
    def words(self) -> str:
        """What the step said last of itself, as a kubelet keeps it: the memory that it used."""
        try:
            return (self.folder / WORDS).read_text(errors="replace")
        except OSError:
            return ""

    def __enter__(self) -> Scene:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(LOOK_S):
            if self.twin.local.pid is None:
                continue
            now = time.monotonic()
            self._began = self._began or now
            if now >= self._until:
                self._answer()
            if now >= self._kill:
                self.twin.local.kill()
            for fault in list(self.open):
                if self.fatal is None and self._due(fault, now):
                    self._befall(fault, now)

    def _due(self, fault: Fault, now: float) -> bool:
        config = self.plan.config
        if fault.step is not None:
            progress = attempts.progress_of(self.book.store, config.folder)
            return progress is not None and progress.step >= fault.step
        after = fault.moment(config.task, config.key, config.attempt)
        return after is not None and now - self._began >= after

    def _befall(self, fault: Fault, now: float) -> None:
        self.open.remove(fault)
        self.book.record(fault)
        self.twin.say(f"rehearsal: {fault.text}: {fault.how.does}")
        if fault.kind == "store":
            (self.folder / AWAY).touch()
            self._until = now + (fault.lasts or 0.0)
            return
        self.fatal = fault
        if fault.kind in ("oom", "node_lost"):
            self.twin.local.kill()
        else:
            self.twin.local.tell()
            self._kill = now + self.twin.grace(fault, self.plan)

    def _answer(self) -> None:
        self._until = math.inf
        (self.folder / AWAY).unlink(missing_ok=True)
        self.twin.say("rehearsal: the store answers again")
