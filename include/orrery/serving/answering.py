"""From a question to an answer with sources: retrieve, abstain or write, check, or fall back to the passages.

`begin` finds the passages and raises what becomes an HTTP error; `events` never raises for a language model's sake.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from orrery import log
from orrery.errors import OrreryError, RequestError
from orrery.rag.answers.citations import read
from orrery.rag.answers.extract import Extract, answer
from orrery.rag.answers.prompt import Message, messages
from orrery.rag.answers.texts import Span, Terms, clean, heading_text, marked, one_line, sentences, window, within
from orrery.rag.spec import KnowledgeBaseSpec
from orrery.serving.contract import Answer, Query, Source
from orrery.serving.declared import Declared
from orrery.serving.knowledge import Found, Knowledge, Stages
from orrery.serving.live import Live, Serving
from orrery.serving.metrics import Metrics
from orrery.serving.pressure import Breaker, Full, Gate, Threads
from orrery.serving.settings import Settings
from orrery.serving.tokens import Caller

Why = Literal["down", "slow", "busy", "resting", "refused", "uncited", "silent"]
T = TypeVar("T")
NOBODY, EXTRACTIVE = "none", "none (extractive)"
ABSTAINED = "The documents do not seem to answer this. The passages nearest to the question are below."
# Cosine below which a passage says nothing of a question, by embedders of sentences.
UNRELATED = 0.3
PASSAGES_ONLY = "The passages nearest to the question are below."
INSTEAD = "the sentences nearest to the question are shown instead"
REASONS: dict[Why, str] = {
    "down": "the language model does not answer",
    "slow": "the language model did not answer in time",
    "busy": "the language model is busy",
    "resting": "the language model has failed lately and is left alone for a while",
    "refused": "the language model does not take this question",
    "uncited": "the language model cited none of the passages, so what it wrote is not shown",
    "silent": "the language model found no answer in the passages",
}
# A server that does not keep to `max_tokens` is cut off: so many characters a token.
CHARACTERS = 12


class NotReady(Exception):
    """No generation is open."""


class TooSlow(Exception):
    """The search took longer than it may."""


class Writer(Protocol):
    """A language model (`orrery.llm.client.Model`). An `OrreryError` when no answer comes."""

    async def complete(self, messages: list[Message], *, max_tokens: int, timeout: float) -> str:
        """Return the whole answer."""

    def stream(self, messages: list[Message], *, max_tokens: int, timeout: float) -> AsyncGenerator[str, None]:
        """Return the answer piece by piece."""

    async def close(self) -> None:
        """Give its connections back."""


@dataclass(frozen=True)
class Model:
    """The language model of the spec: its client, its name, what prompt and answer may have together, its time."""

    writer: Writer
    name: str
    context: int
    timeout: float


@dataclass
class Trace:
    """What is measured and logged of one request."""

    id: str
    stages: Stages = field(default_factory=dict)
    caller: str = "-"
    outcome: str = ""
    generation: str = ""
    question: str | None = None
    began: float = field(default_factory=time.perf_counter)

    def add(self, stage: str, seconds: float) -> None:
        """Count time to a stage."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    @property
    def total(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.began


@dataclass(frozen=True)
class SourcesEvent:
    """The passages, before any answer."""

    sources: list[Source]


@dataclass(frozen=True)
class TokenEvent:
    """A piece of what the model writes, unchecked."""

    text: str


@dataclass(frozen=True)
class DoneEvent:
    """The whole answer, checked."""

    answer: Answer


Event = SourcesEvent | TokenEvent | DoneEvent


@dataclass(frozen=True)
class _Searched:
    """What a search's thread found out."""

    found: Sequence[Found]
    sources: list[Source]
    abstains: bool
    extract: Extract | None
    prompt: list[Message]
    shown: int


@dataclass
class Begun:
    """A question whose passages are there. Its generation stays open until `end`."""

    query: Query
    serving: Serving
    searched: _Searched
    ended: bool = False

    def end(self) -> None:
        """Let the generation go; once is enough."""
        if not self.ended:
            self.ended = True
            self.serving.opened.release()


@dataclass(frozen=True)
class _Written:
    """What came of asking the model: its text, or why there is none."""

    text: str = ""
    why: Why | None = None


class Answering:
    """Answers questions of one project."""

    def __init__(
        self,
        spec: KnowledgeBaseSpec,
        declared: Declared,
        live: Live,
        metrics: Metrics,
        settings: Settings,
        model: Model | None = None,
    ) -> None:
        self.spec, self.declared, self.live, self.metrics, self.settings, self.model = (
            spec,
            declared,
            live,
            metrics,
            settings,
            model,
        )
        waiting = settings.search_queue * settings.searches
        self.searching = Gate("a search", settings.searches, waiting, settings.search_wait)
        self.threads = Threads(self.searching, "search")
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_rest, settings.breaker_rest_most)
        self.limit = min(spec.answers.timeout, model.timeout) if model else spec.answers.timeout
        # Who has waited half of the time for a place would hardly get a whole answer in the other half.
        self.writing = Gate("the model", settings.generations, settings.generation_queue, max(0.1, self.limit / 2))

    @property
    def model_name(self) -> str:
        """Who writes answers."""
        return self.model.name if self.model else EXTRACTIVE

    async def begin(self, query: Query, caller: Caller, trace: Trace) -> Begun:
        """Find the passages.

        Raises `Full`, `NotReady`, `TooSlow`, and `OrreryError` when the index does not answer.
        """
        serving = self.live.acquire()
        if serving is None:
            raise NotReady
        trace.generation = serving.name
        trace.question = query.question if self.spec.answers.log_questions else None
        begun = None
        try:
            searched = await self._in_thread(serving, trace, lambda: self._search(serving, query, caller, trace))
            begun = Begun(query, serving, searched)
        finally:
            if begun is None:
                serving.opened.release()
        return begun

    async def passage(self, id: str, caller: Caller, trace: Trace) -> tuple[Found | None, str]:
        """Return one passage that the caller may read, or None; and the generation. Raises as `begin` does."""
        serving = self.live.acquire()
        if serving is None:
            raise NotReady
        try:
            found = await self._in_thread(
                serving,
                trace,
                lambda: serving.knowledge.passage(id, caller.groups, self.declared.sources(caller.groups)),
            )
            return found, serving.name
        finally:
            serving.opened.release()

    async def _in_thread(self, serving: Serving, trace: Trace, work: Callable[[], T]) -> T:
        """Do blocking work with an open generation, which stays open until the thread has ended."""
        asked = time.perf_counter()

        def timed() -> T:
            trace.add("queue", time.perf_counter() - asked)
            return work()

        serving.opened.hold()
        try:
            return await self.threads.run(timed, timeout=self.settings.search_timeout, ended=serving.opened.release)
        except TimeoutError:
            raise TooSlow from None

    def _search(self, serving: Serving, query: Query, caller: Caller, trace: Trace) -> _Searched:
        knowledge, question = serving.knowledge, query.question
        asking = serving.asking
        usual = asking.retrieval.top_k
        top_k = query.top_k or usual
        may = self.declared.sources(caller.groups)
        found = knowledge.find(question, caller.groups, may, max(top_k, usual), query.filters, trace.stages, asking)
        # Judged on as many as the questions were that it was fitted on, however few are wanted.
        if asking.abstainer is not None:
            abstains = not found or asking.abstainer.abstains(question, found[:usual])
        else:
            abstains = unrelated(frozenset(knowledge.terms(question)), found[:usual], knowledge.terms)
        found = found[:top_k]
        quoted, prompt, shown = None, list[Message](), 0
        if not abstains and self.model is None:
            quoted = _extract(knowledge, question, found, trace)
        elif not abstains and self.model is not None:
            budget = self.model.context - self.spec.answers.max_tokens
            prompt, shown = messages(question, found, budget, knowledge.tokens)
        return _Searched(found, sources(knowledge, question, found, quoted), abstains, quoted, prompt, shown)

    async def close(self) -> None:
        """Let threads and connections go."""
        self.threads.close()
        if self.model is not None:
            await self.model.writer.close()

    async def events(self, begun: Begun, trace: Trace, *, stream: bool) -> AsyncGenerator[Event, None]:
        """Give the passages, then (with `stream`) what the model writes, then the whole checked answer."""
        searched = begun.searched
        yield SourcesEvent(searched.sources)
        if searched.abstains:
            self.metrics.abstained.inc()
            yield DoneEvent(self._answer(begun, trace, "abstained", ABSTAINED, NOBODY, searched.sources))
            return
        if self.model is None:
            text = searched.extract.text if searched.extract else ""
            yield DoneEvent(self._answer(begun, trace, "answered", text or PASSAGES_ONLY, EXTRACTIVE, searched.sources))
            return
        written = _Written(why="resting")
        if self.breaker.allows():
            async with aclosing(self._write(begun, trace, stream)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, _Written):
                        written = piece
                    else:
                        yield TokenEvent(piece)
        yield DoneEvent(await self._finished(begun, trace, written))

    async def _write(self, begun: Begun, trace: Trace, stream: bool) -> AsyncGenerator[str | _Written, None]:
        """Give the model's pieces as they come, and in the end what came of it.

        The model writes into a queue: a slow reader must not hold its place, nor stretch its time.
        """
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        asked = time.perf_counter()
        writing = asyncio.create_task(self._ask(begun, stream, pieces.put_nowait))
        writing.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            trace.add("generate", time.perf_counter() - asked)
            yield writing.result()
        finally:
            if not writing.done():
                writing.cancel()
                with suppress(asyncio.CancelledError):
                    await writing

    async def _ask(self, begun: Begun, stream: bool, say: Callable[[str], None]) -> _Written:
        """Have the model write. The breaker hears how it went; raises nothing but a cancellation."""
        began = False
        try:
            async with asyncio.timeout(self.limit), self.writing.place():
                began = True
                text = await self._model_text(begun.searched.prompt, stream, say)
        except Full:
            self.breaker.undecided()
            return _Written(why="busy")
        except TimeoutError:
            self.breaker.failed() if began else self.breaker.undecided()
            return _Written(why="slow" if began else "busy")
        except asyncio.CancelledError:
            self.breaker.undecided()
            raise
        except RequestError as e:  # this prompt alone: the model answers others
            self.breaker.undecided()
            log.get().warning("the prompt is refused", why=e.message)
            return _Written(why="refused")
        except Exception as e:
            self.breaker.failed(getattr(e, "retry_after", None))
            # Of an error that is not ours the kind alone: its text may repeat the prompt.
            log.get().warning("no answer", why=e.message if isinstance(e, OrreryError) else type(e).__name__)
            return _Written(why="down")
        self.breaker.worked()
        return _Written(text)

    async def _model_text(self, prompt: list[Message], stream: bool, say: Callable[[str], None]) -> str:
        assert self.model is not None
        writer, most = self.model.writer, self.spec.answers.max_tokens
        limit = self.limit + 1  # ours is the one that ends it
        if not stream:
            return (await writer.complete(prompt, max_tokens=most, timeout=limit))[: most * CHARACTERS]
        text = ""
        async with aclosing(writer.stream(prompt, max_tokens=most, timeout=limit)) as pieces:
            async for piece in pieces:
                text += piece
                say(clean(piece))
                if len(text) > most * CHARACTERS:
                    break
        return text

    async def _finished(self, begun: Begun, trace: Trace, written: _Written) -> Answer:
        """Return what of the model's answer rests on passages that it was shown, else the passages' own sentences."""
        searched, why = begun.searched, written.why
        if why is None:
            checked = read(written.text, searched.shown)
            self.metrics.invented.inc(checked.invented)
            why = checked.why
            if why is None:
                return self._answer(begun, trace, "answered", checked.covered, self.model_name, searched.sources)
        self.metrics.degraded.labels(why).inc()
        found, question, knowledge = searched.found, begun.query.question, begun.serving.knowledge
        text, shown = PASSAGES_ONLY, searched.sources
        # Also this may find the service full; then the passages have to speak for themselves.
        with suppress(Full, TooSlow, OrreryError):
            quoted = await self._in_thread(begun.serving, trace, lambda: _extract(knowledge, question, found, trace))
            text, shown = quoted.text or text, sources(knowledge, question, found, quoted)
        reason = f"{REASONS[why]}: {INSTEAD}"
        return self._answer(begun, trace, "degraded", text, EXTRACTIVE, shown, reason)

    def _answer(
        self,
        begun: Begun,
        trace: Trace,
        outcome: str,
        text: str,
        model: str,
        shown: list[Source],
        reason: str | None = None,
    ) -> Answer:
        trace.outcome = outcome
        return Answer(
            query_id=trace.id,
            answer=text,
            sources=shown,
            abstained=outcome == "abstained",
            latency_ms=round(trace.total * 1000, 1),
            generation=begun.serving.name,
            model=model,
            degraded=reason,
        )


def unrelated(wanted: frozenset[str], found: Sequence[Found], terms: Terms) -> bool:
    """Tell whether passages have nothing to do with a question: none shares a word with it, nor is one near in meaning.

    What can be known where no evaluation has fitted when to abstain.
    """
    if any(f.cosine >= UNRELATED for f in found):
        return False
    return not any(wanted & set(terms(f"{heading_text([f.title, *f.heading])}\n{f.text}")) for f in found)


def _extract(knowledge: Knowledge, question: str, found: Sequence[Found], trace: Trace) -> Extract:
    began = time.perf_counter()
    made = answer(question, [f.text for f in found], knowledge.terms)
    trace.add("extract", time.perf_counter() - began)
    return made


def sources(knowledge: Knowledge, question: str, found: Sequence[Found], quoted: Extract | None) -> list[Source]:
    """Return passages as they are shown: what an extractive answer quotes is marked, elsewhere the question's words."""
    wanted = frozenset(knowledge.terms(question))
    out = []
    for i, one in enumerate(found):
        text = clean(one.text)
        quotes = quoted.quoted.get(i, []) if quoted else []
        spans = quotes or marked(text, wanted, knowledge.terms)
        part = window(text, quotes[0] if quotes else _densest(text, spans))
        out.append(
            Source(
                id=one.id,
                title=one_line(one.title),
                uri=one_line(one.uri),
                heading=heading_text(one.heading),
                page=one.page,
                score=round(float(one.score), 6),
                excerpt=text[slice(*part)],
                highlights=within(spans, part),
            )
        )
    return out


def _densest(text: str, marks: Sequence[Span]) -> Span:
    """Return the sentence that holds most marks; the first of equals."""
    if not marks:
        return 0, 0
    return max(sentences(text) or [(0, 0)], key=lambda s: sum(s[0] <= a < s[1] for a, _ in marks))
