"""A small web server on loopback, each path with an answer of its own; and PDF files, made as they are needed."""

from __future__ import annotations

import io
import ssl
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject, StreamObject


@dataclass
class Answer:
    """What a path answers: a body, or what writes one piece by piece."""

    body: bytes | Callable[[Any], None] = b""
    mime: str | None = "text/html; charset=utf-8"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Web:
    """The server's answers by path, how often each was asked for, the `Host` headers and the names in TLS it saw."""

    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    hosts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def allow(self) -> frozenset[str]:
        """The address that a fetcher must be allowed."""
        return frozenset({f"127.0.0.1:{self.port}"})

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def page(self, path: str, body: str | bytes, mime: str | None = "text/html; charset=utf-8", **more: Any) -> str:
        """Set a path's answer; return its URL."""
        self.answers[path] = Answer(body.encode() if isinstance(body, str) else body, mime, **more)
        return self.url(path)

    def moved(self, path: str, to: str, status: int = 302) -> str:
        """Let a path redirect; return its URL."""
        self.answers[path] = Answer(status=status, headers={"Location": to})
        return self.url(path)


@contextmanager
def serving(certificate: Path | None = None) -> Iterator[Web]:
    """Run a server on a free port of loopback; with TLS when it has a certificate (and key, in the same file)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web.asked[self.path] += 1
            web.hosts.append(self.headers["Host"])
            answer = web.answers.get(self.path, Answer(b"not found", status=404))
            self.send_response(answer.status)
            if answer.mime is not None:
                self.send_header("Content-Type", answer.mime)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if callable(answer.body):
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    answer.body(self.wfile)
                except OSError:  # the fetcher has had enough
                    pass
                self.close_connection = True
                return
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hangs up is what is tested."""

    server = Server(("127.0.0.1", 0), Handler)
    web = Web(server.server_address[1])
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
        tls.sni_callback = lambda socket, name, context: web.names.append(name)
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=lambda: server.serve_forever(0.02))
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def pdf(
    *pages: str, title: str = "", outline: Sequence[tuple[str, int]] = (), password: tuple[str, str] | None = None
) -> bytes:
    """Make a PDF with a line of text a page; `outline` by (title, page from 1), `password` of user and owner."""
    writer = PdfWriter()
    for text in pages:
        page = writer.add_blank_page(300, 200)
        font = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        shown = " ".join(f"({line}) Tj 0 -14 Td" for line in text.splitlines())
        stream.set_data(f"BT /F1 12 Tf 20 150 Td {shown} ET".encode("latin-1"))
        page[NameObject("/Contents")] = writer._add_object(stream)
    if title:
        writer.add_metadata({"/Title": title})
    for name, number in outline:
        writer.add_outline_item(title=name, page_number=number - 1)
    if password:
        writer.encrypt(*password, algorithm="AES-256")
    return written(writer)


def bomb(size: int) -> bytes:
    """Make a PDF of some kilobytes whose page is `size` bytes once it is unpacked."""
    machine, packed, left = zlib.compressobj(9), bytearray(), size
    while left > 0:
        packed += machine.compress(b"0 0 m\n" * (1 << 17))
        left -= 6 << 17
    packed += machine.flush()
    writer = PdfWriter()
    page = writer.add_blank_page(300, 200)
    stream = StreamObject()
    stream._data = bytes(packed)
    stream[NameObject("/Filter")] = NameObject("/FlateDecode")
    page[NameObject("/Contents")] = writer._add_object(stream)
    return written(writer)


def written(writer: PdfWriter) -> bytes:
    target = io.BytesIO()
    writer.write(target)
    writer.close()
    return target.getvalue()
