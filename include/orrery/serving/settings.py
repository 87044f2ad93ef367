"""What bounds the service: how much at once, how long, how large. One place, with the reasons."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Settings:
    """Bounds of one process. Times in seconds."""

    # A search is bound by the processor: more of them at once than cores only makes each slower.
    searches: int = field(default_factory=_cores)
    # Waiting ones per search at work. A search takes about 10 ms, so that whoever waits is served within 0.1 s.
    search_queue: int = 8
    search_wait: float = 2.0
    search_timeout: float = 10.0
    # Answers that the model writes at once, and that wait for it; one more is answered by passages alone.
    generations: int = 8
    generation_queue: int = 16
    requests: int = 256
    # Beside the model's time: search, and a client that reads slowly.
    request_timeout: float = 60.0
    connections: int = 1024
    header_bytes: int = 16 * 1024
    header_timeout: float = 10.0
    body_timeout: float = 10.0
    # How much of a body that is too large is read, and thrown away, so that its sender hears the 413.
    drain_bytes: int = 4 * 1024 * 1024
    poll: float = 2.0
    store_timeout: float = 20.0
    retry: float = 5.0
    retry_most: float = 60.0
    stop: float = 8.0
    # Answers that may still be given a thumb.
    remembered: int = 1_000
    remembered_for: float = 3_600.0
    feedback_per_minute: int = 30
    breaker_failures: int = 3
    breaker_rest: float = 15.0
    breaker_rest_most: float = 120.0
    # Threads of one search's network: under load one is better than many (bench_serve).
    threads: int = 1
