"""What a rehearsal is made of: the text of `ORRERY_FAULTS`, or of a Dag's param `faults`, read strictly. Light.

    train: preempt@step=120; score: node_lost@time=3s; *: quota@for=20s

    text    = fault {";" fault}
    fault   = step ":" kind ["@" option {"," option}]
    step    = a verb, or * for all
    option  = name "=" value

`orrery faults` lists the kinds and their options, and says of a text what it would do. `twin` does it.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from orrery.contract import VERBS
from orrery.errors import RequestError, UserError, nearest
from orrery.plan import SAVES
from orrery.platform import Platform, Profile

VARIABLE = "ORRERY_FAULTS"
ALL = "*"
LONGEST = 2000  # characters of a text
Kind = Literal[
    "quota", "unschedulable", "image", "config",
    "preempt", "evict", "taint", "delete", "oom", "node_lost", "deadline", "store",
]  # fmt: skip
MOMENTS = ("step", "time", "random")
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
EVERY = ("partition", "times")
SIGNALLED = (*MOMENTS, "grace")


@dataclass(frozen=True)
class How:
    """One kind of fault: what it does, how an attempt ends by it, its own options, and what it needs of them."""

    does: str
    ends: str
    options: tuple[str, ...] = ()
    needs: str = ""

    @property
    def waits(self) -> bool:
        """Whether the step is kept from starting for a while."""
        return "wait" in self.options

    @property
    def while_it_runs(self) -> bool:
        """Whether it befalls the running step, at a moment."""
        return "time" in self.options


MOMENT = "a moment: step=120, time=30s or random=1/600s"
TOLD = "SIGTERM, the class's grace, SIGKILL"
# In the order in which a cluster meets them: at create, in the scheduler, at the kubelet, while the step runs.
KINDS: dict[Kind, How] = {
    "quota": How("its namespace's quota is used up, the launch waits", "starts, or 75 (Unplaced)", ("for", "wait")),
    "unschedulable": How("no node has room, the launch waits", "starts, or 75 (Unplaced)", ("for", "wait")),
    "image": How("its image is not there", "64 (ImageError)"),
    "config": How("its Secret is not there", "64 (PodConfigError)"),
    "preempt": How(f"its spot node is shut down: {TOLD}", "interrupted", SIGNALLED, MOMENT),
    "evict": How(f"its node is drained: {TOLD}", "interrupted", SIGNALLED, MOMENT),
    "taint": How(f"its node is tainted NoExecute: {TOLD}", "interrupted", SIGNALLED, MOMENT),
    "delete": How(f"somebody deletes its pod: {TOLD}", "interrupted, killed: lost", SIGNALLED, MOMENT),
    "oom": How("it needs more memory than its class has: SIGKILL", "bug (OutOfMemory)", MOMENTS, MOMENT),
    "node_lost": How("its machine loses power: SIGKILL", "interrupted (NodeLost)", (*MOMENTS, "for"), MOMENT),
    "deadline": How(
        f"it takes longer than its class's timeout: {TOLD}", "interrupted, killed: bug (DeadlineExceeded)",
        SIGNALLED, MOMENT,
    ),
    "store": How(
        "its store does not answer", "done, or 75: what it reads and commits fails, a checkpoint may",
        (*MOMENTS, "for"), f"{MOMENT}; and for=10s",
    ),
}  # fmt: skip
OPTIONS = {
    "step": "once that optimiser step is done, of train and trial (step=120)",
    "time": "so long after its process has started (time=30s)",
    "random": "at random, so often on average, each attempt anew (random=1/600s)",
    "seed": "of the random moments; 0 when not given (seed=7)",
    "for": "how long it lasts (for=20s); a wait without it never ends by itself, a lost machine is noticed at once",
    "wait": "instead of the class's wait, for the impatient (wait=5s)",
    "grace": "instead of the class's grace, from SIGTERM to SIGKILL (grace=2s)",
    "partition": "on that partition or window alone (partition=2013-07)",
    "times": "how many attempts of a run's task and partition it befalls; 1 when not given, with `random` all",
}


SAID = {
    "step": "once optimiser step {} is done",
    "time": "{} after its process has started",
    "random": "at random, {} on average",
    "seed": "by seed {}",
    "for": "for {}",
    "wait": "at most {}",
    "grace": "with {} of grace",
}


@dataclass(frozen=True)
class Fault:
    """One fault. Seconds throughout; `text` is how it stands in logs and in the ledger, and tells it from others."""

    target: str
    kind: Kind
    text: str
    options: Mapping[str, str] = field(default_factory=dict, compare=False)
    step: int | None = None
    time: float | None = None
    rate: float | None = None  # per second
    seed: int = 0
    lasts: float | None = None
    wait: float | None = None
    grace: float | None = None
    partition: str = ""
    times: int | None = 1

    @property
    def how(self) -> How:
        """What its kind does."""
        return KINDS[self.kind]

    def meets(self, verb: str, key: str) -> bool:
        """Tell whether it is about a step of that verb on that partition or window."""
        return self.target in (ALL, verb) and self.partition in ("", key)

    def spent(self, before: Iterable[str]) -> bool:
        """Tell whether it has befallen as many earlier attempts as it may; `before` holds what befell them."""
        return self.times is not None and sum(text == self.text for text in before) >= self.times

    def moment(self, task: str, key: str, attempt: int) -> float | None:
        """Return after how many seconds of the attempt it comes; None: an optimiser step decides.

        A random one is drawn by seed, task, partition and attempt: not by the run, so that it can be told again.
        """
        if self.rate is None:
            return self.time
        drawn = hashlib.sha256(f"{self.seed}/{task}/{key}/{attempt}/{self.text}".encode()).digest()
        return random.Random(drawn).expovariate(self.rate)  # noqa: S311  no secret

    def said(self) -> str:
        """Return in a sentence what it does, to whom, when and how often."""
        on = f" on {self.partition}" if self.partition else ""
        who = f"every step{on}" if self.target == ALL else f"{self.target}{on}"
        told = [SAID[name].format(value) for name, value in self.options.items() if name in SAID]
        attempts = "the first attempt" if self.times == 1 else f"the first {self.times} attempts that it can"
        often = "every attempt" if self.times is None else f"{attempts} of a run's task and partition"
        return f"{who}: {self.how.does}; {', '.join([*told, often])}"


def refusal(where: Platform, profile: Profile) -> str:
    """Return why nothing may be rehearsed here, or an empty text."""
    if where.stage == "prod":
        return "nothing is rehearsed in stage prod"
    return "" if profile == "local" else f"faults are injected in the local profile alone, this one is {profile}"


def read(text: str, where: Platform, profile: Profile, source: str = VARIABLE) -> tuple[Fault, ...]:
    """Return the faults of a text, none for an empty one.

    Raises `UserError` where nothing may be rehearsed, `RequestError` that names what is wrong in the text.
    """
    if not text.strip():
        return ()
    if why := refusal(where, profile):
        raise UserError(f"{source} is set, and {why}", hint=f"unset {source}; it says {text.strip()[:80]!r}")
    return parse(text, source)


def parse(text: str, source: str = VARIABLE) -> tuple[Fault, ...]:
    """Return the faults of a text. Raises `RequestError` that names the token, what is allowed, and the nearest."""
    if len(text) > LONGEST:
        raise RequestError(f"{source} has {len(text):,} characters", hint=f"at most {LONGEST:,}")
    parts = [part.strip() for part in re.split(r"[;\n]", text)]
    found: list[Fault] = []
    for part in filter(None, parts):
        fault = _Reader(source, part).fault()
        if fault.text in {f.text for f in found}:
            raise RequestError(f"{source}: {fault.text!r} stands there twice", hint="times=2 makes it come twice")
        found.append(fault)
    if not found:
        raise RequestError(f"{source} holds no fault: {text!r}", hint="such as: train: preempt@step=120")
    return tuple(found)


@dataclass
class _Reader:
    """Reads one fault."""

    source: str
    part: str

    def fault(self) -> Fault:
        target, colon, rest = (piece.strip() for piece in self.part.partition(":"))
        if not colon:
            self._wrong("it names no step", "STEP: KIND@OPTION=VALUE, such as train: preempt@step=120")
        if target != ALL and target not in VERBS:
            self._wrong(f"unknown step {target!r}", nearest(target, (*VERBS, ALL)))
        name, at, tail = (piece.strip() for piece in rest.partition("@"))
        kind = next((kind for kind in KINDS if kind == name), None)
        if kind is None:
            self._wrong(f"unknown kind {name!r}", nearest(name, KINDS))
        options = self._options(kind, tail) if at else {}
        self._complete(kind, target, options)
        told = ",".join(f"{name}={value}" for name, value in options.items())
        return Fault(
            target=target,
            kind=kind,
            text=f"{target}: {kind}{f'@{told}' if told else ''}",
            options=options,
            step=self._count("step", options),
            time=self._seconds("time", options),
            rate=self._rate(options),
            seed=self._count("seed", options, least=0) or 0,
            lasts=self._seconds("for", options),
            wait=self._seconds("wait", options),
            grace=self._seconds("grace", options),
            partition=options.get("partition", ""),
            times=self._count("times", options) or (None if "random" in options else 1),
        )

    def _options(self, kind: Kind, tail: str) -> dict[str, str]:
        """Return the options by name, in the order in which they are listed: the same fault has one text."""
        allowed = (*KINDS[kind].options, *(("seed",) if "random" in KINDS[kind].options else ()), *EVERY)
        found: dict[str, str] = {}
        for piece in tail.split(","):
            name, equals, value = (part.strip() for part in piece.partition("="))
            if not equals or not name or not value:
                self._wrong(f"{piece.strip()!r} is not NAME=VALUE", f"{kind} takes {', '.join(allowed)}")
            if name not in allowed:
                self._wrong(f"{kind} takes no option {name!r}", nearest(name, allowed))
            if name in found:
                self._wrong(f"{name} stands there twice", "give it once")
            found[name] = value
        return {name: found[name] for name in OPTIONS if name in found}

    def _complete(self, kind: Kind, target: str, options: Mapping[str, str]) -> None:
        moments = [name for name in MOMENTS if name in options]
        if len(moments) > 1:
            self._wrong(f"{' and '.join(moments)} are two moments", "give one, or two faults")
        if (KINDS[kind].needs and not moments) or (kind == "store" and "for" not in options):
            self._wrong(f"{kind} needs {KINDS[kind].needs}", f"such as {kind}@time=30s{_also(kind)}")
        if "step" in options and target not in SAVES:
            self._wrong(
                f"{'not every step has' if target == ALL else f'{target} has no'} optimiser steps",
                f"step= is for {' and '.join(sorted(SAVES))}; time=30s is for all",
            )
        if "seed" in options and "random" not in options:
            self._wrong("seed is of random moments", "such as random=1/600s,seed=7")

    def _count(self, name: str, options: Mapping[str, str], least: int = 1) -> int | None:
        if name not in options:
            return None
        value = options[name]
        if not re.fullmatch(r"[0-9]{1,9}", value, flags=re.ASCII) or int(value) < least:
            self._wrong(f"{name}={value} is not a number", f"a whole one, at least {least}: {OPTIONS[name]}")
        return int(value)

    def _seconds(self, name: str, options: Mapping[str, str]) -> float | None:
        if name not in options:
            return None
        seconds = _duration(options[name])
        if seconds is None:
            self._wrong(f"{name}={options[name]} is not a duration", "such as 500ms, 30s, 1.5m or 2h")
        return seconds

    def _rate(self, options: Mapping[str, str]) -> float | None:
        if "random" not in options:
            return None
        count, slash, per = options["random"].partition("/")
        seconds = _duration(per) if slash else None
        if seconds is None or not re.fullmatch(r"[0-9]{1,6}", count, flags=re.ASCII) or int(count) < 1 or seconds <= 0:
            self._wrong(f"random={options['random']} is not a rate", "how often in how long, such as random=1/600s")
        return int(count) / seconds

    def _wrong(self, what: str, hint: str) -> NoReturn:
        raise RequestError(f"{self.source}: in {self.part!r}: {what}", hint=hint)


def _duration(text: str) -> float | None:
    """Return a duration in seconds, or None when it is none."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(ms|s|m|h)", text, flags=re.ASCII)
    return float(match.group(1)) * UNITS[match.group(2)] if match else None


def _also(kind: Kind) -> str:
    return ",for=10s" if kind == "store" else ""
