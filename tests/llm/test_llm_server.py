"""The laptop's own language model: real weights, a real process, real ends."""

from __future__ import annotations

import json
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orrery.errors import UserError
from orrery.llm import server

QUESTION = [{"role": "user", "content": "Say hello."}]
# Whoever runs the tests may have a proxy set; this machine's own servers are not behind it.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Start the server; give its process, its address, and what it said."""
    argv = [sys.executable, "-m", "orrery.llm.server", "--port", "0", *arguments]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        line = process.stdout.readline() if ready else ""
        found = re.search(r"address=(http://\S+)/v1", line)
        assert found, line
        yield process, found[1], line
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running("--context", "512") as (_, url, said):
        assert "model=smollm2" in said and "licence=Apache-2.0" in said
        yield url


def ask(url: str, **body: Any) -> Any:
    data = json.dumps({"messages": QUESTION, "max_tokens": 8, "temperature": 0, **body}).encode()
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data=data, headers={"Content-Type": "application/json"}
    )
    return OPENER.open(request, timeout=60)


def test_it_answers_in_openais_protocol(address: str) -> None:
    with OPENER.open(f"{address}/health", timeout=10) as answer:
        assert json.load(answer) == {"status": "ok"}
    with OPENER.open(f"{address}/v1/models", timeout=10) as answer:
        (known,) = json.load(answer)["data"]
    assert known["id"] == "smollm2"
    assert known["meta"]["n_ctx"] == 512, "each of two answers at a time has the whole context"
    with ask(address, model="smollm2") as answer:
        said = json.load(answer)
    assert said["choices"][0]["message"]["content"]
    assert said["usage"]["completion_tokens"] <= 8


def test_it_streams_what_it_answers(address: str) -> None:
    with ask(address) as answer:
        whole = json.load(answer)["choices"][0]["message"]["content"]
    with ask(address, stream=True) as answer:
        lines = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"] for line in lines[:-1]]
    assert "".join(c[0]["delta"].get("content") or "" for c in chunks if c) == whole
    assert [c[0]["finish_reason"] for c in chunks if c][-1] in ("stop", "length")


def test_a_prompt_over_the_context_is_refused_and_it_lives_on(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(address, messages=[{"role": "user", "content": "word " * 2000}])
    with caught.value as refused:
        assert refused.code == 400
    with ask(address) as answer:
        assert json.load(answer)["choices"]


def test_it_is_measured_and_shows_nobody_elses_work(address: str) -> None:
    with OPENER.open(f"{address}/metrics", timeout=10) as answer:
        assert "llamacpp:requests_processing" in answer.read().decode()
    for path in ("/slots", "/"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            OPENER.open(f"{address}{path}", timeout=10)
        caught.value.close()


def test_pages_of_other_sites_may_not_use_it(address: str) -> None:
    request = urllib.request.Request(f"{address}/v1/models", headers={"Origin": "http://evil.example"})
    with OPENER.open(request, timeout=10) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] in (None, "")


def listening(pid: int) -> set[str]:
    """Return the addresses, as /proc writes them, on which a process listens for TCP."""
    owned = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {fields[1] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in owned}


def test_it_is_on_loopback_only_and_ends_on_sigterm_while_it_writes() -> None:
    with running("--context", "512", "--parallel", "1") as (process, url, _):
        assert listening(process.pid) and all(a.startswith("0100007F:") for a in listening(process.pid))
        with ask(url, stream=True, max_tokens=400, ignore_eos=True) as answer:
            answer.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        assert process.stdout is not None
        assert "told to stop" in process.stdout.read()


def test_sigterm_while_it_loads_ends_it() -> None:
    argv = [sys.executable, "-m", "orrery.llm.server", "--port", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) in (0, -signal.SIGTERM)


# what is refused


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert server.main([*arguments]) == 64
    return capfd.readouterr().out


def test_a_taken_port_is_said_before_the_weights_are_read(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = refused(capfd, "--port", port)
    assert f"port {port} is taken" in said and "ORRERY_LLM_PORT" in said


def test_files_that_are_no_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in refused(capfd, "--model", str(tmp_path / "none.gguf"))
    assert "is a directory" in refused(capfd, "--model", str(tmp_path))
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    assert "is no GGUF file" in refused(capfd, "--model", str(text))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"x" * 1000)
    assert "llama.cpp cannot serve" in refused(capfd, "--model", str(damaged), "--port", "0")


@pytest.mark.parametrize(
    "arguments", [["--port", "http"], ["--port", "65536"], ["--context", "1"], ["--parallel", "0"]]
)
def test_arguments_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        server.main(arguments)
    assert caught.value.code == 2
    assert "a whole number from" in capsys.readouterr().err


def test_the_weights_are_found_without_importing_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = server.packaged()
    assert found.file.name == "SmolLM2-135M-Instruct.Q4_1.gguf" and found.file.is_file()
    assert (found.name, found.licence) == ("smollm2", "Apache-2.0")
    assert server.PACKAGE not in sys.modules
    monkeypatch.setattr(server, "PACKAGE", "no_such_package")
    with pytest.raises(UserError) as caught:
        server.packaged()
    assert "docker/venv.py llm" in caught.value.hint


def test_a_file_of_ones_own_is_called_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "My model (v2).Q8_0.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    assert server.given(file, None).name == "My-model-v2-.Q8_0"
    assert server.given(file, "mine").name == "mine"
