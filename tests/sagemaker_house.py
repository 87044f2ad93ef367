"""SageMaker for tests: moto's server, and before it a thin player that makes jobs last and end as a test says.

moto checks a request's shape and keeps it; it trains nothing, calls every job Completed at once, takes a name twice,
forgets the environment and knows no StopTrainingJob. So `Player` stands between (AWS_ENDPOINT_URL_SAGEMAKER):
it passes each request on to moto and plays over the answers what moto does not know. Neither knows quotas, IAM, the
pulling of images, real spot machines, CloudWatch, or how long anything takes.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# A project whose trainings run on the class `cloud`.
SPEC = """\
version: 1
kind: model
owner: ops
task: binary
label: {{column: late}}
sources:
  flights: {{uri: "${{data}}/flights/{{partition}}.parquet", partition: month}}
gate: {{auc: {{min: 0.7}}}}
train: {{window: 1, compute: cloud, params: {{marks: "{marks}"}}}}
"""
ROLE = "arn:aws:iam::123456789012:role/orrery-training"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/orrery/ml:1"


@dataclass
class Played:
    """One job: what it was asked to be, and what the test makes of it."""

    asked: dict[str, Any]
    status: str = "InProgress"
    secondary: str = "Starting"
    more: dict[str, Any] = field(default_factory=dict)
    stopped: int = 0


class Player:
    """The jobs by name, and how SageMaker answers. `refuse`: error code and message for the next CreateTrainingJob."""

    def __init__(self, moto: str) -> None:
        self.moto, self.jobs = moto, dict[str, Played]()
        self.calls: list[str] = []
        self.refuse: tuple[str, str] | None = None
        self.url = ""

    def end(self, name: str, status: str = "Completed", secondary: str = "", **more: Any) -> None:
        """Let a job end."""
        job = self.jobs[name]
        job.secondary, job.more = secondary or status, {**job.more, **more}
        job.status = status

    def only(self) -> str:
        """Return the name of the one job there is."""
        (name,) = self.jobs
        return name

    def wait_for(self, count: int = 1, timeout: float = 60.0) -> list[str]:
        """Wait until so many jobs were started."""
        deadline = time.monotonic() + timeout
        while len(self.jobs) < count:
            assert time.monotonic() < deadline, f"{len(self.jobs)} jobs of {count}"
            time.sleep(0.05)
        return list(self.jobs)

    def answer(self, action: str, body: dict[str, Any], forward: Any) -> tuple[int, dict[str, Any]]:
        self.calls.append(action)
        name = body.get("TrainingJobName", "")
        if action == "CreateTrainingJob":
            return self._create(name, body, forward)
        if action == "StopTrainingJob":
            return self._stop(name)
        status, answer = forward()
        if action == "DescribeTrainingJob" and status == 200:
            job = self.jobs[name]
            answer |= {"TrainingJobStatus": job.status, "SecondaryStatus": job.secondary, **job.more}
            answer["Environment"] = job.asked.get("Environment", {})
        if action == "ListTrainingJobs" and status == 200:
            mine = [
                j for j in answer["TrainingJobSummaries"] if j["TrainingJobName"] in self.jobs
            ]  # moto outlives a test
            for each in mine:
                each["TrainingJobStatus"] = self.jobs[each["TrainingJobName"]].status
            answer["TrainingJobSummaries"] = mine
        return status, answer

    def _create(self, name: str, body: dict[str, Any], forward: Any) -> tuple[int, dict[str, Any]]:
        if self.refuse:
            code, message = self.refuse
            return 400, {"__type": code, "message": message}
        if name in self.jobs:
            return 400, {"__type": "ResourceInUse", "message": "Training job names must be unique"}
        status, answer = forward()
        if status == 200:
            self.jobs[name] = Played(body)
        return status, answer

    def _stop(self, name: str) -> tuple[int, dict[str, Any]]:
        job = self.jobs.get(name)
        if job is None or job.status not in ("InProgress", "Stopping"):
            return 400, {"__type": "ValidationException", "message": "The request was rejected: the job is not running"}
        job.stopped += 1
        job.status = job.secondary = "Stopping"
        return 200, {}


def _handler(player: Player) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # HTTP/1.0: each connection ends with its answer, so none is left open when a test ends.
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            action = (self.headers.get("X-Amz-Target") or "").partition(".")[2]

            def forward() -> tuple[int, dict[str, Any]]:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
                request = urllib.request.Request(player.moto + self.path, data=raw, headers=headers, method="POST")
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        return answer.status, json.loads(answer.read() or b"{}")
                except urllib.error.HTTPError as e:
                    with e:
                        return e.code, json.loads(e.read() or b"{}")

            status, answer = player.answer(action, json.loads(raw or b"{}"), forward)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def sagemaker(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Player]:
    """A SageMaker of this test's own; the environment names it, and dummy credentials."""
    player = Player(s3_endpoint)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(player))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    player.url = f"http://127.0.0.1:{server.server_address[1]}"
    values = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ENDPOINT_URL_SAGEMAKER": player.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        # moto's IAM has no such role; SageMaker's SDK would ask it what the role may do.
        "SAGEMAKER_VALIDATE_ROLE": "false",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    try:
        yield player
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
