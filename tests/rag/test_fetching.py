"""Pages are fetched from public addresses only, within bounds of size, time and redirects."""

from __future__ import annotations

import gzip
import ipaddress
import ssl
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from small_web import Answer, Web, serving

from orrery.rag.fetching import Fetcher, FetchError, Refused, TooLarge, parsed, unzipped, why_not

SIZE = 100_000


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as running:
        yield running


def fetcher(web: Web | None = None, **more: Any) -> Fetcher:
    """A fetcher that may ask the test's own server, and nobody else that is not public."""
    no_authorities = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which take longer to load than all of a test
    told: dict[str, Any] = {"size": SIZE, "seconds": 20.0, "allow": web.allow if web else (), "tls": no_authorities}
    return Fetcher(**{**told, **more})


def refusal(url: str, **more: Any) -> str:
    with fetcher(**more) as f, pytest.raises(Refused) as caught:
        f.get(url)
    return caught.value.why


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1/", "loopback"),
        ("http://127.8.9.10/", "loopback"),
        ("https://[::1]/", "loopback"),
        ("http://169.254.169.254/latest/meta-data/", "link-local"),
        ("http://[fd00:ec2::254]/latest/", "private"),
        ("http://100.100.100.200/", "not public"),
        ("http://168.63.129.16/machine", "a cloud's own"),
        ("http://10.0.0.1/", "private"),
        ("http://172.16.0.1/", "private"),
        ("http://192.168.1.1/", "private"),
        ("http://0.0.0.0/", "unspecified"),
        ("http://[::]/", "unspecified"),
        ("http://224.0.0.251/", "multicast"),
        ("http://[ff02::1]/", "multicast"),
        ("http://240.0.0.1/", "private"),
        ("http://255.255.255.255/", "private"),
        ("http://[fe80::1]/", "link-local"),
        ("http://2130706433/", "loopback"),
        ("http://0x7f.1/", "loopback"),
        ("http://0x7f000001/", "loopback"),
        ("http://127.1/", "loopback"),
        ("http://127.0.0.1./", "loopback"),
        ("http://127。0。0。1/", "loopback"),
        ("http://[::ffff:127.0.0.1]/", "loopback"),
        ("http://[::ffff:a9fe:a9fe]/", "link-local"),
        ("http://[64:ff9b::127.0.0.1]/", "loopback"),
        ("http://[2002:7f00:1::]/", "loopback"),
        ("http://[2002:808:808::]/", "another network"),
        ("http://256.1.1.1/", ""),
        ("http://1.2.3.4.5/", ""),
        ("http://example.org:22/", "port 22"),
        ("https://example.org:8443/", "port 8443"),
        ("ftp://example.org/", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("gopher://127.0.0.1/", "only http and https"),
        ("/etc/passwd", "only http and https"),
        ("http://somebody:secret@example.org/", "name or password"),
        ("http:///path", "no host"),
        ("http://[::1/", "no address of a page"),
    ],
)
def test_what_is_not_public_is_refused_before_anything_is_sent(url: str, why: str) -> None:
    def nobody(host: str, port: int) -> list[str]:
        raise AssertionError(f"{host} was looked up")

    assert why in refusal(url, resolver=nobody)


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "10.1.2.3"], ["::1"], ["fe80::1%eth0"], ["::ffff:10.0.0.1"]]
)
def test_a_name_that_leads_to_such_an_address_is_refused(addresses: list[str]) -> None:
    assert "which is not asked" in refusal("http://docs.example.org/", resolver=lambda host, port: addresses)


def test_the_machines_own_name_is_refused() -> None:
    assert "loopback" in refusal("http://localhost/")


def test_a_public_address_is_not_refused() -> None:
    assert why_not(ipaddress.ip_address("8.8.8.8")) is None
    assert why_not(ipaddress.ip_address("2001:4860:4860::8888")) is None
    assert why_not(ipaddress.ip_address("::ffff:8.8.8.8")) is None


@pytest.mark.parametrize(
    "address",
    [
        "100.64.0.0",
        "100.127.255.255",
        "192.0.0.9",
        "192.0.0.10",
        "192.0.0.255",
        "192.88.99.1",
        "198.18.0.0",
        "198.19.255.255",
        "64:ff9b::8.8.8.8",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::8.8.8.8",
        "2001::1",
        "2001:0:808:808::",
        "2002:808:808::1",
        "2002:a00:1::1",
    ],
)
def test_some_networks_are_refused_whatever_this_python_calls_public(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    for kind in (ipaddress.IPv4Address, ipaddress.IPv6Address):
        for name in ("is_private", "is_reserved", "is_global"):
            monkeypatch.setattr(kind, name, name == "is_global")
    assert why_not(ipaddress.ip_address("9.9.9.9")) is None
    assert why_not(ipaddress.ip_address(address))


def test_only_the_address_and_port_that_were_allowed_are(web: Web) -> None:
    web.page("/", "hello")
    assert "port" in refusal(web.url("/"))
    with fetcher(web) as f:
        assert f.get(web.url("/")).body == b"hello"
        with pytest.raises(Refused, match="loopback"):
            f.get(f"http://127.0.0.2:{web.port}/")
        with pytest.raises(Refused, match="port"):
            f.get(f"http://127.0.0.1:{web.port + 1}/")


def test_it_connects_to_the_address_that_was_looked_at_and_keeps_the_name(web: Web) -> None:
    asked: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    web.page("/", "hello")
    with fetcher(web, resolver=rebinding) as f:
        assert f.get(web.url("/", host="docs.example.org")).body == b"hello"
    assert asked == ["docs.example.org"]
    assert web.hosts == [f"docs.example.org:{web.port}"]


@pytest.mark.parametrize(
    "to",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1/",
        "http://[::ffff:127.0.0.1]/",
        "http://inside.example.org/",
        "//2130706433/",
        "file:///etc/passwd",
        "http://a:b@example.org/",
    ],
)
def test_a_redirect_to_where_nobody_may_go_is_refused(web: Web, to: str) -> None:
    def resolver(host: str, port: int) -> list[str]:
        return ["10.0.0.7"]

    url = web.moved("/", to)
    with fetcher(web, resolver=resolver) as f, pytest.raises(Refused):
        f.get(url)


def test_redirects_are_followed_and_counted(web: Web) -> None:
    web.page("/docs/end", "here")
    web.moved("/docs/start", "end", 301)
    web.moved("/again", "/again")
    web.answers["/nowhere"] = Answer(status=302)
    with fetcher(web) as f:
        page = f.get(web.url("/docs/start#part"))
        assert (page.url, page.body) == (web.url("/docs/end"), b"here")
        with pytest.raises(FetchError, match="more than 5 redirects"):
            f.get(web.url("/again"))
        with pytest.raises(FetchError, match="nowhere"):
            f.get(web.url("/nowhere"))
    assert web.asked["/again"] == 6


def test_types_and_charsets_are_told(web: Web) -> None:
    web.page("/a", "x", 'Text/HTML; Charset="ISO-8859-1"')
    web.page("/b", "x", None)
    with fetcher(web) as f:
        assert (f.get(web.url("/a")).mime, f.get(web.url("/a")).charset) == ("text/html", "ISO-8859-1")
        assert (f.get(web.url("/b")).mime, f.get(web.url("/b")).charset) == (None, None)


@pytest.mark.parametrize(
    ("status", "gone", "away"),
    [(status, True, False) for status in (401, 403, 404, 410, 451)] + [(400, False, False), (503, False, True)],
)
def test_an_answer_that_is_no_page_is_told(web: Web, status: int, gone: bool, away: bool) -> None:
    url = web.page("/x", "sorry", status=status)
    with fetcher(web) as f, pytest.raises(FetchError, match=str(status)) as caught:
        f.get(url)
    assert (caught.value.gone, caught.value.away) == (gone, away)


def test_too_much_is_refused_by_what_is_announced_and_by_what_comes(web: Web) -> None:
    sent = 0

    def forever(out: Any) -> None:
        nonlocal sent
        for _ in range(10_000):
            out.write(b"x" * 10_000)
            sent += 10_000

    announced = web.page("/a", b"x" * (SIZE + 1))
    web.answers["/b"] = Answer(forever)
    with fetcher(web) as f:
        assert len(f.get(web.page("/c", b"x" * SIZE)).body) == SIZE
        for url in (announced, web.url("/b")):
            with pytest.raises(TooLarge, match="100,00"):
                f.get(url)
    assert sent < 50_000_000


def test_a_packed_page_is_unpacked_and_a_bomb_is_not(web: Web) -> None:
    packed = {"Content-Encoding": "gzip"}
    good = web.page("/good", gzip.compress(b"hello" * 1000), headers=packed)
    zlibbed = web.page("/deflate", zlib.compress(b"hello"), headers={"Content-Encoding": "deflate"})
    bomb = web.page("/bomb", gzip.compress(b"\0" * 50_000_000), headers=packed)
    cut = web.page("/cut", gzip.compress(b"hello" * 1000)[:-12], headers=packed)
    broken = web.page("/broken", b"\x1f\x8b\x08nothing like it", headers=packed)
    unasked = web.page("/br", b"x", headers={"Content-Encoding": "br"})
    with fetcher(web) as f:
        assert f.get(good).body == b"hello" * 1000
        assert f.get(zlibbed).body == b"hello"
        for url, why in ((bomb, "more than"), (cut, "too early"), (broken, "damaged"), (unasked, "not asked for")):
            with pytest.raises(FetchError, match=why):
                f.get(url)


def test_a_bomb_is_unpacked_in_small_pieces_only() -> None:
    pieces = list(unzipped([gzip.compress(b"\0" * 50_000_000)], 1_000_000))
    assert max(map(len, pieces)) <= 1 << 16
    assert 1_000_000 <= sum(map(len, pieces)) < 1_100_000


@pytest.mark.parametrize("status", [200, 100])  # 100: an interim answer, and after it a head that never ends
def test_a_server_that_drips_is_left_when_the_time_is_up(web: Web, status: int) -> None:
    def drips(out: Any) -> None:
        for _ in range(600):
            out.write(b"x")
            time.sleep(0.05)

    web.answers["/"] = Answer(drips, status=status)
    with fetcher(web, seconds=0.5) as f, pytest.raises(FetchError, match=r"within 0\.5 s") as caught:
        f.get(web.url("/"))
    assert caught.value.away


def test_names_that_do_not_exist_and_servers_that_are_not_there_are_away() -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    with serving() as ended:
        pass
    with fetcher(resolver=unknown) as f, pytest.raises(FetchError, match="not known") as caught:
        f.get("http://docs.example.org/")
    assert caught.value.away
    with fetcher(ended) as f, pytest.raises(FetchError, match="cannot be spoken to") as caught:
        f.get(ended.url("/"))
    assert caught.value.away


def test_a_certificate_is_checked_for_the_name_and_not_for_the_address(tmp_path: Path) -> None:
    file = certificate(tmp_path, "docs.example.org")
    trusting = ssl.create_default_context(cafile=str(file))
    with serving(file) as web:
        web.page("/", "hello")
        with fetcher(web, tls=trusting, resolver=lambda host, port: ["127.0.0.1"]) as f:
            assert f.get(f"https://docs.example.org:{web.port}/").body == b"hello"
            with pytest.raises(FetchError, match="certificate") as caught:
                f.get(f"https://other.example.org:{web.port}/")
        assert not caught.value.away
    assert web.names == ["docs.example.org", "other.example.org"]


def certificate(folder: Path, name: str) -> Path:
    """Write key and certificate of a name into one file; it vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / f"{name}.pem"
    file.write_bytes(secret + made.public_bytes(pem))
    return file


def test_no_setting_of_the_environment_opens_a_way(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, web.url())
    assert "loopback" in refusal("http://127.0.0.1/")
    with fetcher(resolver=lambda host, port: ["10.0.0.1"]) as f, pytest.raises(Refused):
        f.get("http://docs.example.org/")
    assert not web.asked


def test_an_address_loses_its_fragment() -> None:
    assert str(parsed("HTTP://Docs.Example.org:80/a b?c=d#e")) == "http://docs.example.org/a%20b?c=d"
