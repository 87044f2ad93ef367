"""`evaluate`: is a generation whole, does it find what it should, and when should it be silent.

First index, chunks and documents are reconciled id by id. Then each labelled question is asked as the service would,
of this generation and of the live one where that is another; nDCG@10, recall@10 and MRR come from ir-measures, and the
difference from a paired bootstrap over the questions, whose interval is told. A question whose passage is nowhere in
a generation counts as missed there. Last, when to abstain is fitted and measured out of fold (`calibrate`).
Without questions there is reconciliation alone, and what is found is unproven. What the service would answer, and how
well that rests on what it cites, is told beside it (`answered`).

    report.json         reconciliation, figures of both, the difference, and each question's outcome
    calibration.json    when to abstain, or null; with lexicon.npz and tokenizer.json (see `abstention`)

Latency is measured, so it is in the result alone: it must not make another output of the same inputs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orrery import fingerprint
from orrery.contract import Result
from orrery.errors import UserError
from orrery.evaluation.bootstrap import differences, mean_statistic
from orrery.platform import LanguageModel
from orrery.rag import answered, calibrate, figures, judge, questions, tracked
from orrery.rag.abstention import CALIBRATION, LEXICON, Calibration, Lexicon, signals, write_lexicon
from orrery.rag.contract import ProveParams
from orrery.rag.embedding.session import MODEL, TOKENIZER, store_folder
from orrery.rag.embedding.sparse import terms
from orrery.rag.gate import QUALITY
from orrery.rag.generations import Generation, open_generation
from orrery.rag.questions import Labels, Question
from orrery.rag.reconcile import Reconciliation, reconcile
from orrery.rag.records import CHUNKS, DOCUMENTS, chunks, documents
from orrery.rag.rerank import open_reranker
from orrery.rag.retrieval import Found, retrieve
from orrery.rag.spec import KnowledgeBaseSpec
from orrery.step import Work
from orrery.store import Manifest

DEPTH = 10
# Told, never judged by the gate.
ANSWERS = ("sentence_support", "citation_precision", "answers")
LIVE = "live"
# Each question is asked so often, and the quietest counts: other processes of a machine only add time.
ROUNDS = 2
SHOWN = 5
SAID = ("judge", "answers")


@dataclass
class Asked:
    """One generation, asked all the questions: what it found, and what that is worth."""

    labels: Labels
    found: dict[str, list[Found]]
    seconds: dict[str, float]
    values: dict[str, dict[str, float]] = field(default_factory=dict)  # figure -> question -> value

    def mean(self) -> dict[str, float]:
        """Return each figure's mean over the answerable questions."""
        return {name: float(np.mean(list(by.values()))) for name, by in self.values.items()}

    def rank(self, question: Question) -> int | None:
        """Return the place of the first passage that answers a question, from 1; None when none does."""
        relevant = self.labels.relevant.get(question.id, frozenset())
        return next((n for n, f in enumerate(self.found[question.id], 1) if f.id in relevant), None)


def run(work: Work, params: ProveParams) -> Result:
    """Measure a generation. Raises `UserError` when it is damaged, or the questions file is wrong."""
    spec, made = work.knowledge, work.input("generation")
    asked = questions.read(work.project_folder / spec.questions) if spec.questions else []
    with opened(work, made, params) as generation:
        whole = reconciled(work, generation)
        work.log.info("reconciled", sound=whole.sound, chunks=whole.expected, points=whole.found)
        measured = _Measured(work, spec, params, asked, whole)
        if asked:
            measured.ask(generation, made)
    if asked:
        measured.compare()
    return measured.done()


@contextmanager
def opened(work: Work, manifest: Manifest, params: ProveParams) -> Iterator[Generation]:
    """Open a generation, with one thread: latency is that of one question at a time."""
    generation = open_generation(work.store, manifest.path, work.scratch / "open", qdrant=params.qdrant, threads=1)
    try:
        yield generation
    finally:
        generation.close()


def reconciled(work: Work, generation: Generation) -> Reconciliation:
    """Compare index, chunks and documents."""
    cut = work.open_input(work.input("chunks"), CHUNKS)
    known = documents(work.open_input(work.input("documents"), DOCUMENTS))
    return reconcile(generation.engine, chunks(cut), (d.id for d in known))


class _Measured:
    """What is found out, piece by piece."""

    def __init__(
        self,
        work: Work,
        spec: KnowledgeBaseSpec,
        params: ProveParams,
        asked: Sequence[Question],
        whole: Reconciliation,
    ) -> None:
        self.work, self.spec, self.params, self.questions, self.whole = work, spec, params, list(asked), whole
        self.own: Asked | None = None
        self.live: dict[str, Any] | None = None
        self.rival: Asked | None = None
        self.calibration: Calibration | None = None
        self.told: calibrate.Measured | None = None
        self.rows: list[dict[str, float]] = []
        self.judged: dict[str, Any] | None = None
        self.answers: dict[str, Any] | None = None
        self.reasons: list[str] = []

    @property
    def answerable(self) -> list[Question]:
        return [q for q in self.questions if q.answerable]

    # -- asking --------------------------------------------------------------------------------------

    def ask(self, generation: Generation, made: Manifest) -> None:
        """Ask the generation itself, and find out when it should be silent."""
        self.own = ask(self.work, self.spec, generation, made, self.questions)
        for id_, why in sorted(self.own.labels.lost.items()):
            self.work.log.warning(f"question {id_}: {why}")
        words = lexicon(self.work, generation)
        self.rows = [
            signals(q.question, self.own.found[q.id][: self.spec.retrieval.top_k], words) for q in self.questions
        ]
        self._calibrate(words, generation)
        self._answer(generation)
        if self.params.judge is not None:
            self._judge(LanguageModel.model_validate(self.params.judge))

    def _calibrate(self, words: Lexicon, generation: Generation) -> None:
        kinds = [q.answerable for q in self.questions]
        if (why := calibrate.enough(kinds)) is not None:
            self.reasons.append(f"when to abstain is not known: {why}")
            return
        x = calibrate.matrix(self.rows)
        self.told = calibrate.cross_fit(x, kinds, self.params.seed)
        self.calibration = calibrate.fit(x, kinds, words, self.params.seed, self.told.told())
        folder = store_folder(self.work.store, generation.facts.embedder, self.work.scratch / "open")
        shutil.copyfile(folder / TOKENIZER, self.work.scratch / TOKENIZER)

    def _answer(self, generation: Generation) -> None:
        """Have the questions answered that would be: answerable ones on which the service would not abstain."""
        assert self.own is not None
        found, top_k, language = self.own.found, self.spec.retrieval.top_k, generation.sparse.language
        asked = [
            answered.Asked(q.id, q.question, found[q.id][:top_k])
            for n, q in enumerate(self.questions)
            if q.answerable and found[q.id] and not self._abstains(n)
        ]
        endpoint = None if self.params.llm is None else LanguageModel.model_validate(self.params.llm)
        made = answered.answer(
            endpoint,
            asked,
            self.spec.answers,
            tokens=generation.embedder.count,
            terms=lambda text: terms(text, language),
            embed=generation.embedder.embed,
            language=language,
            seed=self.params.seed,
        )
        self.answers = made.told()
        if made.trouble:
            self.work.log.warning(f"the language model was not asked to the end: {made.trouble}")

    def _abstains(self, number: int) -> bool:
        """Tell whether the service would abstain, by what is fitted on all questions and the spec's own bound."""
        if self.calibration is None:
            return False
        below = self.spec.answers.abstain
        bound = self.calibration.threshold if below is None else below
        return self.calibration.score(self.rows[number]) < bound

    def _judge(self, endpoint: LanguageModel) -> None:
        assert self.own is not None
        found, top_k = self.own.found, self.spec.retrieval.top_k
        asked = [
            judge.Asked(q.id, q.question, q.answerable, tuple(f.text for f in found[q.id][:top_k]))
            for q in self.questions
        ]
        drawn = judge.sample(asked, self.params.seed)
        self.judged = judge.judge(endpoint, drawn).told(drawn)
        if self.judged["trouble"]:
            self.work.log.warning(f"the judge was not asked to the end: {self.judged['trouble']}")

    # -- comparing -----------------------------------------------------------------------------------

    def compare(self) -> None:
        """Ask the live generation the same, where it is another."""
        manifest = next(iter(self.work.inputs("live")), None)
        if manifest is None or self.own is None:
            return
        told: dict[str, Any] = {"generation": manifest.address, "key": manifest.key, "unusable": None}
        try:
            with opened(self.work, manifest, self.params) as generation:
                self.rival = ask(self.work, self.spec, generation, manifest, self.questions)
        except UserError as e:
            self.work.log.warning(f"the live generation cannot be asked: {e.message}")
            recorded: dict[str, float] = next((m.result["metrics"] for m in self.work.inputs("promised")), {})
            metrics = {name: recorded[name] for name in QUALITY if name in recorded}
            self.live = {**told, "metrics": metrics, "differences": {}, "unusable": e.message}
            return
        found = paired(self.own, self.rival, self.answerable, self.params)
        lost = len(self.rival.labels.lost)
        self.live = {**told, "metrics": self.rival.mean(), "differences": found, "lost": lost}

    # -- telling -------------------------------------------------------------------------------------

    def done(self) -> Result:
        """Write the files and the page; return the result."""
        report = self.report()
        if self.work.config.address is None:  # on a server: what was found there decides where it is kept
            # But for what models said: they say something else each night, and an evaluation elsewhere goes live anew.
            found = {name: told for name, told in report.items() if name not in SAID}
            at = fingerprint.digest([self.work.config.fingerprint, found])[:32]
            with self.work.at(at) as fresh:
                if fresh:
                    self._write(report)
        else:
            self._write(report)
        metrics = {**report["metrics"], **self._latency(), "questions": float(report["questions"])}
        metrics |= {"chunks": float(self.whole.found)}
        if self.answers is not None:
            metrics |= {name: self.answers[name] for name in ANSWERS}
        result = Result(
            metrics={k: float(v) for k, v in metrics.items() if v is not None},
            reasons=[*self._sentences(report), *self.reasons],
            facts={
                "proven": bool(self.questions),
                "primary": QUALITY[0],
                "sound": self.whole.sound,
                # What was measured holds for these settings: the service asks with them.
                "retrieval": self.spec.retrieval.model_dump(mode="json"),
            },
        )
        drawn = figures.draw(self.work.config.key, report, self._probabilities())
        page = figures.page(f"{self.work.config.project} {self.work.config.key}", report, result.metrics, drawn)
        result.links["Retrieval"] = self.work.evidence("retrieval.html", page)
        for name, data in drawn.items():
            result.links[name] = self.work.evidence(f"{name.lower().replace(' ', '-')}.png", data)
        if tracked.log(self.work, result.metrics, drawn) is not None:
            tracked.over_time(self.work, result.metrics)
        return result

    def report(self) -> dict[str, Any]:
        """Return report.json."""
        metrics: dict[str, float | None] = dict.fromkeys((*QUALITY, "abstained", "wrongly_abstained"))
        if self.own is not None:
            metrics |= self.own.mean()
        if self.told is not None:
            metrics |= {"abstained": self.told.abstained, "wrongly_abstained": self.told.wrongly}
        live = self.live
        if live is None and (manifest := next(iter(self.work.inputs("live")), None)) is not None:
            live = {"generation": manifest.address, "key": manifest.key, "unusable": None}
        if live is not None:
            live = {**live, "proven": self.params.live_is_proven}
        lost = self.own.labels.lost if self.own is not None else {}
        return {
            "metrics": metrics,
            "live": live,
            "questions": len(self.answerable),
            "unanswerable": len(self.questions) - len(self.answerable),
            "lost": [{"id": id_, "why": why} for id_, why in sorted(lost.items())],
            "reconciliation": self.whole.told(),
            "abstention": self.told.told() if self.told is not None else None,
            "judge": self.judged,
            "answers": self.answers,
            "per_question": [self._each(n, q) for n, q in enumerate(self.questions)] if self.own else [],
        }

    def _each(self, number: int, question: Question) -> dict[str, Any]:
        assert self.own is not None
        found = self.own.found[question.id]
        told: dict[str, Any] = {
            "id": question.id,
            "question": question.question,
            "answerable": question.answerable,
            "rank": self.own.rank(question),
            "live_rank": self.rival.rank(question) if self.rival is not None else None,
            "cosine": round(max((f.cosine for f in found), default=0.0), 6),
            "found": [f.uri for f in found[:SHOWN]],
            "signals": {name: round(value, 6) for name, value in self.rows[number].items()},
        }
        if self.told is not None:
            told["probability"] = round(float(self.told.probabilities[number]), 6)
            told["abstained"] = bool(self.told.shares[number] > 0.5)
        return told

    def _write(self, report: Mapping[str, Any]) -> None:
        self.work.write_json("report.json", report)
        if self.calibration is None:
            self.work.write(CALIBRATION, b"null\n")
            return
        assert self.calibration.lexicon is not None
        self.work.write(CALIBRATION, self.calibration.to_json().encode())
        write_lexicon(self.work.path(LEXICON), self.calibration.lexicon)
        shutil.copyfile(self.work.scratch / TOKENIZER, self.work.path(TOKENIZER))

    def _latency(self) -> dict[str, float]:
        if self.own is None:
            return {}
        took = 1000 * np.array(list(self.own.seconds.values()))
        return {"p50_ms": float(np.percentile(took, 50)), "p99_ms": float(np.percentile(took, 99))}

    def _probabilities(self) -> tuple[list[bool], list[float], float] | None:
        if self.told is None or self.calibration is None:
            return None
        kinds = [q.answerable for q in self.questions]
        return kinds, [float(p) for p in self.told.probabilities], self.calibration.threshold

    def _sentences(self, report: Mapping[str, Any]) -> list[str]:
        told = [self.whole.sentence()]
        if not self.questions:
            return [*told, "unproven: no questions"]
        m, a = report["metrics"], report["abstention"]
        told.append(
            f"nDCG@10 {m['ndcg_at_10']:.3f}, recall@10 {m['recall_at_10']:.3f}, MRR {m['mrr']:.3f} "
            f"on {report['questions']} questions"
        )
        if a is not None:
            told.append(
                f"out of fold, {a['abstained']:.0%} ({a['abstained_low']:.0%} … {a['abstained_high']:.0%}) of "
                f"{report['unanswerable']} unanswerable questions are abstained, and {a['wrongly']:.0%} "
                f"({a['wrongly_low']:.0%} … {a['wrongly_high']:.0%}) of the answerable ones"
            )
        if report["lost"]:
            told.append(f"{len(report['lost'])} questions have lost their passage: the sources changed, relabel them")
        if self.answers is not None:
            told += answered.sentences(self.answers)
        return told


# -- one generation ------------------------------------------------------------------------------------


def ask(
    work: Work, spec: KnowledgeBaseSpec, generation: Generation, made: Manifest, asked: Sequence[Question]
) -> Asked:
    """Ask a generation all questions as the service would, and measure what it found."""
    cut = work.store.need(made.inputs["chunks"][0])
    labels = questions.label(asked, chunks(work.open_input(cut, CHUNKS)))
    reranker = None
    if uri := spec.retrieval.reranker:
        reranker = open_reranker(uri, work.scratch / "reranker", 1, folder=work.project_folder)
    found: dict[str, list[Found]] = {}
    seconds: dict[str, float] = {}
    with work.progress(f"ask {made.key}", len(asked), "questions") as tick:
        for question in asked:
            for _ in range(ROUNDS):
                began = time.perf_counter()
                found[question.id] = retrieve(
                    generation,
                    question.question,
                    groups=question.reader,
                    top_k=max(DEPTH, spec.retrieval.top_k),
                    candidates=spec.retrieval.candidates,
                    mmr=spec.retrieval.mmr,
                    reranker=reranker,
                )
                took = time.perf_counter() - began
                seconds[question.id] = min(took, seconds.get(question.id, took))
            tick()
    result = Asked(labels, found, seconds)
    result.values = measure([q for q in asked if q.answerable], labels, found)
    return result


def measure(
    asked: Sequence[Question], labels: Labels, found: Mapping[str, Sequence[Found]]
) -> dict[str, dict[str, float]]:
    """Return nDCG@10, recall@10 and the reciprocal rank of each answerable question, by ir-measures."""
    import ir_measures
    from ir_measures import RR, R, nDCG

    # A question whose passage is lost still wants one: it is missed, not left out.
    wanted = {q.id: dict.fromkeys(labels.relevant[q.id], 1) or {"lost": 1} for q in asked}
    # By place alone: equal scores would be ordered by id.
    given = {q.id: {f.id: float(-n) for n, f in enumerate(found[q.id][:DEPTH])} or {"nothing": 0.0} for q in asked}
    names = {nDCG @ 10: "ndcg_at_10", R @ 10: "recall_at_10", RR @ 10: "mrr"}
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(wanted, 0.0) for name in names.values()}
    for one in ir_measures.iter_calc(list(names), wanted, given):
        values[names[one.measure]][one.query_id] = float(one.value)
    return values


def paired(own: Asked, rival: Asked, asked: Sequence[Question], params: ProveParams) -> dict[str, dict[str, float]]:
    """Return how much better this generation is than the live one, question by question, and the 95 % interval."""
    found = {}
    for name in QUALITY:
        mine, theirs = (np.array([one.values[name][q.id] for q in asked]) for one in (own, rival))
        d = differences(
            mean_statistic(mine),
            {LIVE: mean_statistic(theirs)},
            len(asked),
            higher_is_better=True,
            draws=params.draws,
            seed=params.seed,
        )[LIVE]
        found[name] = {"delta": d.delta, "low": d.low, "high": d.high}
    return found


def lexicon(work: Work, generation: Generation) -> Lexicon:
    """Return the rarity of the corpus's terms, and what the embedder knows of word pieces."""
    folder = store_folder(work.store, generation.facts.embedder, work.scratch / "open")
    tokenizer = generation.embedder.tokenizer
    pieces = calibrate.piece_vectors(folder / MODEL, tokenizer.get_vocab_size())
    texts = (chunk.embedded for chunk in chunks(work.open_input(work.input("chunks"), CHUNKS)))
    return calibrate.lexicon(texts, generation.sparse.language, pieces, tokenizer)
