"""Web pages: from a list, or from a sitemap."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from functools import partial
from urllib.parse import urlsplit

from orrery import uri as uris
from orrery.errors import TryAgain, UserError
from orrery.rag import fetching
from orrery.rag.fetching import Fetcher, FetchError, Page
from orrery.rag.reading import kinds
from orrery.rag.sources import Entry, Listing, NotRead, Raw, Wanted

MOST_SITEMAPS = 200
TRIES, PAUSE_S = 3, 0.5
GZIP = b"\x1f\x8b"


def pages(urls: Iterable[str], wanted: Wanted, fetcher: Fetcher) -> Listing:
    """List pages that somebody has named one by one. Raises `UserError` for one that carries a password."""
    found = Listing()
    for url in urls:
        if uris.has_secret(url):
            raise UserError(
                f"pages: {uris.masked(url)} carries a token or password, which would be shown to readers",
                hint="only pages that need none can be read",
            )
        _offer(found, url, wanted, fetcher)
    found.sort()
    return found


def sitemap(url: str, wanted: Wanted, fetcher: Fetcher, most: int) -> Listing:
    """List the pages of a sitemap, or of the sitemaps that it names, which are not followed any deeper.

    Raises `UserError` for one that is wrong or names more than `most` pages, `TryAgain` when it is out of reach: half
    a list would look like pages that are gone.
    """
    found = Listing()
    locations, maps = _locations(url, fetcher)
    if len(maps) > MOST_SITEMAPS:
        raise UserError(f"{url} names {len(maps):,} sitemaps; at most {MOST_SITEMAPS} are read")
    for one in maps:
        more, deeper = _locations(_same_site(url, one), fetcher)
        if deeper:
            raise UserError(
                f"the sitemap {fetching.shown(one)} names sitemaps again", hint="name that one in spec.yaml"
            )
        locations += more
        if len(locations) > most:
            break
    if len(locations) > most:
        raise UserError(f"{url} names more than {most:,} pages", hint="`limits.documents` in spec.yaml bounds them")
    for location in dict.fromkeys(locations):
        if _site(location) != _site(url):
            found.leave(fetching.shown(location), "it is on another host than its sitemap")
        elif uris.has_secret(location):
            found.leave(uris.masked(location), "its address carries a token or password")
        else:
            _offer(found, location, wanted, fetcher)
    found.sort()
    return found


def _offer(found: Listing, url: str, wanted: Wanted, fetcher: Fetcher) -> None:
    """Add a page to the listing, under its address as a browser would show it."""
    try:
        address = str(fetching.parsed(url))
    except fetching.Refused as e:
        found.leave(fetching.shown(url), e.why)
        return
    path = urlsplit(address).path
    # A folder's page counts as a file in it, so that patterns mean the same as for files.
    if wanted((f"{path}index.html" if path.endswith("/") else path).lstrip("/")):
        name = path.strip("/") or urlsplit(address).netloc
        found.entries.append(Entry(address, name, partial(_read, address, fetcher)))
    else:
        found.other += 1


def _read(url: str, fetcher: Fetcher) -> Raw:
    try:
        page = _patiently(url, fetcher)
    except fetching.TooLarge as e:
        raise NotRead("skipped", f"{e.why} (limits.megabytes)") from None
    except FetchError as e:
        raise NotRead("gone" if e.gone else "failed", e.why, away=e.away) from None
    return Raw(page.body, kinds.of_page(page.mime, page.body), page.charset)


def _patiently(url: str, fetcher: Fetcher) -> Page:
    """Fetch a page; again where its server was busy or away, while the page's time lasts."""
    began = time.monotonic()
    for left in range(TRIES - 1, -1, -1):
        try:
            return fetcher.get(url)
        except FetchError as e:
            if not e.away or left == 0 or time.monotonic() - began > fetcher.seconds / 2:
                raise
            time.sleep(PAUSE_S * (TRIES - left) * random.uniform(0.5, 1.5))  # noqa: S311  spreads the tries, no secret
    raise AssertionError("unreachable")


# -- sitemaps ----------------------------------------------------------------------------------------------


def _locations(url: str, fetcher: Fetcher) -> tuple[list[str], list[str]]:
    """Return the pages and the sitemaps that a sitemap names."""
    try:
        body = _patiently(url, fetcher).body
        if body.startswith(GZIP):
            body = b"".join(fetching.unzipped([body], fetcher.size + 1))
        if len(body) > fetcher.size:
            raise fetching.TooLarge(f"it has more than {fetcher.size:,} bytes")
    except FetchError as e:
        told = f"the sitemap {fetching.shown(url)} was not fetched: {e.why}"
        if e.away:
            raise TryAgain(told, hint="it is tried again later; nothing was changed") from None
        raise UserError(told, hint="open it in a browser; `sitemap` in spec.yaml names it") from None
    return _parsed(url, body)


def _parsed(url: str, body: bytes) -> tuple[list[str], list[str]]:
    from lxml import etree

    # No entity is resolved, nothing is loaded, and a document that declares any is refused below.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_pis=True)
    try:
        root = etree.fromstring(body, parser)
    except etree.XMLSyntaxError as e:
        raise UserError(f"the sitemap {fetching.shown(url)} is no XML: {str(e)[:200]}") from None
    if root.getroottree().docinfo.doctype:
        raise UserError(f"the sitemap {fetching.shown(url)} declares a document type, which none needs")
    kind = etree.QName(root).localname
    if kind not in ("urlset", "sitemapindex"):
        raise UserError(f"{fetching.shown(url)} is no sitemap: it begins with <{kind}>")
    found = [str(text).strip() for text in root.xpath("/*/*/*[local-name()='loc']/text()")]
    found = [text for text in found if text]
    return (found, []) if kind == "urlset" else ([], found)


def _same_site(url: str, other: str) -> str:
    if _site(other) != _site(url):
        raise UserError(f"the sitemap {fetching.shown(url)} names one on another host: {fetching.shown(other)}")
    return other


def _site(url: str) -> tuple[str, int | None]:
    """Return host and port of a URL, the host without its `www.`."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "").lower().removeprefix("www."), parts.port
    except ValueError:
        return "", None
