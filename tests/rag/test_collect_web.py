"""Web pages and sitemaps as sources: real servers, and what they must not make the collector do."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rag_house
from rag_house import DAY, PROJECT, House
from small_web import Answer, Web, pdf, serving

from orrery import bundle
from orrery.contract import Result
from orrery.errors import OrreryError, TryAgain, UserError
from orrery.rag import collect
from orrery.rag.contract import CollectParams
from orrery.rag.fetching import Fetcher
from orrery.step import Work

NEXT = "2026-01-06"
URLSET = '<?xml version="1.0"?><urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{}</urlset>'
INDEX = '<sitemapindex xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{}</sitemapindex>'


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as running:
        yield running


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(collect, "READERS_AT_ONCE", 1)
    monkeypatch.setattr("orrery.rag.sources.web.PAUSE_S", 0.01)
    return rag_house.make(tmp_path, monkeypatch, {})


def run(house: House, web: Web, key: str = DAY, **options: Any) -> tuple[Result, dict[str, tuple[str, str | None]]]:
    """Collect with a fetcher that may ask the test's server; commit; return result and outcomes by path."""
    plan = house.plan("collect", key, **options)
    if plan.packed:
        bundle.push(house.store, plan.packed)
    scratch = Path(tempfile.mkdtemp(dir=house.home))
    work = Work(plan.config, house.store, scratch)
    with Fetcher(size=50_000, seconds=20, allow=web.allow, resolver=lambda host, port: ["10.0.0.1"]) as fetcher:
        result = collect.run(work, CollectParams.model_validate(plan.config.params), fetcher)
    work.publish(work.committed() or work.commit(result), result)
    told = map(json.loads, house.store.read(result.links["outcomes"]).decode().splitlines())
    return result, {one["uri"].removeprefix(web.url("")): (one["outcome"], one["why"]) for one in told}


def documents(house: House, key: str = DAY) -> dict[str, dict[str, Any]]:
    lines = house.read("documents", "documents.jsonl", key).decode().splitlines()
    return {told["uri"]: told for told in map(json.loads, lines)}


def urlset(*urls: str) -> str:
    return URLSET.format("".join(f"<url><loc>{url}</loc></url>" for url in urls))


def test_pages_of_a_list_are_read_by_their_type(house: House, web: Web) -> None:
    pages = [
        web.page("/guide.html", "<title>Guide</title><script>x</script><h1>G</h1><p>How to."),
        web.page("/raw", "# Markdown\n\ntext", "text/markdown"),
        web.page("/paper", pdf("A page"), "application/pdf"),
        web.page("/latin", "<p>grün".encode("latin-1"), "text/html; charset=iso-8859-1"),
        web.page("/packed", gzip.compress(b"<p>packed"), headers={"Content-Encoding": "gzip"}),
        web.page("/image", b"\x89PNG", "image/png"),
        web.page("/large", b"x" * 50_001, "text/plain"),
        web.page("/bomb", gzip.compress(b"<p>" + b" " * 9_000_000), headers={"Content-Encoding": "gzip"}),
        web.moved("/moved", "/target"),
        web.url("/nothing"),
    ]
    web.page("/target", "<p>the target")
    house.spec(sources={"site": {"pages": pages, "groups": ["staff"]}})
    result, told = run(house, web)
    assert {path: fate for path, (fate, _) in told.items()} == {
        **dict.fromkeys(("/guide.html", "/raw", "/paper", "/latin", "/packed", "/moved"), "new"),
        **dict.fromkeys(("/image", "/large", "/bomb"), "skipped"),
        "/nothing": "failed",
    }
    assert told["/nothing"][1] == "its server answers 404"
    assert result.metrics["documents"] == 6
    found = documents(house)
    guide = found[web.url("/guide.html")]
    assert (guide["title"], guide["mime"], guide["groups"]) == ("Guide", "text/html", ["staff"])
    assert guide["sections"] == [{"heading": ["G"], "text": "How to.", "page": None}]
    assert found[web.url("/latin")]["sections"][0]["text"] == "grün"
    assert found[web.url("/raw")]["title"] == "Markdown"
    assert found[web.url("/paper")]["title"] == "paper"


def test_a_page_that_counts_its_visitors_is_the_same(house: House, web: Web) -> None:
    house.spec(sources={"site": {"pages": [web.page("/a", "<!-- 1 --><p>text")]}})
    run(house, web)
    web.page("/a", "<!-- 2 --><p>text")
    second, told = run(house, web, NEXT)
    assert told["/a"] == ("same", "its bytes have changed, its text has not")
    assert second.skipped
    assert documents(house, NEXT) == documents(house)


def test_pages_that_are_gone_are_removed_and_those_that_fail_are_kept(house: House, web: Web) -> None:
    urls = [web.page(f"/{name}", f"<p>page {name}") for name in "abcdef"]
    house.spec(sources={"site": {"pages": urls, "missing": 0.5}})
    run(house, web)
    web.answers["/a"] = Answer(status=410)
    web.answers["/b"] = Answer(status=500)
    web.moved("/c", "http://169.254.169.254/latest/meta-data/")
    web.page("/d", "<p>another page d")
    result, told = run(house, web, NEXT)
    assert told["/a"] == ("gone", "its server answers 410")
    assert told["/b"] == ("failed", "its server answers 500; it is kept as it was")
    assert told["/c"][0] == "failed"
    assert "169.254.169.254 is not asked: it is link-local" in str(told["/c"][1])
    assert told["/d"] == ("changed", None)
    assert web.asked["/b"] == 1 + collect.web.TRIES
    assert [uri[-1] for uri in sorted(documents(house, NEXT))] == list("bcdef")
    assert result.metrics["failed"] == 2


@pytest.mark.parametrize("status", [401, 403, 451])
def test_pages_that_were_made_private_do_not_stay(house: House, web: Web, status: int) -> None:
    urls = [web.page(f"/{name}", f"<p>page {name}") for name in "abc"]
    house.spec(sources={"site": {"pages": urls, "missing": 0.5}})
    run(house, web)
    web.answers["/a"] = Answer(status=status)
    _, told = run(house, web, NEXT)
    assert told["/a"] == ("gone", f"its server answers {status} (it is not for everyone)")
    assert [uri[-1] for uri in sorted(documents(house, NEXT))] == list("bc")
    # A site that lets nobody in any more is looked at by somebody.
    for name in "bc":
        web.answers[f"/{name}"] = Answer(status=status)
    with pytest.raises(UserError, match=f"2 of the 2 .*answers {status}"):
        run(house, web, "2026-01-07")


def test_a_site_that_is_away_is_asked_again_later_and_one_that_is_gone_is_not(house: House, web: Web) -> None:
    urls = [web.page(f"/{name}", f"<p>page {name}") for name in "abc"]
    house.spec(sources={"site": {"pages": urls}})
    run(house, web)
    for name in "abc":
        web.answers[f"/{name}"] = Answer(status=503)
    with pytest.raises(TryAgain, match=r"3 of the 3 .*answers 503"):
        run(house, web, NEXT)
    for name in "abc":
        web.answers[f"/{name}"] = Answer(status=404)
    with pytest.raises(UserError, match=r"3 of the 3 .*answers 404"):
        run(house, web, NEXT)
    assert house.store.latest(PROJECT, "documents", NEXT) is None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1/", "loopback"),
        ("http://[::ffff:127.0.0.1]/", "loopback"),
        ("http://169.254.169.254/latest/meta-data/", "link-local"),
        ("http://2130706433/", "loopback"),
        ("http://intranet.example.org/", "private"),
    ],
)
def test_addresses_that_are_not_public_are_refused(house: House, web: Web, url: str, why: str) -> None:
    house.spec(sources={"site": {"pages": [url, web.page("/a", "<p>a")]}})
    _, told = run(house, web)
    refused = [reason for fate, reason in told.values() if fate == "failed"]
    assert len(refused) == 1
    assert why in str(refused[0])


def test_by_itself_collect_asks_no_server_of_this_machine(house: House, web: Web) -> None:
    web.page("/a", "<p>a")
    house.spec(sources={"site": {"pages": [web.url("/a"), "http://127.0.0.1/", "http://localhost/"]}})
    with pytest.raises(UserError, match="source site has no documents"):
        house.run("collect")
    assert not web.asked


def test_a_page_with_a_token_in_its_address_is_refused_and_not_shown(house: House, web: Web) -> None:
    house.spec(sources={"site": {"pages": [web.page("/a?token=tell-nobody", "<p>a")]}})
    with pytest.raises(UserError, match="token or password") as caught:
        run(house, web)
    assert "tell-nobody" not in str(caught.value)


# -- sitemaps ------------------------------------------------------------------------------------------------


def test_the_pages_of_a_sitemap_are_read(house: House, web: Web) -> None:
    names = ("docs/", "docs/a", "docs/b/", "blog/c", "docs/old/d")
    listed = [web.page(f"/{name}", f"<p>page {name}") for name in (*names, "docs/a")]
    odd = ["http://elsewhere.example.org/x", web.url("/docs/t?token=tell-nobody"), "ftp://127.0.0.1/x", "nonsense"]
    site = web.page("/sitemap.xml", urlset(*listed, *odd), "application/xml")
    house.spec(sources={"site": {"sitemap": site, "include": ["docs/**"], "exclude": ["docs/old/"]}})
    result, told = run(house, web)
    assert {path for path, (fate, _) in told.items() if fate == "new"} == {"/docs/", "/docs/a", "/docs/b/"}
    assert told["http://elsewhere.example.org/x"] == ("skipped", "it is on another host than its sitemap")
    assert "tell-nobody" not in json.dumps(told)
    assert web.asked["/docs/a"] == 1
    assert result.metrics["documents"] == 3


def test_a_sitemap_may_name_packed_sitemaps_but_no_deeper_ones(house: House, web: Web) -> None:
    page = web.page("/a", "<p>a")
    one = web.page("/one.xml.gz", gzip.compress(urlset(page).encode()), "application/gzip")
    index = web.page("/index.xml", INDEX.format(f"<sitemap><loc>{one}</loc></sitemap>"), "text/xml")
    house.spec(sources={"site": {"sitemap": index}})
    assert run(house, web)[0].metrics["documents"] == 1
    deeper = web.page("/deeper.xml", INDEX.format(f"<sitemap><loc>{index}</loc></sitemap>"), "text/xml")
    house.spec(sources={"site": {"sitemap": deeper}})
    with pytest.raises(UserError, match="names sitemaps again"):
        run(house, web, NEXT)


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            f'<!DOCTYPE u [<!ENTITY l0 "ha">{LAUGHS}]><urlset><url><loc>&l9;</loc></url></urlset>',
            "document type|no XML",
        ),
        (
            '<!DOCTYPE u [<!ENTITY x SYSTEM "file:///etc/passwd">]><urlset><url><loc>&x;</loc></url></urlset>',
            "document type",
        ),
        ("<html><body>Not found</body></html>", "begins with <html>"),
        ("nonsense", "no XML"),
        ("", "no XML"),
        (gzip.compress(b" " * 5_000_000), "more than 50,000 bytes"),
        (b"\x1f\x8b\x08nothing", "damaged"),
        ("<a>" * 3000, "no XML"),
    ],
)
def test_a_hostile_sitemap_is_refused(house: House, web: Web, body: str | bytes, why: str) -> None:
    house.spec(sources={"site": {"sitemap": web.page("/sitemap.xml", body, "text/xml")}})
    with pytest.raises(UserError, match=why):
        run(house, web)


def test_a_sitemap_that_is_out_of_reach_stops_the_run(house: House, web: Web) -> None:
    house.spec(sources={"site": {"sitemap": web.page("/sitemap.xml", "", status=503)}})
    with pytest.raises(TryAgain, match=r"source site: the sitemap .* answers 503"):
        run(house, web)
    for to in ("http://127.0.0.1/", "http://metadata.example.org/"):
        house.spec(sources={"site": {"sitemap": web.moved("/away.xml", to)}})
        with pytest.raises(OrreryError, match="is not asked"):
            run(house, web)


def test_a_sitemap_with_more_pages_than_allowed_stops_the_run(house: House, web: Web) -> None:
    site = web.page("/sitemap.xml", urlset(*(web.url(f"/{n}") for n in range(11))), "text/xml")
    house.spec(sources={"site": {"sitemap": site}}, limits={"documents": 10})
    with pytest.raises(UserError, match="more than 10 pages"):
        run(house, web)
