"""The one door to a training: who asked for which window, and why, on record before anything runs. Light.

A request is two facts of the ledger: asked (`intent`, by whatever asks: a calendar, the monitor's verdict, a
person) and taken up (`done`, by the training run that serves it). Its key is `<source>/<window>/<id>`, so asking
again for the same cause changes nothing. One training serves every request that is open for its window.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from orrery import partitions
from orrery.ledger import Entry, Ledger
from orrery.partitions import Grain
from orrery.spec import ModelSpec

# cron, each, quarterly: the spec's calendars; sensor: a calendar, by data that the watch Dag found; drift: the
# monitor's verdict; ui, rest, cli: a person there; manual: a person, and Airflow did not say where.
Source = Literal["cron", "each", "quarterly", "sensor", "drift", "ui", "rest", "cli", "manual"]
SOURCES: tuple[Source, ...] = get_args(Source)
# A window is asked for by the calendar once, whichever of these it was.
CALENDAR: tuple[Source, ...] = ("cron", "each", "quarterly", "sensor")
QUARTER = 3


@dataclass(frozen=True)
class TrainingRequest:
    """One request as it stands. `asked_by` and `taken_by` name runs; `taken_by` is None while it is open."""

    project: str
    key: str
    window: str
    source: str
    by: str
    why: str
    at: str
    asked_by: str = ""
    force: bool = False
    evidence: Mapping[str, Any] = field(default_factory=dict)
    taken_by: str | None = None
    taken_at: str | None = None

    @property
    def open(self) -> bool:
        """Whether no training has taken it up."""
        return self.taken_by is None

    @property
    def told(self) -> str:
        """Source, person and reason in one line."""
        return f"{self.source}, by {self.by}" + (f": {self.why}" if self.why else "")


def submit(
    book: Ledger,
    project: str,
    *,
    window: str,
    source: Source,
    by: str,
    why: str,
    id: str,
    asked_by: str = "",
    force: bool = False,
    evidence: Mapping[str, Any] | None = None,
) -> TrainingRequest:
    """Record a request, once for its source, window and `id`; return what is on record.

    `asked_by` is the run that asks: on its retry it may announce the request again (`lost`).
    """
    if source not in SOURCES:
        raise ValueError(f"{source!r} is no source of requests: {', '.join(SOURCES)}")
    payload = {
        "window": window,
        "source": source,
        "by": by,
        "why": why[:500],
        "asked_by": asked_by,
        "force": force,
        "evidence": dict(evidence or {}),
    }
    key = f"{source}/{window}/{id}"
    book.record(project, "request", key, "intent", by, payload)
    found = book.get(project, "request", key, "intent")
    assert found is not None
    return _read(found, book.get(project, "request", key, "done"))


def find(book: Ledger, project: str, window: str | None = None, *, at: str | None = None) -> list[TrainingRequest]:
    """Return a project's requests, oldest first (for one window, when given; as they stood at a moment)."""
    entries = book.find(project, "request", at=at)
    done = {e.key: e for e in entries if e.phase == "done"}
    asked = (_read(e, done.get(e.key)) for e in entries if e.phase == "intent")
    return [r for r in asked if window is None or r.window == window]


def take(book: Ledger, project: str, window: str, run: str) -> list[TrainingRequest]:
    """Take up every open request of a window for a training run; return all that this run serves, oldest first."""
    for request in find(book, project, window):
        if request.open:
            close(book, request, run)
    return [r for r in find(book, project, window) if r.taken_by == run]


def close(book: Ledger, request: TrainingRequest, run: str) -> bool:
    """Record that a run serves a request; False when another one does already."""
    return book.record(request.project, "request", request.key, "done", request.by, {**_asked(request), "run": run})


def of_run(book: Ledger, project: str, run: str) -> list[TrainingRequest]:
    """Return the requests that a training run has taken up, oldest first."""
    return [r for r in find(book, project) if r.taken_by == run]


def begun_since(requests: Iterable[TrainingRequest], moment: datetime, run: str) -> TrainingRequest | None:
    """Return a request that another run took up after `moment`: its training serves who asked before that, too."""
    since = moment.astimezone(UTC).isoformat(timespec="milliseconds")
    later = [r for r in requests if r.taken_by not in (None, run) and str(r.taken_at) >= since]
    return later[0] if later else None


def lost(requests: Iterable[TrainingRequest], run: str) -> list[TrainingRequest]:
    """Return the calendar's open requests that this run asked for: after a crash, nobody may have heard of them."""
    return [r for r in requests if r.open and r.asked_by == run and r.source in CALENDAR]


# -- which windows a calendar asks for ------------------------------------------------------------------


@dataclass(frozen=True)
class Due:
    """What a calendar asks for now, in key order, or why nothing."""

    windows: tuple[str, ...] = ()
    why: str = ""


def due(
    spec: ModelSpec,
    landed: str,
    there: Sequence[str],
    asked: Iterable[TrainingRequest],
    trained: Sequence[str] = (),
) -> Due:
    """Return the windows that `landed`'s features complete and that no calendar has asked for, in key order.

    `there`: the partitions whose features exist; `trained`: the windows of champions so far. A late partition
    may complete several windows. Earlier complete windows come first, so that the order in which features are
    heard of does not matter; but none before what has been asked for or promoted already, but for those that the
    late partition itself completes: a calendar that is switched on asks for what is new, not for all the past.
    """
    grain, have = spec.grain, set(there)
    known = [r for r in asked if r.source in CALENDAR]
    ends = _ends(spec, landed)
    complete = [end for end in ends if _complete(spec, end, have)]
    if not complete:
        return Due(why=_missing(spec, ends[0], have))
    newest = max([_last(w, grain) for w in (*(r.window for r in known), *trained)], default="")
    earlier = [k for k in sorted(have) if newest < k < ends[0] and _is_end(spec, k) and _complete(spec, k, have)]
    return once(spec, Due(tuple(training_window(spec, end, have) for end in (*earlier, *complete))), known)


def once(spec: ModelSpec, due: Due, asked: Iterable[TrainingRequest]) -> Due:
    """Return what of it no calendar has asked for yet: a window counts by its end, it may have grown at its start."""
    done = {_last(r.window, spec.grain) for r in asked if r.source in CALENDAR}
    new = tuple(w for w in due.windows if _last(w, spec.grain) not in done)
    return Due(new, due.why) if new or not due.windows else Due(why=f"asked for already: {', '.join(due.windows)}")


def window_of(spec: ModelSpec, end: str, there: Sequence[str]) -> Due:
    """Return the window that ends with `end`, when its features are all there."""
    if _complete(spec, end, set(there)):
        return Due((training_window(spec, end, there),))
    return Due(why=_missing(spec, end, set(there)))


def _ends(spec: ModelSpec, landed: str) -> list[str]:
    """Return the last partitions of all windows that hold `landed`, in key order."""
    length = spec.train.window
    if "quarterly" in spec.retrain.on:
        length = max(length, QUARTER)
    ends = [partitions.shift(landed, spec.grain, i) for i in range(length)]
    return [e for e in ends if _is_end(spec, e)]


def _is_end(spec: ModelSpec, key: str) -> bool:
    return "quarterly" not in spec.retrain.on or int(key[5:7]) % QUARTER == 0


def _needs(spec: ModelSpec, end: str) -> tuple[str, ...]:
    """Return the partitions that must be there: the window's, and of a quarter its three months."""
    least = QUARTER if "quarterly" in spec.retrain.on else 1
    return partitions.window_ending(end, spec.grain, max(spec.train.window, least))


def _complete(spec: ModelSpec, end: str, have: set[str]) -> bool:
    return have.issuperset(_needs(spec, end))


def training_window(spec: ModelSpec, end: str, there: Collection[str]) -> str:
    """Return the window that ends with `end`: `train.window` partitions, and those before them, as far as their

    features are there without a gap, up to `train.longest` in all.
    """
    first, length = partitions.window_ending(end, spec.grain, spec.train.window)[0], spec.train.window
    longest = spec.train.longest or length
    while length < longest and (before := partitions.shift(first, spec.grain, -1)) in there:
        first, length = before, length + 1
    return f"{first}..{end}"


def _last(window: str, grain: Grain) -> str:
    return partitions.window(window, grain)[-1]


def _missing(spec: ModelSpec, end: str, have: set[str]) -> str:
    """Return why the window that ends there is not complete."""
    keys = [k for k in _needs(spec, end) if k not in have]
    shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    return f"{training_window(spec, end, have)} is not complete: no features of {shown}"


def _read(asked: Entry, taken: Entry | None) -> TrainingRequest:
    p = asked.payload
    return TrainingRequest(
        project=asked.project,
        key=asked.key,
        window=p["window"],
        source=p["source"],
        by=p["by"],
        why=p["why"],
        at=asked.at,
        asked_by=p["asked_by"],
        force=p["force"],
        evidence=p["evidence"],
        taken_by=taken.payload["run"] if taken else None,
        taken_at=taken.at if taken else None,
    )


def _asked(request: TrainingRequest) -> dict[str, Any]:
    told = ("window", "source", "by", "why", "asked_by", "force")
    return {**{name: getattr(request, name) for name in told}, "evidence": dict(request.evidence)}
