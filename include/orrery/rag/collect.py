"""`collect`: read all sources as they are now, and say of each document what became of it since the last time.

A document whose bytes, terms and reader are the same is taken over unread. One that cannot be read today is kept as it
was. When more than the spec's share of a source's documents is lost (gone, unreadable, or turned into the text of
another: a site that says "down for maintenance" on every page), nothing is committed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Literal

from orrery import fingerprint
from orrery.contract import Result
from orrery.errors import OrreryError, TryAgain, UserError
from orrery.rag import reading
from orrery.rag.contract import CollectParams, OriginRef
from orrery.rag.fetching import Fetcher
from orrery.rag.reading import Bounds, Reading, Source, Unreadable
from orrery.rag.reading.pool import Pool, memory_for
from orrery.rag.records import DOCUMENTS, Document, Section
from orrery.rag.sources import Entry, Listing, NotRead, Wanted, folders, web
from orrery.rag.spec import DocumentSource, Limits
from orrery.step import Work
from orrery.store import trouble

OUTCOMES = "outcomes.jsonl"
Outcome = Literal["new", "changed", "same", "gone", "failed", "duplicate", "skipped"]
COUNTED: tuple[Outcome, ...] = ("new", "changed", "same", "gone", "failed", "duplicate", "skipped")
READERS_AT_ONCE = 4
FETCHES_AT_ONCE = 8
# Of what has been fetched and waits for its turn, in bytes.
WAITING = 256 << 20
TOLD, TOLD_IN_ERROR = 20, 5


def run(work: Work, params: CollectParams, fetcher: Fetcher | None = None) -> Result:
    """Collect all sources. A test may lend a `fetcher` that knows its server.

    Raises `UserError` when a source is not there or lost too much, `TryAgain` when that is the network's doing.
    """
    limits = work.knowledge.limits
    with ExitStack() as stack:
        size = int(limits.megabytes * 1_000_000)
        fetcher = fetcher or stack.enter_context(Fetcher(size=size, seconds=limits.seconds))
        bounds = Bounds(limits.pages, limits.characters)
        reader = reading.fingerprint_of(bounds)
        before = Before.load(work, params, reader)
        pile = stack.enter_context(Pile.open(work.scratch / "pile"))
        pool = stack.enter_context(
            Pool(
                bounds,
                seconds=limits.seconds,
                memory=memory_for(size),
                workers=min(READERS_AT_ONCE, os.cpu_count() or 1),
            )
        )
        # One set of threads for all sources: a reader is ended by the kernel with the thread that started it.
        threads = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="collect")
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        collector = _Collector(work, limits, fetcher, pool, threads, before, pile)
        found = {name: collector.source(name, params.sources[name]) for name in sorted(params.sources)}
        found |= before.dropped(set(found))
        return _committed(work, params, found, pile, reader)


# -- what was there before -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """A document of the last time, and where its line lies in that file. `text` is the digest of what is read of it."""

    id: str
    uri: str
    digest: str
    mime: str
    text: str
    groups: tuple[str, ...]
    offset: int


@dataclass
class Before:
    """The documents of the last time, by source and uri. `comparable`: they were read as they would be today."""

    path: Path | None = None
    comparable: bool = False
    known: dict[str, dict[str, Known]] = field(default_factory=dict)

    @classmethod
    def load(cls, work: Work, params: CollectParams, reader: str) -> Before:
        """Read what `params.before` names. Raises `UserError` when it is gone or damaged, unless `params.partial`."""
        if params.before is None:
            return cls()
        try:
            return cls._read(work, params.before, reader)
        except UserError as e:
            if not params.partial:
                raise
            work.log.warning(f"nothing is compared with: {e.message}")
            return cls()

    @classmethod
    def _read(cls, work: Work, path: str, reader: str) -> Before:
        hint = f"without them nobody can tell what is missing: restore them, or trigger {work.config.project}.reindex"
        hint += " with `partial`, and everything is read anew"
        manifest = work.store.manifest(path)
        if manifest is None:
            raise UserError(f"the documents collected before are gone: {work.store.uri}/{path}", hint=hint)
        file = work.open_input(manifest, DOCUMENTS)
        if _sha256(file) != manifest.files[DOCUMENTS].sha256:
            raise UserError(f"{work.store.uri}/{manifest.uri(DOCUMENTS)} is damaged: its digest is another", hint=hint)
        before = cls(file, manifest.facts.get("reader") == reader)
        offset = 0
        with file.open("rb") as lines:
            for line in lines:
                try:
                    told = Document.from_line(line)
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{file} was written by another version of Orrery", hint=hint) from None
                before.known.setdefault(told.source, {})[told.uri] = Known(
                    told.id, told.uri, told.digest, told.mime, text_digest(told.sections), told.groups, offset
                )
                offset += len(line)
        return before

    def of(self, source: str) -> dict[str, Known]:
        """Return a source's documents by uri."""
        return self.known.get(source, {})

    def document(self, known: Known, groups: tuple[str, ...]) -> Document:
        """Return a document as it was, for the groups of today: who may read it is never taken over."""
        assert self.path is not None
        with self.path.open("rb") as lines:
            lines.seek(known.offset)
            return replace(Document.from_line(lines.readline()), groups=groups)

    def dropped(self, sources: set[str]) -> dict[str, Collected]:
        """Return the outcomes of sources that are not in the spec any more."""
        found = {}
        for name in sorted(set(self.known) - sources):
            found[name] = Collected(name, known=len(self.known[name]), allowed=1.0, dropped=True)
            for uri in sorted(self.known[name]):
                found[name].tell(uri, "gone", "its source is not in spec.yaml any more")
        return found


def text_digest(sections: tuple[Section, ...]) -> str:
    """Return the digest of headings and text, whatever page they are on."""
    return hashlib.sha256(json.dumps([[s.heading, s.text] for s in sections]).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- what is collected -----------------------------------------------------------------------------------


class Pile:
    """Documents as they come, on disk; written out in the order of their ids."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lines: dict[str, tuple[int, int]] = {}

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Pile]:
        """Open an empty pile at a path."""
        with trouble(str(path)), path.open("w+b") as file:
            yield cls(file)

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, document: Document) -> None:
        """Add a document."""
        line = document.line().encode()
        self._lines[document.id] = self._file.tell(), len(line)
        self._file.write(line)

    def write(self, path: Path) -> str:
        """Write all documents to a file, sorted by id; return its sha256."""
        self._file.flush()
        digest = hashlib.sha256()
        with path.open("wb") as target:
            for id_ in sorted(self._lines):
                offset, length = self._lines[id_]
                self._file.seek(offset)
                line = self._file.read(length)
                digest.update(line)
                target.write(line)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Told:
    """One line of outcomes.jsonl."""

    source: str
    uri: str
    outcome: Outcome
    why: str | None = None
    document: str | None = None


@dataclass
class Collected:
    """What became of one source. `lost`: documents known before that are not there any more, with why.

    Gone, unreadable, or changed into the text of another.
    `dropped`: the spec does not name it any more, so nothing of it is missed.
    """

    name: str
    known: int
    allowed: float
    dropped: bool = False
    told: list[Told] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    away: int = 0  # of these, by the network's fault
    bytes: int = 0

    def tell(self, uri: str, outcome: Outcome, why: str | None = None, document: str | None = None) -> None:
        """Record what became of one document."""
        self.told.append(Told(self.name, uri, outcome, why, document))

    def lose(self, uri: str, why: str, *, away: bool = False) -> None:
        """Count a document known before as lost."""
        self.lost[uri] = why
        self.away += away

    @property
    def counts(self) -> dict[str, int]:
        """How many of each outcome; `documents` are what is there now."""
        of = Counter(one.outcome for one in self.told)
        kept = sum(one.outcome == "failed" and one.document is not None for one in self.told)
        return {"documents": of["new"] + of["changed"] + of["same"] + kept, **{name: of[name] for name in COUNTED}}


@dataclass(frozen=True, slots=True)
class _Taken:
    """A document as it was fetched and read; or, without `found`, one that is as it was."""

    digest: str
    mime: str
    bytes: int
    found: Reading | None = None


class _Collector:
    """Goes through the sources, one after the other; fetches and reads several documents of one at once."""

    def __init__(
        self,
        work: Work,
        limits: Limits,
        fetcher: Fetcher,
        pool: Pool,
        threads: ThreadPoolExecutor,
        before: Before,
        pile: Pile,
    ) -> None:
        self.work, self.limits, self.fetcher, self.pool, self.threads = work, limits, fetcher, pool, threads
        self.before, self.pile = before, pile

    def source(self, name: str, origin: OriginRef) -> Collected:
        """Collect one source. Raises `UserError` when it is not there, or holds more documents than allowed."""
        terms = self.work.knowledge.sources[name]
        known = self.before.of(name)
        found = Collected(name, len(known), terms.missing)
        listing = self._listing(name, origin, terms)
        groups = tuple(sorted(set(terms.groups)))
        source = _Source(self, found, known, groups)
        with self.work.progress(f"collect {name}", len(listing.entries), "documents") as tick:
            for entry, future in self._all(listing.entries, known):
                source.settle(entry, future)
                tick()
        source.leave(listing)
        self.work.log.info("collected", source=name, not_asked_for=listing.other, **found.counts)
        return found

    def _listing(self, name: str, origin: OriginRef, terms: DocumentSource) -> Listing:
        wanted = Wanted(terms.include, terms.exclude)
        try:
            if folder := origin.uri or origin.notion:
                found = folders.listing(folder, self.work.project_folder, wanted, self.fetcher.size)
            elif origin.sitemap:
                found = web.sitemap(origin.sitemap, wanted, self.fetcher, self.limits.documents)
            else:
                found = web.pages(origin.pages, wanted, self.fetcher)
        except OrreryError as e:
            e.message = f"source {name}: {e.message}"
            raise
        if len(found.entries) > self.limits.documents:
            raise UserError(
                f"source {name}: {len(found.entries):,} documents; limits.documents allows {self.limits.documents:,}",
                hint="narrow `include` or `exclude`, or raise the limit in spec.yaml",
            )
        return found

    def _all(self, entries: list[Entry], known: Mapping[str, Known]) -> Iterator[tuple[Entry, Future[_Taken]]]:
        """Yield all entries in their order, with what they became; only so many are held at once."""
        ahead = max(1, min(2 * FETCHES_AT_ONCE, WAITING // max(1, self.fetcher.size)))
        left = iter(entries)
        running: deque[tuple[Entry, Future[_Taken]]] = deque()
        while True:
            for entry in islice(left, ahead - len(running)):
                running.append((entry, self.threads.submit(self._take, entry, known.get(entry.uri))))
            if not running:
                return
            entry, future = running.popleft()
            future.exception()  # waits
            yield entry, future

    def _take(self, entry: Entry, known: Known | None) -> _Taken:
        """Fetch a document, and read it unless it is as it was. Raises `NotRead` and `Unreadable`."""
        raw = entry.fetch()
        digest = hashlib.sha256(raw.data).hexdigest()
        taken = _Taken(digest, raw.kind, len(raw.data))
        if known and self.before.comparable and (known.digest, known.mime) == (digest, raw.kind):
            return taken
        return replace(taken, found=self.pool.read(Source(raw.data, raw.kind, raw.charset)))


class _Source:
    """Decides, document by document in the order of their uris, what became of those of one source."""

    def __init__(self, by: _Collector, found: Collected, known: Mapping[str, Known], groups: tuple[str, ...]) -> None:
        self.before, self.pile, self.log = by.before, by.pile, by.work.log
        self.found, self.known, self.groups = found, known, groups
        self._texts: dict[str, tuple[str, str]] = {}  # id and uri of the first document with a text
        self._digests: dict[str, str] = {}  # uri by what was read today
        self._seen: set[str] = set()
        self._logged = 0

    def settle(self, entry: Entry, future: Future[_Taken]) -> None:
        """Record what became of one document that the source lists."""
        self._seen.add(entry.uri)
        try:
            taken = future.result()
        except Unreadable as e:
            self._without(entry.uri, "skipped" if e.skip else "failed", e.why)
        except NotRead as e:
            self._without(entry.uri, e.fate, e.why, away=e.away)
        else:
            self._with(entry, taken)

    def leave(self, listing: Listing) -> None:
        """Record what was left out, and what the source does not list any more."""
        for uri, why in sorted(listing.left.items()):
            self._seen.add(uri)
            self._without(uri, "skipped", why)
        for uri in sorted(set(self.known) - self._seen):
            self._gone(uri, None)

    def _with(self, entry: Entry, taken: _Taken) -> None:
        known = self.known.get(entry.uri)
        self._digests.setdefault(taken.digest, entry.uri)
        self.found.bytes += taken.bytes
        found = taken.found
        text = text_digest(found.sections) if found else known.text if known else ""
        if text in self._texts:
            id_, first = self._texts[text]
            copy = f"its text is that of {first}"
            if known is not None and known.text != text:
                # What it said before is nowhere now: all pages turned into one notice must not pass for one document.
                copy = f"its text has become that of {first}"
                self.found.lose(entry.uri, copy)
            self.found.tell(entry.uri, "duplicate", copy, id_)
            return
        document, why = self._document(entry, taken, known, text)
        outcome: Outcome = "new" if known is None else "same"
        if known is not None and known.groups != self.groups:
            outcome = "changed"
            why = why or f"who may read it has changed: {', '.join(known.groups)} → {', '.join(self.groups)}"
        elif known is not None and found and document != self.before.document(known, self.groups):
            outcome = "changed"
        self._keep(document, text)
        self.found.tell(entry.uri, outcome, why, document.id)

    def _document(self, entry: Entry, taken: _Taken, known: Known | None, text: str) -> tuple[Document, str | None]:
        """Return the document and what to say about it: as it was, when its bytes or all that is read of it are."""
        found = taken.found
        if found is None:
            assert known is not None
            return self.before.document(known, self.groups), None
        title = found.title or reading.from_name(entry.name)
        why = "; ".join(found.notes) or None
        document = Document(
            id=document_id(self.found.name, entry.uri),
            source=self.found.name,
            uri=entry.uri,
            title=title,
            mime=taken.mime,
            groups=self.groups,
            digest=taken.digest,
            bytes=taken.bytes,
            sections=found.sections,
        )
        if known is not None and known.text == text:
            # A page that only counts its visitors is no other document: what follows need not be made again.
            old = self.before.document(known, self.groups)
            if (old.title, old.mime, old.sections) == (title, taken.mime, found.sections):
                return old, why or ("its bytes have changed, its text has not" if old.digest != taken.digest else None)
        return document, why

    def _without(self, uri: str, fate: Literal["failed", "skipped", "gone"], why: str, *, away: bool = False) -> None:
        """Record a document that was not read; one that failed today stays as it was."""
        known = self.known.get(uri)
        if fate == "gone" and known is not None:
            self._gone(uri, why)
            return
        outcome: Outcome = "failed" if fate == "gone" else fate
        id_ = None
        if known is not None:
            self.found.lose(uri, why, away=away)
            if outcome == "failed":
                id_ = self._as_it_was(known)
                why = f"{why}; it is kept as it was"
        if outcome == "failed" and self._logged < TOLD:
            self._logged += 1
            self.log.warning("not read", source=self.found.name, document=uri, why=why)
        self.found.tell(uri, outcome, why, id_)

    def _as_it_was(self, known: Known) -> str:
        if known.text not in self._texts:
            self._keep(self.before.document(known, self.groups), known.text)
        return self._texts[known.text][0]

    def _gone(self, uri: str, why: str | None) -> None:
        moved = self._digests.get(self.known[uri].digest)
        if moved is None:
            self.found.lose(uri, why or "gone")
        self.found.tell(uri, "gone", f"it is {moved} now" if moved else why)

    def _keep(self, document: Document, text: str) -> None:
        self.pile.add(document)
        self._texts[text] = document.id, document.uri


def document_id(source: str, uri: str) -> str:
    """Return a document's id: it follows from where it is, not from what it says."""
    return hashlib.sha256(f"{source}\n{uri}".encode()).hexdigest()[:32]


# -- what is committed ------------------------------------------------------------------------------------


def _committed(work: Work, params: CollectParams, found: Mapping[str, Collected], pile: Pile, reader: str) -> Result:
    told = sorted((one for source in found.values() for one in source.told), key=lambda one: (one.source, one.uri))
    outcomes = "".join(f"{fingerprint.canonical(asdict(one))}\n" for one in told).encode()
    evidence = work.evidence(OUTCOMES, outcomes)
    refuse(work.config.project, found, partial=params.partial, links={"outcomes": evidence})
    result = _result(found, reader, evidence)
    collected = work.scratch / DOCUMENTS
    with trouble(str(collected)):
        sha256 = pile.write(collected)
    # The reader is part of the address: the next run must find out from `facts` that it need not read all again.
    with work.at(fingerprint.digest({"documents": sha256, "reader": reader})[:32]) as fresh:
        if fresh:
            work.write(OUTCOMES, outcomes)
            target = work.path(DOCUMENTS)
            with trouble(str(target)):
                shutil.move(collected, target)
        else:
            # The result of who committed these documents stands; what happened today is said here.
            result.skipped = f"the same documents are committed already: {'; '.join(result.reasons)}"
    return result


def _result(found: Mapping[str, Collected], reader: str, evidence: str) -> Result:
    sources = {name: one.counts for name, one in found.items()}
    total = {name: float(sum(counts[name] for counts in sources.values())) for name in ("documents", *COUNTED)}
    total["bytes"] = float(sum(one.bytes for one in found.values()))
    reasons = [_sentence(name, counts) for name, counts in sources.items()]
    failed = [one for source in found.values() for one in source.told if one.outcome == "failed"]
    reasons += [f"{one.source}: {one.uri}: {one.why}" for one in failed[:TOLD]]
    if len(failed) > TOLD:
        reasons.append(f"and {len(failed) - TOLD:,} more that failed: see outcomes.jsonl")
    facts = {"reader": reader, "sources": sources}
    return Result(reasons=reasons, metrics=total, facts=facts, links={"outcomes": evidence})


def _sentence(name: str, counts: Mapping[str, int]) -> str:
    """Say what became of a source: `guides: 21 documents (2 new, 19 same), 1 gone`."""
    inner = ", ".join(f"{counts[o]:,} {o}" for o in COUNTED[:3] if counts[o])
    outer = "".join(f", {counts[o]:,} {o}" for o in COUNTED[3:] if counts[o])
    documents = f"{counts['documents']:,} document{'s' if counts['documents'] != 1 else ''}"
    return f"{name}: {documents}" + (f" ({inner})" if inner else "") + outer


def refuse(project: str, found: Mapping[str, Collected], *, partial: bool, links: dict[str, str]) -> None:
    """Raise `UserError` when a source lost more than its share, or has none; `TryAgain` when the network did it.

    With `partial` only a knowledge base without any document is refused.
    """
    wrong, waits = [], True
    for name, one in found.items() if not partial else ():
        if one.lost and len(one.lost) > one.allowed * one.known:
            wrong.append(_lost(name, one))
            waits &= len(one.lost) - one.away <= one.allowed * one.known
        elif not one.counts["documents"] and not one.dropped:
            wrong.append(f"source {name} has no documents{_why_none(one)}")
            waits = False
    if not wrong and not any(one.counts["documents"] for one in found.values()):
        raise UserError("no source has a document", hint="look at `sources` in spec.yaml", details={"links": links})
    if not wrong:
        return
    error: type[OrreryError] = TryAgain if waits else UserError
    hint = (
        f"look at the source. If it is right as it is, trigger {project}.reindex with `partial` "
        f"(`orrery run {project} collect --partial`), or raise the source's `missing` in spec.yaml"
    )
    hint = "it is tried again" if waits else hint
    raise error("; ".join(wrong) + ". Nothing was changed.", hint=hint, details={"links": links})


def _lost(name: str, one: Collected) -> str:
    examples = [f"{uri} ({why})" for uri, why in islice(one.lost.items(), TOLD_IN_ERROR)]
    more = len(one.lost) - len(examples)
    said = ", ".join(examples) + (f" and {more:,} more" if more else "")
    share, allowed = len(one.lost) / one.known, one.allowed
    return (
        f"source {name}: {len(one.lost):,} of the {one.known:,} documents known before are lost "
        f"({share:.0%}, `missing` allows {allowed:.0%}): {said}"
    )


def _why_none(one: Collected) -> str:
    told = [f"{t.uri} ({t.why})" for t in one.told if t.outcome in ("failed", "skipped")]
    if not told:
        return ": nothing is there that `include` and `exclude` ask for"
    more = f" and {len(told) - TOLD_IN_ERROR:,} more" if len(told) > TOLD_IN_ERROR else ""
    return f": {', '.join(told[:TOLD_IN_ERROR])}{more}"
