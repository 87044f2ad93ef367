"""A small SMTP server on loopback, which takes mail, or refuses it as it is told to."""

from __future__ import annotations

import socketserver
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread


class _Mail(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server: _Server = self.server  # type: ignore[assignment]
        self._say("220 small")
        while line := self.rfile.readline().decode().strip():
            word = line.split()[0].upper()
            if word in server.refuses:
                self._say(server.refuses[word])
            elif word == "DATA":
                self._say("354 go on")
                data = b""
                while (part := self.rfile.readline()) not in (b".\r\n", b""):
                    data += part
                server.mails.append((list(server.to), data.decode()))
                server.to.clear()
                self._say("250 taken")
            elif word == "QUIT":
                self._say("221 bye")
                return
            else:
                if word == "RCPT":
                    server.to.append(line.partition(":")[2].strip("<> "))
                self._say("250 fine")

    def _say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, refuses: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Mail)
        self.refuses, self.to = refuses, list[str]()
        self.mails: list[tuple[list[str], str]] = []


@contextmanager
def smtp_server(**refuses: str) -> Iterator[tuple[int, list[tuple[list[str], str]]]]:
    """Yield the port and the mails taken, each with its recipients. `refuses`: command -> answer."""
    with _Server(refuses) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1], server.mails
        finally:
            server.shutdown()
            thread.join()
