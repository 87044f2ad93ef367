"""A real S3 server (moto) for tests of any room, as a fixture: `from s3 import s3_bucket` in a conftest.

moto lives in the `dev` environment; the server is a process of its own on a free loopback port.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

VENVS = Path(os.environ.get("ORRERY_VENVS", Path(__file__).resolve().parent.parent / ".venvs"))
START_S = 60
# moto looks whether a key is there and then puts it: of two puts at the same moment both would be the first.
MOTO = """
import sys, threading
from moto.s3.responses import S3Response
from moto.server import main
put, one = S3Response.put_object, threading.Lock()
def in_turn(self):
    with one:
        return put(self)
S3Response.put_object = in_turn
main(sys.argv[1:])
"""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "moto_server ended"
        with socket.socket() as s:
            s.settimeout(1)
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("moto_server did not start")


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running S3 server, ended after the session."""
    binary = VENVS / "dev" / "bin" / "moto_server"
    assert binary.exists(), f"{binary} is missing: make the dev environment"
    port = _free_port()
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    argv = [str(binary.with_name("python")), "-c", MOTO, "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)
        log.close()


@pytest.fixture
def s3_bucket(s3_endpoint: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The s3:// URI of a new bucket of this test; the environment names endpoint and dummy credentials."""
    import fsspec

    values = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{abs(hash(request.node.nodeid)) % 10**12}"
    fs = fsspec.filesystem("s3", use_listings_cache=False, client_kwargs={"endpoint_url": s3_endpoint})
    fs.mkdir(bucket)
    return f"s3://{bucket}"
