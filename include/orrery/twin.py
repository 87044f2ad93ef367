"""The laptop's twin of a cluster: a step as a process here, which meets what a cluster does to pods. Light.

What `faults` describe is done to the true process by the true signals; what a kubelet or a scheduler would have said
of it is the `Ending`. So results, causes, budgets and decisions are those of a pod. What befalls an attempt is written
into its document first: the next attempt, of whichever process, is not hit again, and the ledger keeps it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orrery import attempts
from orrery.contract import StepConfig
from orrery.endings import Ending, Kind
from orrery.faults import KINDS, VARIABLE, Fault
from orrery.goodput import OFTEN
from orrery.local import LocalProcess
from orrery.plan import Plan
from orrery.platform import Compute, Platform
from orrery.spec import seconds
from orrery.store import OUTAGE, Store

log = logging.getLogger("orrery.twin")
LOOK_S = 0.05
MEASURE_S = 1.0
GRACE_S = 30.0  # Kubernetes' own, where the class says nothing and the step needs no more
INTERRUPTED, KILLED = 143, 137
# What a cluster says of each: the ending's kind, who ended it in Kubernetes' words, and a sentence.
SAYS: dict[str, tuple[Kind, str, str]] = {
    "image": ("image", "ErrImagePull", 'Failed to pull image "{image}": not found'),
    "config": ("config", "CreateContainerConfigError", 'secret "rehearsal" not found'),
    "preempt": ("interrupted", "TerminationByKubelet", "Pod was terminated in response to imminent node shutdown."),
    "evict": ("interrupted", "EvictionByEvictionAPI", "Eviction API: evicting"),
    "taint": ("interrupted", "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"),
    "delete": ("gone", "", "its pod was deleted"),
    "oom": ("out_of_memory", "OOMKilled", "killed for want of memory: the limit is {limit}, it used {use}"),
    "node_lost": ("node_lost", "NodeNotReady", "its node is silent"),
    "deadline": ("deadline", "DeadlineExceeded", "Pod was active on the node longer than the specified deadline"),
    "quota": (
        "unplaced", "exceeded quota",
        "exceeded quota: rehearsal, requested: requests.memory={limit}, used: requests.memory=0, "
        "limited: requests.memory=0",
    ),
    "unschedulable": ("unplaced", "Unschedulable", "0/1 nodes are available: 1 Insufficient memory."),
}  # fmt: skip


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
        with _prepared(plan, running) as outage, Scene(self, plan, book, running, outage) as scene:
            code = self.local(plan)
        for fault in scene.open:
            self.say(f"rehearsal: {fault.text} has not come: the step ended before")
        return code if scene.fatal is None else self._ending(scene.fatal, plan, code, scene.used)

    def stop(self) -> None:
        """End the step, or the wait for its place. Safe at any time, from any thread."""
        self._stopped.set()
        self.local.stop()

    def _keep_back(self, fault: Fault, plan: Plan, book: Book) -> Ending | None:
        """Keep a step from starting: for a while, for good, or for as long as its class waits."""
        book.record(fault)
        ending = self._ending(fault, plan)
        if not fault.how.waits:
            self.say(f"rehearsal: {fault.text}: {ending.by}: {ending.message}")
            return ending
        longest = fault.wait if fault.wait is not None else float(seconds(self.compute(plan).wait))
        lasts = longest if fault.lasts is None else fault.lasts
        self.say(f"rehearsal: {fault.text}: waits for its place, at most {longest:.0f} s: {ending.message}")
        if self._stopped.wait(min(lasts, longest)):
            return Ending(kind="exited", code=INTERRUPTED, message="told to stop while it waited for its place")
        if lasts >= longest:
            return ending.model_copy(update={"message": f"no place within {longest:.0f} s: {ending.message}"})
        self.say(f"rehearsal: {fault.text}: there is room now")
        return None

    def _ending(self, fault: Fault, plan: Plan, code: int | None = None, used: int = 0) -> Ending:
        kind, by, message = SAYS[fault.kind]
        compute = self.compute(plan)
        environment = self.platform.environments.get(plan.verb.environment)
        image = compute.image or (environment.image if environment else plan.verb.environment)
        if fault.kind == "node_lost":
            code = None  # nobody saw it
        elif code is not None and code < 0:
            code = 128 - code
        return Ending(
            kind=kind,
            message=message.format(image=image, limit=compute.memory, use=f"{used / 2**20:,.0f}Mi"),
            hint=f"this was a rehearsal: {fault.text} ({VARIABLE}, or the run's param)",
            code=code,
            by=by,
        )

    def compute(self, plan: Plan) -> Compute:
        """Return the compute class of a plan; one that platform.yaml does not name is the default one."""
        return self.platform.compute.get(plan.compute, Compute())

    def grace(self, fault: Fault, plan: Plan) -> float:
        """Return the seconds from SIGTERM to SIGKILL."""
        if fault.grace is not None:
            return fault.grace
        given = self.compute(plan).grace
        return float(seconds(given)) if given else max(GRACE_S, plan.outlive)


def launcher(
    local: LocalProcess, faults: tuple[Fault, ...], platform: Platform, say: Callable[[str], None] = log.warning
) -> LocalProcess | Twin:
    """Return what launches a step here: the process alone when nothing is to be rehearsed."""
    return Twin(local, faults, platform, say) if faults else local


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
    """Let the step hear of an outage of its store by a file, and tell how far it is as often as the faults need."""
    with tempfile.TemporaryDirectory(prefix="orrery-twin-") as folder:
        outage = Path(folder) / "outage"
        if any(f.kind == "store" for f in running):
            plan.environment[OUTAGE] = str(outage)
        if any(f.step is not None for f in running):
            plan.environment[OFTEN] = str(LOOK_S)
        yield outage


class Scene:
    """A thread beside the running step that does to it what is due. One of them ends the step: `fatal`."""

    def __init__(self, twin: Twin, plan: Plan, book: Book, faults: list[Fault], outage: Path) -> None:
        self.twin, self.plan, self.book, self.outage = twin, plan, book, outage
        self.open = list(faults)  # what has not come yet
        self.fatal: Fault | None = None
        self.used = 0  # bytes of memory, the most that was seen
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="twin", daemon=True)
        self._began = self._measured = 0.0
        self._until = self._kill = math.inf  # the end of an outage; of the grace

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
            self._measure(now)
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
            self.outage.touch()
            self._until = now + (fault.lasts or 0.0)
            return
        self.fatal = fault
        if fault.kind in ("oom", "node_lost"):
            self._measure(now, surely=True)
            self.twin.local.kill()
        else:
            self.twin.local.tell()
            self._kill = now + self.twin.grace(fault, self.plan)

    def _answer(self) -> None:
        self._until = math.inf
        self.outage.unlink(missing_ok=True)
        self.twin.say("rehearsal: the store answers again")

    def _measure(self, now: float, surely: bool = False) -> None:
        """Look how much memory the step uses, now and then."""
        pid = self.twin.local.pid
        if pid is not None and (surely or now - self._measured >= MEASURE_S):
            self._measured = now
            self.used = max(self.used, memory(pid))


def memory(session: int) -> int:
    """Return how many bytes of memory, without mapped files, the processes of a session use (Linux; elsewhere 0)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                total += _anonymous((folder / "status").read_text())
        except (OSError, ValueError, IndexError):
            continue  # it has ended meanwhile
    return total


def _anonymous(status: str) -> int:
    kilobytes = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))
    return 1024 * sum(map(int, kilobytes))
