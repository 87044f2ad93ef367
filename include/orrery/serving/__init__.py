"""The service that answers questions from a knowledge base, with sources."""

from __future__ import annotations

from pathlib import Path


def main(project: str, host: str = "127.0.0.1", port: int = 8070, tokens: Path | None = None) -> int:
    """Serve a project until SIGTERM; return the exit code. In the environment `serve`. Raises `UserError`."""
    from orrery import log
    from orrery.serving.server import serve

    log.configure()
    return serve(project, host, port, tokens)
