"""Fetches web pages that somebody else names, without becoming their tool.

Only http and https, on the usual ports, from public addresses: a host is resolved once, all of its addresses are looked
at, and the connection goes to one of those that were looked at, with the host's name in TLS and in the request. The
same again for each redirect. Size, time, redirects and decompression are bounded. No proxy is used: behind one, nobody
could tell where a name leads.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import threading
import time
import typing
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpcore
import httpx

from orrery import uri as uris

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# What `socket.getaddrinfo` gives, as texts; a test gives its own.
Resolver = Callable[[str, int], Iterable[str]]

PORTS = frozenset({80, 443})
REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)
# A page that was made private, or withdrawn, must not stay answerable: it is gone for us as one that is not there.
WITHHELD = (401, 403, 451)
GONE = (404, 410, *WITHHELD)
# Worth asking again, now and on another day.
BUSY = (408, 425, 429, 500, 502, 503, 504)
PIECE = 1 << 16
AGENT = b"orrery-collect/1 (knowledge base)"
# Public by their number, but answered by a cloud's own machinery (Azure's host agent).
METADATA = frozenset({ipaddress.ip_address("168.63.129.16")})
_V4_IN_V6 = ipaddress.ip_network("64:ff9b::/96")  # NAT64
# What `ipaddress` calls public changes with Python's patch levels: 3.11.2 lets 192.0.0.9 and 192.88.99.1 pass. These
# are refused whatever it says.
NEVER = {
    ipaddress.ip_network("100.64.0.0/10"): "it is not public",  # a provider's own, and clouds'
    ipaddress.ip_network("192.0.0.0/24"): "it is of a protocol's own",
    ipaddress.ip_network("192.88.99.0/24"): "it is a way into another network",  # relays of 6to4
    ipaddress.ip_network("198.18.0.0/15"): "it is private",  # benchmarks
    _V4_IN_V6: "it is a way into another network",
    ipaddress.ip_network("64:ff9b:1::/48"): "it is a way into another network",  # NAT64 of a network's own
    ipaddress.ip_network("2001::/32"): "it is a way into another network",  # Teredo
    ipaddress.ip_network("2002::/16"): "it is a way into another network",  # 6to4
}


class FetchError(Exception):
    """A page could not be fetched, and `why`. `gone`: it is not there any more. `away`: later it may be."""

    def __init__(self, why: str, *, gone: bool = False, away: bool = False) -> None:
        super().__init__(why)
        self.why, self.gone, self.away = why, gone, away


class TooLarge(FetchError):
    """There are more bytes than allowed."""


class Refused(FetchError):
    """Its address must not be asked, whatever would answer there."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a server gave: the body decompressed, `mime` without its parameters, `url` after redirects."""

    url: str
    mime: str | None
    charset: str | None
    body: bytes


class Fetcher:
    """Fetches pages; for several threads. `size` in bytes, `seconds` for one page with its redirects.

    `allow` names addresses that may be asked although they are not public, as `address:port`: for tests with a server
    of their own. No setting leads here.
    """

    def __init__(
        self,
        *,
        size: int,
        seconds: float,
        allow: Collection[str] = (),
        resolver: Resolver | None = None,
        ports: Collection[int] = PORTS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.size, self.seconds = size, seconds
        self._backend = _Backend(frozenset(allow), resolver or _resolve, frozenset(ports))
        self._tls, self._lock = tls, threading.Lock()
        self._pool: httpcore.ConnectionPool | None = None

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()

    def _connections(self) -> httpcore.ConnectionPool:
        """Return the pool of connections, made when the first page is asked for: the authorities take a while."""
        with self._lock:
            if self._pool is None:
                self._pool = httpcore.ConnectionPool(
                    ssl_context=self._tls or httpx.create_ssl_context(trust_env=False),
                    max_connections=16,
                    max_keepalive_connections=8,
                    keepalive_expiry=5.0,
                    network_backend=self._backend,
                )
            return self._pool

    def get(self, url: str) -> Page:
        """Return a page. Raises `FetchError`, `TooLarge` and `Refused`."""
        self._backend.until(time.monotonic() + self.seconds)
        now = parsed(url)
        for _ in range(REDIRECTS + 1):
            self._backend.check(now)
            page = self._ask(now)
            if isinstance(page, Page):
                return page
            now = page
        raise FetchError(f"it leads through more than {REDIRECTS} redirects")

    def _ask(self, url: httpx.URL) -> Page | httpx.URL:
        """Return the page, or where its server sends us."""
        headers = [(b"Host", url.netloc), (b"User-Agent", AGENT), (b"Accept", b"*/*"), (b"Accept-Encoding", b"gzip")]
        request = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        timeout = {"connect": self.seconds, "read": self.seconds, "write": self.seconds, "pool": self.seconds}
        try:
            with self._connections().stream(
                "GET", request, headers=headers, extensions={"timeout": timeout}
            ) as response:
                return self._answer(url, response)
        except (httpcore.TimeoutException, _Late):
            raise FetchError(f"it did not come within {self.seconds:g} s", away=True) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as e:
            distrusted = "CERTIFICATE_VERIFY_FAILED" in str(e)
            told = f"its server cannot be spoken to: {str(e)[:200] or type(e).__name__}"
            raise FetchError(told, away=not distrusted) from None

    def _answer(self, url: httpx.URL, response: httpcore.Response) -> Page | httpx.URL:
        told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in MOVED:
            return _moved(url, told.get("location", ""))
        if response.status != 200:
            gone, away = response.status in GONE, response.status in BUSY
            why = " (it is not for everyone)" if response.status in WITHHELD else ""
            raise FetchError(f"its server answers {response.status}{why}", gone=gone, away=away)
        length = told.get("content-length", "")
        if length.isdigit() and int(length) > self.size:
            raise TooLarge(f"it has {int(length):,} bytes; at most {self.size:,} are read")
        body = self._body(response.iter_stream(), told.get("content-encoding", "").strip().lower())
        return Page(str(url), *_content_type(told.get("content-type", "")), body)

    def _body(self, pieces: Iterable[bytes], encoding: str) -> bytes:
        """Return the whole body. At no time is there more than the bound and one piece of it, decompressed or not."""
        found = bytearray()
        for piece in _unpacked(pieces, encoding, self.size + 1):
            self._backend.look_at_the_clock()
            found += piece
            if len(found) > self.size:
                raise TooLarge(f"it has more than {self.size:,} bytes")
        return bytes(found)


def parsed(url: str) -> httpx.URL:
    """Return a URL that may be asked for, without its fragment. Raises `Refused`."""
    try:
        found = httpx.URL(url).copy_with(fragment=None)
    except (httpx.InvalidURL, ValueError, TypeError) as e:
        raise Refused(f"this is no address of a page: {e}") from None
    if found.scheme not in ("http", "https"):
        raise Refused(f"only http and https are fetched, not {found.scheme or 'nothing'}")
    if found.userinfo:
        raise Refused("a name or password stands in it")
    if not found.host:
        raise Refused("there is no host in it")
    return found


def _moved(url: httpx.URL, location: str) -> httpx.URL:
    if not location:
        raise FetchError("its server redirects to nowhere")
    try:
        return parsed(str(url.join(location)))
    except Refused as e:
        raise Refused(f"it is redirected to {shown(location)}: {e.why}") from None
    except (httpx.InvalidURL, ValueError) as e:
        raise FetchError(f"its server redirects to what is no address: {e}") from None


def shown(url: str) -> str:
    """Return a URL as it may be written down."""
    return (uris.masked(url) if uris.has_secret(url) or "@" in url else url)[:300]


def _content_type(header: str) -> tuple[str | None, str | None]:
    mime, _, rest = header.partition(";")
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]{1,40})", rest, re.IGNORECASE)
    return mime.strip().lower() or None, charset[1] if charset else None


def _unpacked(pieces: Iterable[bytes], encoding: str, most: int) -> Iterator[bytes]:
    """Yield a body's pieces decompressed, each of at most PIECE bytes, and no more than `most` bytes in all."""
    if encoding in ("", "identity"):
        yield from pieces
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError(f"it is packed as {encoding[:40]!r}, which was not asked for")
    yield from unzipped(pieces, most, wbits=zlib.MAX_WBITS | 32)


def unzipped(pieces: Iterable[bytes], most: int, *, wbits: int = zlib.MAX_WBITS | 16) -> Iterator[bytes]:
    """Yield gzip (or zlib) decompressed, each piece of at most PIECE bytes; it stops once `most` bytes are passed."""
    machine, passed = zlib.decompressobj(wbits), 0
    try:
        for piece in pieces:
            rest = piece
            while rest and not machine.eof:
                out = machine.decompress(rest, PIECE)
                rest = machine.unconsumed_tail
                passed += len(out)
                yield out
                if passed >= most:
                    return
        if not machine.eof:
            yield machine.flush(PIECE)
            if not machine.eof:
                raise FetchError("its packed content ends too early", away=True)
    except zlib.error as e:
        raise FetchError(f"its packed content is damaged: {e}") from None


# -- where a connection may go -------------------------------------------------------------------------


def why_not(address: Address) -> str | None:
    """Return why an address must not be asked, or None for a public one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _V4_IN_V6:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return why_not(inner) or (None if address.ipv4_mapped else "it is a way into another network")
    if address in METADATA:
        return "it is a cloud's own"
    for name in ("unspecified", "loopback", "link_local", "multicast", "private", "reserved", "site_local"):
        if getattr(address, f"is_{name}", False):
            return f"it is {name.replace('_', '-')}"
    for network, why in NEVER.items():
        if address in network:
            return why
    return None if address.is_global else "it is not public"


def _resolve(host: str, port: int) -> Iterable[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return dict.fromkeys(str(entry[4][0]) for entry in found)


class _Late(Exception):
    """The time for this page is up."""


class _Backend(httpcore.NetworkBackend):
    """Connects to vetted addresses only, and lets nothing last longer than the page's time."""

    def __init__(self, allow: frozenset[str], resolver: Resolver, ports: frozenset[int]) -> None:
        self._allow, self._resolver, self._ports = allow, resolver, ports
        self._plain = httpcore.SyncBackend()
        self._local = threading.local()  # a page is fetched by one thread

    def until(self, deadline: float) -> None:
        """Set when this thread's page must be there (`time.monotonic`)."""
        self._local.deadline = deadline

    def left(self, timeout: float | None = None) -> float:
        """Return the seconds that are left. Raises `_Late` when there are none."""
        left = float(self._local.deadline - time.monotonic())
        if left <= 0:
            raise _Late
        return left if timeout is None else min(left, timeout)

    def look_at_the_clock(self) -> None:
        """Raise `_Late` when the time is up: a server may go on forever, a byte at a time."""
        self.left()

    def check(self, url: httpx.URL) -> None:
        """Raise `Refused` for a port, or a number as a host, that must not be asked: before any look-up."""
        port = url.port or (443 if url.scheme == "https" else 80)
        literal = _literal(url.host)
        if port not in self._ports and not any(allowed.endswith(f":{port}") for allowed in self._allow):
            raise Refused(f"{self._port_refused(port)} ({shown(str(url))})")
        if literal is not None:
            self._vet(url.host, [literal], port)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[typing.Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Resolve, look at all addresses, and connect to the first of them that answers."""
        literal = _literal(host)
        try:
            found = [literal] if literal else [_address(text) for text in self._resolver(host, port)]
        except (OSError, UnicodeError) as e:
            raise httpcore.ConnectError(f"{host}: {e}") from None
        if not found:
            raise httpcore.ConnectError(f"{host} has no address")
        self._vet(host, found, port)
        for others, address in zip(range(len(found) - 1, -1, -1), found, strict=True):
            patience = self.left(timeout) / (1 + others)  # one that is silent must leave some for the next
            try:
                stream = self._plain.connect_tcp(str(address), port, patience, local_address, socket_options)
                return _Stream(stream, self)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if others == 0:
                    raise
        raise AssertionError("unreachable")

    def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        """Refuse: a socket of this machine."""
        raise Refused("sockets of this machine are not asked")

    def sleep(self, seconds: float) -> None:
        """Wait between tries of the connection pool."""
        time.sleep(min(seconds, self.left()))

    def _vet(self, host: str, found: list[Address], port: int) -> None:
        """Raise `Refused` when one of the addresses is not public: who answers with such a one is not trusted."""
        for address in found:
            allowed = f"{address}:{port}" in self._allow
            if allowed:
                continue
            if why := why_not(address):
                who = f"{host} is not asked" if str(address) == host else f"{host} is {address}, which is not asked"
                raise Refused(f"{who}: {why}")
            if port not in self._ports:
                raise Refused(self._port_refused(port))

    def _port_refused(self, port: int) -> str:
        return f"port {port} is not asked, only {', '.join(map(str, sorted(self._ports)))}"


def _address(text: str) -> Address:
    return ipaddress.ip_address(text.partition("%")[0])


def _literal(host: str) -> Address | None:
    """Return the address that a host is by itself, in any of the ways that libraries of C read one; None for a name.

    `2130706433`, `0x7f.1` and `127.1` are 127.0.0.1 to `getaddrinfo`.
    """
    try:
        return _address(host.strip("[]"))
    except ValueError:
        pass
    if re.fullmatch(r"(?:0[xX][0-9a-fA-F]*|\d+)", host.rstrip(".").rpartition(".")[2]):
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
        except OSError:
            raise Refused(f"{host} is neither a name nor an address") from None
    return None


class _Stream(httpcore.NetworkStream):
    """A connection whose every wait ends with the page's time."""

    def __init__(self, inner: httpcore.NetworkStream, backend: _Backend) -> None:
        self._inner, self._backend = inner, backend

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._backend.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._backend.left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._inner.start_tls(ssl_context, server_hostname, self._backend.left(timeout))
        return _Stream(stream, self._backend)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
