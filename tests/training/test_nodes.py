"""A training on two nodes: two steps as two pods run them, of which one is stopped, killed, late, or never comes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from interruptions import Training, group_kill
from training_bench import TORCH_MODEL, trips

from orrery import errors
from orrery.contract import Node, Result, StepConfig, refuse_uneven
from orrery.training.meeting import Meeting, free_port, interface_of

ROWS = 6000
TRAIN = "{processes: 2, strategy: ddp, patience: 99, checkpoint: {every: 60}}"
STEP = "import sys, time; from orrery.step import main; sys.exit(main(sys.argv[1:], time.time()))"


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return trips(ROWS).append_column("row", pa.array(np.arange(ROWS, dtype=np.float64)))


@pytest.fixture(scope="module")
def wanted(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of two processes on one node."""
    digest = Training(tmp_path_factory.mktemp("one"), table, TRAIN).finish(processes=2).result.digest
    assert digest
    return digest


class Nodes(Training):
    """One attempt after another, each as two processes that meet on the loopback."""

    def attempt(self, patience: float = 60, **params: object) -> None:
        """Write the next attempt's config."""
        self.attempts += 1
        config: StepConfig = self.bench.config("same", processes=2, **params)
        folder = f"trips/runs/test/train/{self.attempts}"
        self.config = config.model_copy(update={"attempt": self.attempts, "folder": folder})
        self.bench.store.put(f"{folder}/config.json", self.config.model_dump_json().encode())
        self.where = f"{self.bench.store.uri}/{folder}"
        told = {"ORRERY_NODES": "2", "ORRERY_MASTER": f"127.0.0.1:{free_port()}", "ORRERY_PATIENCE": str(patience)}
        self.env = {**os.environ, "SEEN": str(self.seen), **told}

    def node(self, number: int) -> subprocess.Popen[bytes]:
        """Start one node, as its pod does."""
        argv = [sys.executable, "-c", STEP, "--config", f"{self.where}/config.json"]
        argv += ["--result", f"{self.where}/result.json"]
        env = {**self.env, "ORRERY_NODE": str(number)}
        with self.log_of(number).open("wb") as log:
            return subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)

    def both(self) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        return self.node(0), self.node(1)

    def log_of(self, number: int) -> Path:
        return self.bench.root / f"log-{self.attempts}-{number}.txt"

    def said(self) -> str:
        return "\n".join(self.log_of(n).read_text() for n in (0, 1) if self.log_of(n).exists())

    def result_of(self, number: int) -> Result:
        name = f"result-{number}.json" if number else "result.json"
        return Result.model_validate_json(self.bench.store.read(f"{self.config.folder}/{name}"))

    def trained(self, leader: subprocess.Popen[bytes], steps: int) -> None:
        """Wait until so many more steps of both ranks are done."""
        before = self.steps()
        assert self.when(leader, lambda: self.steps() >= before + 2 * steps), self.said()


def ended(*nodes: subprocess.Popen[bytes], within: float = 180) -> list[int]:
    return [node.wait(within) for node in nodes]


@pytest.fixture
def nodes(tmp_path: Path, table: pa.Table) -> Nodes:
    return Nodes(tmp_path, table, TRAIN)


@pytest.mark.slow
def test_two_nodes_train_what_one_does_also_when_either_is_lost(nodes: Nodes, wanted: str) -> None:
    """SIGTERM to node 1, SIGKILL of node 1, SIGKILL of node 0; then a follower that comes late, and the end."""
    nodes.attempt()
    leader, other = nodes.both()
    nodes.trained(leader, 50)
    group_kill(other, signal.SIGTERM)
    assert ended(leader, other) == [143, 143], nodes.said()
    for number in (0, 1):
        result = nodes.result_of(number)
        assert result.status == "interrupted" and result.error is not None
        assert result.error.details["committed"] == result.error.details["step"] > 0
    came = result.error.details["committed"]

    nodes.attempt()
    leader, other = nodes.both()
    nodes.trained(leader, 70)
    group_kill(other, signal.SIGKILL)
    assert ended(leader, other, within=90) == [1, -signal.SIGKILL], nodes.said()
    assert f"goes on from step {came}" in nodes.said()
    lost = nodes.result_of(0)
    assert lost.status == "bug" and lost.error is not None and lost.error.kind == "RankLost"
    assert "node 1 of 2 is gone" in lost.error.message

    nodes.attempt()
    leader, other = nodes.both()
    nodes.trained(leader, 30)
    group_kill(leader, signal.SIGKILL)
    assert ended(leader, other, within=90) == [-signal.SIGKILL, 1], nodes.said()
    lost = nodes.result_of(1)
    assert lost.error is not None and lost.error.kind == "RankLost" and "node 0 of 2 is gone" in lost.error.message

    nodes.attempt()
    leader = nodes.node(0)
    assert nodes.when(leader, lambda: "waits for node 1" in nodes.said()), nodes.said()
    other = nodes.node(1)
    assert ended(leader, other) == [0, 0], nodes.said()
    run = nodes.bench._read(nodes.result_of(0))
    assert run.result.digest == wanted
    assert nodes.result_of(1).facts == {"node": 1} and nodes.result_of(1).output is None
    assert not nodes.checkpoints.exists()
    names = sorted(path.name for path in nodes.checkpoints.parent.glob("a*"))
    assert [name[:2] for name in names] == ["a3", "a4"]  # of killed node 0 and of the last: node 1 writes nothing here

    assert ended(nodes.node(1)) == [0]  # it is committed: nothing is left to train along with
    assert nodes.result_of(1).skipped


@pytest.mark.slow
def test_a_node_that_never_comes(nodes: Nodes) -> None:
    nodes.attempt(patience=1)
    leader = nodes.node(0)
    assert ended(leader) == [75], nodes.said()
    error = nodes.result_of(0).error
    assert error is not None and error.kind == "TryAgain"
    assert error.message == "node 1 of 2 did not come within 1 s" and "ORRERY_PATIENCE" in error.hint
    with pytest.raises(errors.TryAgain, match=r"node 0 \(127\.0\.0\.1:\d+\) did not come within 0\.3 s"):
        Meeting(Node(1, 2, f"127.0.0.1:{free_port()}", 0.3), "runs/now").meet()


BROKEN = TORCH_MODEL.replace(
    "        out = self.layers(",
    "        import os\n"
    "        if self.training and os.environ['RANK'] == '1' and len(numeric) != 32:\n"
    "            raise ValueError('only here')\n"
    "        out = self.layers(",
)


@pytest.mark.slow
def test_the_error_of_a_rank_elsewhere_is_told(tmp_path: Path, table: pa.Table) -> None:
    nodes = Nodes(tmp_path, table.slice(0, 2000), "{processes: 2}", BROKEN)
    nodes.attempt()
    assert ended(*nodes.both()) == [64, 64], nodes.said()
    for number in (0, 1):
        error = nodes.result_of(number).error
        assert error is not None and "ValueError: only here" in error.message, nodes.said()


FITTED = """
def fit(train, valid, params):
    raise AssertionError("it is refused before")
"""


def test_what_cannot_be_spread_is_refused(tmp_path: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(tmp_path, table.slice(0, 500), "{}", FITTED)
    for name, value in {"ORRERY_NODES": "2", "ORRERY_NODE": "0", "ORRERY_MASTER": "127.0.0.1:1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.SpecError, match=r"fit trains in one process.*pods: 2"):
        nodes.bench.train("fitted", processes=2)
    with pytest.raises(errors.RequestError, match="evaluate cannot be spread over 2 pods"):
        nodes.bench._execute(nodes.bench.config("judged", verb="evaluate", inputs={}))
    with pytest.raises(errors.RequestError, match=r"train\.processes 3 .* compute class 'gpus' \(2\)") as e:
        refuse_uneven(3, 2, "gpus")
    assert e.value.hint == "train.processes: 2 or 4, or another train.compute"


def test_a_node_is_told_by_its_environment() -> None:
    assert Node.here({}) == Node() and Node().leads
    ours = {"ORRERY_NODES": "4", "ORRERY_NODE": "2", "ORRERY_MASTER": "unit-0.unit.ns.svc:29500", "RANK": "9"}
    assert Node.here(ours) == Node(2, 4, "unit-0.unit.ns.svc:29500")
    kubeflow = {"ORRERY_NODES": "2", "RANK": "1", "MASTER_ADDR": "unit-master-0", "MASTER_PORT": "23456"}
    assert Node.here({**kubeflow, "ORRERY_PATIENCE": "60"}) == Node(1, 2, "unit-master-0:23456", 60.0)
    for wrong in ({"ORRERY_NODE": "4"}, {"ORRERY_NODE": ""}, {"ORRERY_NODE": "-1"}, {"ORRERY_MASTER": "nowhere"}):
        with pytest.raises(errors.RequestError):
            Node.here({**{k: v for k, v in ours.items() if k != "RANK"}, **wrong})


def test_strangers_are_sent_away_and_the_door_stays_open() -> None:
    master = f"127.0.0.1:{free_port()}"
    leader, other = (Meeting(Node(n, 2, master, 20), "runs/now") for n in (0, 1))
    ground = []
    thread = threading.Thread(target=lambda: ground.append(leader.meet()))
    thread.start()
    stranger = Meeting(Node(1, 2, master, 20), "runs/before")
    with pytest.raises(errors.TryAgain, match="node 0 works on runs/now"):
        stranger.meet()
    stranger.close()
    with socket.create_connection(("127.0.0.1", int(master.rpartition(":")[2]))) as nobody:
        nobody.sendall(b"GET / HTTP/1.1\r\n\r\n")
    mine = other.meet()
    thread.join(20)
    assert [ground[0].host, ground[0].port] == [mine.host, mine.port] and mine.interface == ground[0].interface
    assert leader.gone() == other.gone() == ""
    leader.done()
    leader.close()
    assert other.gone(0.3) == ""  # it said that it was done
    other.close()
    assert sys.platform != "linux" or (interface_of("127.0.0.1"), interface_of("192.0.2.1")) == ("lo", "")


def test_a_node_that_leaves_is_noticed() -> None:
    master = f"127.0.0.1:{free_port()}"
    leader, other = (Meeting(Node(n, 2, master, 20), "runs/now") for n in (0, 1))
    thread = threading.Thread(target=leader.meet)
    thread.start()
    other.meet()
    thread.join(20)
    other.close()
    assert leader.gone(within=20) == "node 1 of 2 is gone"
    leader.close()
