"""Logs of steps: one event per line, readable as it stands; JSON when a program reads it (ORRERY_LOG=json).

Progress is a bar on a terminal and a line now and then in a log.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

PROGRESS_EVERY_S = 5.0


def _without_rich() -> Any:
    """Import structlog without rich, which it takes for tracebacks in colour that nobody here asks for (0.1 s)."""
    hidden = "rich" not in sys.modules
    if hidden:
        sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("structlog")
    finally:
        if hidden:
            del sys.modules["rich"]


structlog: Any = _without_rich()


def _line(_: Any, __: str, event: dict[str, Any]) -> str:
    """Render `12:03:44 INFO  validated  rows=26,398 quarantined=12`."""
    level, stamp = str(event.pop("level", "info")).upper(), event.pop("timestamp", "")
    text = str(event.pop("event", ""))
    error = event.pop("exception", None)
    rest = " ".join(f"{k}={shown(v)}" for k, v in event.items())
    line = f"{stamp} {level:<7} {text}" + (f"  {rest}" if rest else "")
    return line + (f"\n{error}" if error else "")


def shown(value: Any) -> str:
    """Return a logged value as people read it: thousands apart, four digits, quotes only where needed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"
    text = str(value)
    return repr(text) if " " in text or not text else text


def configure() -> None:
    """Send structlog and the standard library's logging to standard output, one line an event."""
    as_json = os.environ.get("ORRERY_LOG") == "json"
    renderer: Any = structlog.processors.JSONRenderer() if as_json else _line
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(_Out()),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    )
    handler = _Handler()
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


class _Out(io.TextIOBase):
    """Standard output that may go away: who reads the log may die first, and the step must still end in order."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()


class _Handler(logging.Handler):
    """Libraries' warnings, in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        method = log.error if record.levelno >= logging.ERROR else log.warning
        method(record.getMessage(), logger=record.name)


def get() -> Any:
    """Return the logger."""
    return structlog.get_logger()


class Tick(Protocol):
    """Call it with how much more is done."""

    def __call__(self, n: float = 1.0, /) -> None: ...


@contextmanager
def progress(label: str, total: float, unit: str = "") -> Iterator[Tick]:
    """Show how far `label` is: a bar on a terminal, a line each five seconds in a log."""
    if sys.stderr.isatty() and os.environ.get("ORRERY_LOG") != "json":
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n=1.0: bar.advance(task, n)
        return
    done, last = 0.0, time.monotonic()

    def tick(n: float = 1.0, /) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last >= PROGRESS_EVERY_S:
            last = time.monotonic()
            get().info(
                f"{label}: {done:,.0f} of {total:,.0f} {unit}".rstrip() + f" ({100 * done / max(total, 1e-9):.0f} %)"
            )

    yield tick
