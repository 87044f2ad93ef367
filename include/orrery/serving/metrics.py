"""Prometheus metrics of one service: how long each stage takes, how questions end, what answers, what waits."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from orrery.serving.live import Serving

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGES = ("auth", "queue", "embed", "retrieve", "rerank", "extract", "generate", "total")
OUTCOMES = ("answered", "abstained", "degraded", "refused", "cancelled", "failed")
# Seconds: a search takes milliseconds, a model many seconds.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics, in a registry of their own; `text()` is what a scrape gets."""

    def __init__(self, project: str) -> None:
        disable_created_metrics()  # a second series for each, which nobody reads
        self.registry = CollectorRegistry()
        self._project = project
        name, registry = "orrery_serve", self.registry
        ProcessCollector(registry=registry)
        self.stage = Histogram(
            f"{name}_stage_seconds", "Time of a question by stage.", ["stage"], buckets=BUCKETS, registry=registry
        )
        self.questions = Counter(f"{name}_questions", "Questions by how they ended.", ["outcome"], registry=registry)
        self.abstained = Counter(f"{name}_abstained", "Questions without an answer in the passages.", registry=registry)
        self.degraded = Counter(
            f"{name}_degraded", "Answers without the language model, by why.", ["why"], registry=registry
        )
        self.refused = Counter(f"{name}_refused", "Requests refused, by HTTP status.", ["status"], registry=registry)
        self.invented = Counter(f"{name}_invented_citations", "Citations of no passage, taken out.", registry=registry)
        self.feedback = Counter(f"{name}_feedback", "Thumbs.", ["thumb"], registry=registry)
        self.switches = Counter(f"{name}_switches", "Generations that became the live one.", registry=registry)
        self.refusals = Counter(f"{name}_generation_refused", "Attempts to open a damaged one.", registry=registry)
        self.problem = Gauge(f"{name}_generation_problem", "1: the live one could not be opened.", registry=registry)
        self.outage = Gauge(f"{name}_store_problem", "1: the store does not answer.", registry=registry)
        self.generation = Gauge(
            f"{name}_generation_info",
            "What answers.",
            ["project", "generation", "version", "embedder", "proven"],
            registry=registry,
        )
        self.passages = Gauge(f"{name}_passages", "Passages of what answers.", registry=registry)
        self.in_flight = Gauge(f"{name}_in_flight", "Questions being answered.", registry=registry)
        self.queued = Gauge(f"{name}_queued", "Questions that wait, by for what.", ["what"], registry=registry)
        self.breaker = Gauge(f"{name}_model_left_alone", "1: the language model failed, and rests.", registry=registry)
        # All series from the start: a rate over one that appears later misses its first step.
        for stage in STAGES:
            self.stage.labels(stage)
        for outcome in OUTCOMES:
            self.questions.labels(outcome)

    def switched(self, serving: Serving) -> None:
        """Another generation answers from now on."""
        self.switches.inc()
        self.problem.set(0)
        self.generation.clear()
        self.generation.labels(
            self._project,
            serving.name,
            serving.pointer.version,
            serving.knowledge.embedder,
            str(serving.pointer.proven).lower(),
        ).set(1)
        self.passages.set(serving.knowledge.count)

    def refused_generation(self) -> None:
        """A generation could not be opened."""
        self.refusals.inc()
        self.problem.set(1)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        data: Any = generate_latest(self.registry)
        return bytes(data)
