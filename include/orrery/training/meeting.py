"""How the nodes of a training find each other, and how each of them learns that another one is gone.

Node 0 opens a door at the address that all were told; the others knock until it does, say who they are, and are told
where the ranks meet once all have come. Machines start minutes apart, so each has patience. The connections stay open
as long as the node trains: when a process is killed the kernel closes its, and a machine that has lost its power is
told by TCP's keep-alive. A node that has done its part says so before it goes.

What passes here is who is there. Who may knock at all is the network's to say (docker/kubernetes: NetworkPolicy).
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orrery import log
from orrery.contract import Node
from orrery.errors import RankLost, TryAgain

LOOK_S = 0.3
SAY_S = 30.0  # how often a node that waits says for whom
HELLO_S = 5.0  # for a line that is on its way
LONGEST = 4096
DONE = b'"done"\n'
# A machine without power answers nothing: 5 s of silence, then three questions 5 s apart.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class Ground:
    """Where the ranks of all nodes meet: node 0's address and a free port, and this node's interface ("": unknown)."""

    host: str
    port: int
    interface: str


class Meeting:
    """One node's connections: node 0 has one to each of the others, which have one to it."""

    def __init__(self, node: Node, attempt: str) -> None:
        self.node, self.attempt = node, attempt
        self._others: dict[int, socket.socket] = {}
        self._done: set[int] = set()
        self._gone = ""
        self._lock = threading.Lock()

    def meet(self) -> Ground:
        """Wait until all nodes are there. Raises `TryAgain` when one does not come, `RankLost` when one has left."""
        return self._lead() if self.node.leads else self._follow()

    def gone(self, within: float = 0.0) -> str:
        """Return a sentence about a node that is gone without having done its part, or nothing.

        `within`: how many seconds it may take to show.
        """
        end = time.monotonic() + within
        while True:
            with self._lock:
                self._look()
                if self._gone or time.monotonic() >= end:
                    return self._gone
            time.sleep(0.05)

    def done(self) -> None:
        """Say that this node has done its part, or stops with all others: its end is no loss."""
        for other in self._others.values():
            with contextlib.suppress(OSError):
                other.sendall(DONE)

    def close(self) -> None:
        """Leave. Who is left without a word takes this node for lost."""
        with self._lock:
            for other in self._others.values():
                other.close()
            self._others = {}

    # -- node 0 ------------------------------------------------------------------------------------

    def _lead(self) -> Ground:
        with _door(self.node.master) as door:
            wait = _Patience(self.node.patience)
            while len(self._others) < self.node.of - 1:
                wait.say(f"waits for {self._missing()}")
                if select.select([door], [], [], LOOK_S)[0]:
                    self._welcome(door.accept()[0])
                if gone := self.gone():
                    raise RankLost(f"{gone} before the training had begun")
                if wait.over:
                    raise TryAgain(
                        f"{self._missing()} did not come within {self.node.patience:g} s",
                        hint="is there a machine for each pod? ORRERY_PATIENCE says how long they wait for each other",
                    )
        port = free_port()
        for other in self._others.values():
            _send(other, {"port": port})
        own = next(iter(self._others.values())).getsockname()[0]
        return Ground("127.0.0.1", port, interface_of(own))

    def _welcome(self, other: socket.socket) -> None:
        """Take a node in that says it is one of this attempt's; whoever else knocks is sent away."""
        try:
            told = _receive(other)
            known = told["attempt"] == self.attempt and told["of"] == self.node.of
            number = int(told["node"])
        except (OSError, ValueError, KeyError, TypeError):
            other.close()
            return
        if not known or not 0 < number < self.node.of or number in self._others:
            log.get().warning(f"somebody else knocked: node {number} of {told['of']}, attempt {told['attempt']}")
            with contextlib.suppress(OSError):
                _send(other, {"refused": f"node 0 works on {self.attempt}, with {self.node.of} nodes"})
            other.close()
            return
        _keep_alive(other)
        self._others[number] = other

    def _missing(self) -> str:
        return ", ".join(f"node {n}" for n in range(1, self.node.of) if n not in self._others) + f" of {self.node.of}"

    # -- the others --------------------------------------------------------------------------------

    def _follow(self) -> Ground:
        wait = _Patience(self.node.patience)
        host, _, port = self.node.master.rpartition(":")
        while True:
            try:
                leader = socket.create_connection((host.strip("[]"), int(port)), timeout=HELLO_S)
                break
            except OSError as e:  # it does not run yet, or its name is not known yet
                if wait.over:
                    raise TryAgain(
                        f"node 0 ({self.node.master}) did not come within {self.node.patience:g} s: {e}",
                        hint="is there a machine for its pod? ORRERY_PATIENCE says how long they wait for each other",
                    ) from None
                wait.say(f"waits for node 0 at {self.node.master}: {e}")
            time.sleep(LOOK_S)
        self._others[0] = leader
        _keep_alive(leader)
        try:
            _send(leader, {"node": self.node.number, "of": self.node.of, "attempt": self.attempt})
            while not select.select([leader], [], [], LOOK_S)[0]:  # as long as node 0 waits for others
                wait.say("waits with node 0 for the others")
            told = _receive(leader)
        except (OSError, ValueError) as e:
            raise TryAgain(f"node 0 has left before the training had begun: {e}") from None
        if "refused" in told:
            raise TryAgain(
                f"node 0 sent node {self.node.number} away: {told['refused']}", hint="it is of another attempt"
            )
        return Ground(_plain(leader.getpeername()[0]), int(told["port"]), interface_of(leader.getsockname()[0]))

    def _look(self) -> None:
        """Read what the connections have; an end without a word is a node that is gone."""
        while self._others and (ready := select.select(list(self._others.values()), [], [], 0)[0]):
            for number in [n for n, other in self._others.items() if other in ready]:
                try:
                    said = self._others[number].recv(LONGEST)
                except OSError:
                    said = b""
                if DONE in said:
                    self._done.add(number)
                if not said:
                    self._others.pop(number).close()
                    if number not in self._done:
                        self._gone = self._gone or f"node {number} of {self.node.of} is gone"


@contextlib.contextmanager
def joined(node: Node, attempt: str) -> Iterator[tuple[Meeting, Ground] | tuple[None, None]]:
    """Meet the other nodes, if there are any, and stay in touch with them for the length of a `with` block."""
    if node.of == 1:
        yield None, None
        return
    meeting = Meeting(node, attempt)
    try:
        ground = meeting.meet()
        yield meeting, ground
    finally:
        meeting.close()


class _Patience:
    """How long a node waits, and when it says so."""

    def __init__(self, seconds: float) -> None:
        self._began, self._said, self._seconds = time.monotonic(), -SAY_S, seconds

    @property
    def over(self) -> bool:
        return time.monotonic() - self._began > self._seconds

    def say(self, what: str) -> None:
        waited = time.monotonic() - self._began
        if waited - self._said >= SAY_S:
            self._said = waited
            log.get().info(what, waited_s=round(waited), patience_s=round(self._seconds))


def _door(master: str) -> socket.socket:
    """Return a listening socket: on the loopback when the address is there, else on all of a pod's addresses."""
    host, _, port = master.rpartition(":")
    if host in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", int(port)))
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a kernel without IPv6
            return socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", int(port)))


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(HELLO_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # each system has some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Return one line's object. Raises `OSError` at an end or after `HELLO_S`, `ValueError` for anything else."""
    connection.settimeout(HELLO_S)
    data = b""
    while not data.endswith(b"\n") and len(data) < LONGEST:
        if not (more := connection.recv(1)):  # no more than the line: what follows is `_look`'s
            raise ConnectionError("the connection was closed")
        data += more
    told = json.loads(data)
    if not isinstance(told, dict):
        raise ValueError("no object")
    return told


def free_port() -> int:
    """Return a port that nobody has at the moment."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def _plain(address: str) -> str:
    """Return an IPv4 address that came over an IPv6 socket as itself."""
    return address.removeprefix("::ffff:")


def interface_of(address: str) -> str:
    """Return the name of the network interface with this address, or "": then gloo looks for one by the host's name."""
    address = _plain(address)
    if sys.platform != "linux":
        return ""
    if ":" in address:
        return _interface_v6(address)
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(s.fileno(), 0x8915, name.encode().ljust(40, b"\0"))  # SIOCGIFADDR
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return ""


def _interface_v6(address: str) -> str:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    try:
        with open("/proc/net/if_inet6") as f:
            rows = [line.split() for line in f]
    except OSError:
        return ""
    return next((row[-1] for row in rows if row[0] == wanted), "")
