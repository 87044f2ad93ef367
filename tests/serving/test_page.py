"""The page in a real browser before a real service: asking, sources, citations, every way not to be answered, hostile text.

Screenshots of each state go to ORRERY_SHOTS, when that names a folder.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Page
from openai_house import OpenAI, openai_server
from serving_house import PASSAGES, QUICK, House, Passage, serving

from orrery.errors import TryAgain
from orrery.serving.app import PAGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.program() is None, reason=f"none of {', '.join(browser.NAMES)} is on PATH"),
]
QUESTION = "When does the dome close in the wind?"
HOSTILE = "Which lantern is hostile?"
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
LONG = (
    "🔭 Lenses. "
    + "The storeroom is dry and dark. " * 40
    + "The zodiacal lamp is kept behind the 🔭 tripod. "
    + "It is dusty. " * 20
    + "And cold."
)
MORE = (
    Passage(f"The hostile lantern {EVIL} [1]", title=EVIL, uri="javascript:window.hacked=1", heading=(EVIL,)),
    Passage(
        "A hostile lantern hangs in the cellar.",
        title="Cellar",
        uri="https://docs.example.org/cellar?a=1&b=2",
        heading=("Cellar", "Lamps"),
    ),
    Passage(LONG, title="Storeroom", uri="http://docs.example.org/store"),
)
CONTRAST = """(() => {
  const lum = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 && m[3] === 0 ? null : m.slice(0, 3); };
  const back = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = e.matches('textarea,input') || [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest('svg') || !e.getClientRects().length) continue;
    const a = lum(parse(getComputedStyle(e).color)), b = lum(back(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(e.id + e.className + ' ' + e.textContent.trim().slice(0, 40) + ' ' + ratio.toFixed(2));
  }
  return bad;
})()"""
NAMELESS = """[...document.querySelectorAll('a,button,textarea,input,[role=img]')].filter(e =>
  !(e.getAttribute('aria-label') || e.textContent.trim() ||
    (e.id && document.querySelector(`label[for="${e.id}"]`)))).map(e => e.outerHTML.slice(0, 80))"""
SIDEWAYS = "Math.max(0, document.documentElement.scrollWidth - document.documentElement.clientWidth)"
# How far things move without anybody having typed or clicked within half a second (the Web Vitals' measure).
SHIFTS = """new PerformanceObserver(list => { for (const e of list.getEntries()) if (!e.hadRecentInput)
  window.moved = (window.moved || 0) + e.value; }).observe({type: 'layout-shift', buffered: true})"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser.chromium() as found:
        found.look(1280, dark=False)
        yield found


@pytest.fixture(autouse=True)
def _said(request: pytest.FixtureRequest) -> Iterator[None]:
    page: Page = request.getfixturevalue("page")
    page.look(1280, dark=False)
    page.said.clear()
    yield
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)


@dataclass
class Written:
    """A service with a language model, and the model."""

    house: House
    model: OpenAI


@pytest.fixture(scope="module")
def written() -> Iterator[Written]:
    with openai_server() as model:
        settings = replace(QUICK, breaker_failures=1000, search_timeout=0.5)
        with serving(
            passages=(*PASSAGES, *MORE), model=model.model(), anonymous=True, settings=settings, abstain_below=0.2
        ) as house:
            yield Written(house, model)


@pytest.fixture
def open_service(written: Written) -> Written:
    """The service without tokens, its model as it is at first."""
    fresh = OpenAI()
    for name in ("answer", "status", "delay", "between", "breaks_after"):
        setattr(written.model, name, getattr(fresh, name))
    written.house.opener.raises, written.house.opener.delay = None, 0.0
    return written


@pytest.fixture(scope="module")
def guarded() -> Iterator[House]:
    """A service that wants tokens, without a model."""
    with serving() as house:
        yield house


def shoot(page: Page, name: str) -> None:
    if folder := os.environ.get("ORRERY_SHOTS"):
        page.shoot(Path(folder) / f"{name}.png")


def start(page: Page, url: str, question: str = "") -> None:
    """Open the page anew, and ask by typing."""
    leave(page)
    page.open(url)
    page.wait("document.activeElement.id === 'question'", "the box has the focus")
    if question:
        ask(page, question)


def leave(page: Page) -> None:
    """Go elsewhere: another fragment alone loads nothing."""
    page.call("Page.navigate", url="about:blank")
    page.wait("location.href === 'about:blank'")


def ask(page: Page, question: str) -> None:
    page.js("document.getElementById('question').select()")
    page.call("Input.insertText", text=question)
    page.press("Enter")


def answered(page: Page) -> None:
    page.wait(  # `ready` comes with the last event, and the end of the stream after it
        "document.getElementById('feedback').classList.contains('ready') && document.getElementById('stop').hidden",
        "the whole answer",
    )


def text(page: Page, selector: str) -> str:
    return str(page.js(f"document.querySelector({json.dumps(selector)}).innerText"))


def texts(page: Page, selector: str) -> list[str]:
    return list(page.js(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)"))


def visible(page: Page, selector: str) -> bool:
    return bool(page.js(f"document.querySelector({json.dumps(selector)}).getClientRects().length"))


@pytest.mark.parametrize("width", [360, 1280])
def test_a_question_is_answered_as_it_is_written_with_sources(page: Page, open_service: Written, width: int) -> None:
    open_service.model.between = 0.15
    page.look(width, dark=False)
    page.call("Page.addScriptToEvaluateOnNewDocument", source=SHIFTS)
    start(page, open_service.house.url)
    page.js("""(window.seen = [], new MutationObserver(() => seen.push(
        [document.getElementById('answer').textContent, document.getElementById('answer').getAttribute('aria-busy'),
         document.getElementById('stop').getClientRects().length > 0
         && !document.getElementById('go').getClientRects().length])
      ).observe(document.getElementById('answer'), {childList: true, characterData: true, subtree: true}))""")
    page.wait("document.querySelector('h1').innerText === 'notes'")
    assert text(page, "#about") == "How the observatory is run."
    ask(page, QUESTION)
    page.wait("document.getElementById('answer').textContent.includes('closes')", "the first words")
    shoot(page, f"writing-{width}-light")
    answered(page)
    told = [(s, stop) for s, busy, stop in page.js("seen") if busy == "true" and s]
    assert all(stop for _, stop in told)  # as long as it writes, it can be stopped
    seen = [s for s, _ in told]
    assert len({s for s in seen if "It closes above 60 km/h [1].".startswith(s)}) >= 3  # piece by piece
    assert page.js("document.getElementById('answer').getAttribute('aria-busy')") == "false"
    assert text(page, "#answer") == "It closes above 60 km/h\u00a01."
    assert texts(page, "#sources h3")[0] == "Dome"
    assert text(page, "#sources .where") == "Operations › Wind · guides/dome.md"
    assert {"dome", "wind"} <= {m.lower() for m in texts(page, "#source-1 mark")}
    assert "· generation " in text(page, "#print") and text(page, "#print").endswith("written by tiny")
    assert text(page, "#state").startswith("Answered with ")
    assert page.js("document.getElementById('source-1').classList.contains('cited')")
    assert page.js("window.moved || 0") < 0.1
    assert page.said == []


def test_a_citation_leads_to_its_source_and_back(page: Page, open_service: Written) -> None:
    open_service.model.answer = "It closes `a[1]` above 60 km/h [2][99] and [1]."
    start(page, open_service.house.url, "dome camera wind dusk minutes")
    answered(page)
    assert texts(page, "#answer a.cite") == ["2", "1"]
    assert texts(page, "#answer code") == ["a[1]"]
    assert page.js("document.querySelector('a.cite').getAttribute('aria-label')").startswith("Source 2: ")
    before = page.js("location.href")
    page.click("a.cite")
    assert page.js("document.activeElement.id") == "source-2"
    assert page.js("[...document.querySelectorAll('.lit')].map(e => e.id)") == ["source-2"]
    assert page.js("location.href") == before
    page.press("Escape")
    assert page.js("document.activeElement.className") == "cite"
    page.press("Enter")  # by keyboard as well
    assert page.js("document.activeElement.id") == "source-2"


def test_a_question_is_in_the_address_and_is_never_sent_with_it(page: Page, open_service: Written) -> None:
    start(page, open_service.house.url, f"{QUESTION} & more #1")
    answered(page)
    shared = page.js("location.href")
    assert shared.partition("#")[2] == "q=When%20does%20the%20dome%20close%20in%20the%20wind%3F%20%26%20more%20%231"
    ask(page, "At what temperature is the camera cooled?")
    page.wait("document.querySelector('#sources h3')?.innerText === 'Camera'", "the other answer")
    page.js("history.back()")
    page.wait("document.querySelector('#sources h3')?.innerText === 'Dome'", "the first answer again")
    leave(page)
    page.open(shared)  # whoever gets the link
    answered(page)
    assert page.js("document.getElementById('question').value") == f"{QUESTION} & more #1"
    names = page.js("performance.getEntriesByType('resource').map(e => e.name)")
    assert not any("dome" in n for n in names)
    assert all(n.startswith(open_service.house.url) for n in names)  # nothing from elsewhere


def test_text_of_documents_and_models_stays_text(page: Page, open_service: Written) -> None:
    open_service.model.answer = f"It is {EVIL} [1] `{EVIL}` [2](javascript:window.hacked=1)"
    start(page, open_service.house.url, HOSTILE)
    answered(page)
    page.js("new Promise(done => setTimeout(done, 200))")
    assert page.js("window.hacked") is None
    assert page.js("document.querySelectorAll('main img, main script, main iframe, main [onerror]').length") == 0
    assert EVIL in text(page, "#answer") and EVIL in text(page, "#source-1 .excerpt")
    links = page.js("[...document.querySelectorAll('#result a:not(.cite)')].map(e => [e.href, e.rel])")
    assert links == [["https://docs.example.org/cellar?a=1&b=2", "noopener noreferrer"]]
    assert text(page, "#source-1 .where").endswith("javascript:window.hacked=1")
    assert (
        text(page, "#source-2 .where") == "Lamps · https://docs.example.org/cellar?a=1&b=2"
    )  # the title is there once
    assert page.said == []
    shoot(page, "hostile-1280-light")


def test_pages_own_policy_lets_nothing_inline_run(page: Page, open_service: Written) -> None:
    start(page, open_service.house.url)
    page.js(
        "document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=x: onerror=\"window.hacked=1\">')"
    )
    page.wait("true")
    page.js("new Promise(done => setTimeout(done, 200))")
    assert page.js("window.hacked") is None
    assert any("Content Security Policy" in said for said in page.said)
    for file in PAGE.glob("*.html"):
        assert "style=" not in file.read_text() and "<style" not in file.read_text()
    for file in PAGE.glob("*.js"):
        assert "innerHTML" not in file.read_text()


def test_the_whole_passage_is_shown_with_its_marks(page: Page, open_service: Written) -> None:
    start(page, open_service.house.url, "Where is the zodiacal lamp? In the dome?")
    answered(page)
    assert {"zodiacal", "lamp"} <= set(texts(page, "#source-1 mark"))
    marks = texts(page, "#source-1 mark")
    assert not text(page, "#source-1 .excerpt").startswith("🔭")
    page.click("#source-1 button.link")
    page.wait("document.querySelector('#source-1 button.link').getAttribute('aria-expanded') === 'true'", "the passage")
    assert page.js("document.querySelector('#source-1 .excerpt').textContent") == LONG
    assert texts(page, "#source-1 mark") == marks
    page.click("#source-1 button.link")
    page.wait("document.querySelector('#source-1 button.link').getAttribute('aria-expanded') === 'false'")
    assert not text(page, "#source-1 .excerpt").startswith("🔭")
    page.click("#source-2 button.link")
    page.wait("document.querySelector('#source-2 [role=status]').textContent === 'This is all of it.'")


def test_it_says_when_no_answer_is_given(page: Page, open_service: Written) -> None:
    start(page, open_service.house.url, "Which opera plays when the choir, the ballet and the orchestra share a dome?")
    answered(page)
    assert "No answer is given" in text(page, "#notice")
    assert text(page, "#sources-title") == "Nearest passages"
    assert not visible(page, "#answer")
    shoot(page, "abstained-1280-light")
    ask(page, "zzz")
    page.wait("document.getElementById('notice').innerText.startsWith('Nothing was found')")
    assert not visible(page, "#found")


def test_it_says_when_the_model_is_away(page: Page, open_service: Written) -> None:
    open_service.model.status = 500
    start(page, open_service.house.url, QUESTION)
    answered(page)
    assert text(page, "#notice").startswith("The language model does not answer: the sentences nearest")
    assert "The dome closes by itself" in text(page, "#answer")
    assert text(page, "#print").endswith("no language model")
    shoot(page, "degraded-1280-light")


def test_a_token_is_asked_for_and_stays_in_the_tab(page: Page, guarded: House) -> None:
    leave(page)
    page.open(guarded.url + "#q=" + QUESTION.replace(" ", "%20"))  # a link that was shared
    # Who reads and the question are both refused, and each empties the box.
    page.wait(
        "document.activeElement.id === 'token' && performance.getEntriesByType('resource')"
        ".filter(e => /\\/(info|query)$/.test(e.name)).length === 2",
        "the token's box has the focus",
    )
    assert "Paste yours" in text(page, "#token-why")
    shoot(page, "token-1280-light")
    page.call("Input.insertText", text="wrong")
    page.press("Enter")
    page.wait("document.getElementById('token-why').innerText.includes('does not accept')")
    assert page.js("sessionStorage.length") == 0
    page.call("Input.insertText", text=f" {guarded.token(['team'])}\u200b ")
    page.press("Enter")
    answered(page)  # what was asked before is asked now
    assert not visible(page, "#token-form")
    assert text(page, "#who-text") == "You read as t1 (everyone, team)."
    assert page.js("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.open(guarded.url + "#q=the%20key")
    page.reload()
    page.wait("document.querySelector('#sources h3')?.innerText === 'Safe'", "the token is remembered")
    page.wait("!document.getElementById('who').hidden", "who reads")
    page.click("#forget")
    page.wait("document.activeElement.id === 'token'", "it is forgotten")
    assert page.js("sessionStorage.length") == 0
    assert not visible(page, "#result")
    page.js("history.replaceState(null, '', '/')")


def test_a_busy_service_is_asked_again_by_itself(page: Page, open_service: Written) -> None:
    house = open_service.house
    house.opener.delay = 1.0  # longer than a search may take: 503, with Retry-After: 2
    start(page, house.url, QUESTION)
    page.wait("/^in [12] s$/.test(document.getElementById('countdown').innerText)", "the countdown")
    assert "asked again by itself" in text(page, "#problem-text")
    assert page.js("document.getElementById('problem').getAttribute('role')") == "alert"
    shoot(page, "busy-1280-light")
    house.opener.delay = 0.0
    answered(page)
    assert not visible(page, "#problem")
    house.opener.raises = TryAgain("away")  # Retry-After: 5
    ask(page, QUESTION)
    page.wait("document.getElementById('countdown').innerText === 'in 5 s'")
    page.click("#stop")
    assert not visible(page, "#problem") and text(page, "#state") == "Stopped."
    ask(page, QUESTION)
    page.wait("document.getElementById('countdown').innerText === 'in 5 s'")
    house.opener.raises = None
    page.click("#again")  # instead of waiting
    answered(page)


def test_without_a_connection_it_says_so_and_goes_on(page: Page, open_service: Written) -> None:
    start(page, open_service.house.url)
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    ask(page, QUESTION)
    page.wait("document.getElementById('problem-text').innerText.startsWith('You are offline')")
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    answered(page)
    # A service that has ended looks the same to a browser that has a connection.
    with serving(anonymous=True) as other:
        start(page, other.url)
    ask(page, QUESTION)
    page.wait("document.getElementById('problem-text').innerText.startsWith('The service cannot be reached')")


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(page: Page, written: Written) -> None:
    """The service's own files, and a stream that ends in the middle or says that it has failed."""
    sources = {"query_id": "0" * 32, "generation": "g", "sources": []}
    ends: tuple[tuple[list[tuple[str, Any]], str], ...] = (
        ([("sources", sources), ("token", {"text": "It closes"})], "The connection broke before"),
        (
            [("sources", sources), ("error", {"detail": "x", "request_id": "abcdef123456"})],
            "The service has failed (request abcdef12)",
        ),
        ([], "The service cannot be reached"),
    )
    with serving(anonymous=True) as house:
        start(page, house.url)
        for events, said in ends:
            body = ": hello\n\n" + "".join(f"event: {n}\ndata: {json.dumps(d)}\n\n" for n, d in events)
            page.js(
                "window.real ??= window.fetch; window.fetch = (...a) => a[0] === 'query' ? "
                f"Promise.resolve(new Response({json.dumps(body)})) : window.real(...a)"
            )
            ask(page, QUESTION)
            page.wait(f"document.getElementById('problem-text').innerText.startsWith({json.dumps(said)})", said)
        page.js("window.fetch = window.real")
        page.click("#again")
        answered(page)


def test_thumbs_are_sent_at_once_and_a_comment_after(page: Page, open_service: Written) -> None:
    house = open_service.house
    start(page, house.url, QUESTION)
    answered(page)
    assert text(page, "#feedback-notice").startswith("A thumb stores the question")
    page.click("[data-thumb=down]")
    page.wait("document.getElementById('thumb-state').innerText === 'Noted, thank you.'")
    assert page.js("[...document.querySelectorAll('.thumb')].map(e => e.getAttribute('aria-pressed'))") == [
        "false",
        "true",
    ]
    page.js("document.getElementById('comment').focus()")
    page.call("Input.insertText", text="It opens at 40, too <b>")
    shoot(page, "thumb-1280-light")
    page.click("#comment-form button")
    page.wait("document.getElementById('thumb-state').innerText.startsWith('Noted with your comment')")
    noted = [json.loads(p.read_text()) for p in sorted((house.folder / "store").glob("notes/feedback/*/*.jsonl"))]
    assert [(n["thumb"], n["comment"]) for n in noted] == [("down", ""), ("down", "It opens at 40, too <b>")]
    ask(page, QUESTION)
    answered(page)
    assert not visible(page, "#comment-form")
    assert page.js("[...document.querySelectorAll('.thumb')].map(e => e.getAttribute('aria-pressed'))") == [
        "false",
        "false",
    ]


def test_enter_asks_shift_enter_does_not_and_tab_goes_in_order(page: Page, open_service: Written) -> None:
    start(page, open_service.house.url)
    page.call("Input.insertText", text="the dome")
    page.call(
        "Input.dispatchKeyEvent",
        type="keyDown",
        key="Enter",
        code="Enter",
        windowsVirtualKeyCode=13,
        modifiers=8,
        text="\r",
    )
    page.call("Input.dispatchKeyEvent", type="keyUp", key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=8)
    assert page.js("document.getElementById('question').value") == "the dome\n"
    assert not visible(page, "#result")
    page.press("Enter")
    answered(page)
    order = []
    for _ in range(5):
        page.press("Tab")
        order.append(page.js("(e => e.id || e.className || e.dataset.thumb)(document.activeElement)"))
        ring = page.js("getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", order
    assert order == ["go", "cite", "thumb", "thumb", "link"]


@pytest.mark.parametrize("state", ["empty", "answer", "problem", "token"])
def test_it_fits_and_is_legible_in_every_size_and_theme(
    page: Page, open_service: Written, guarded: House, state: str
) -> None:
    url = guarded.url if state == "token" else open_service.house.url
    backs = set()
    open_service.model.answer = (
        "It closes above 60 km/h, " + "and_so_on_without_any_space" * 6 + " [1][2].\n\n```\n" + "x" * 200 + "\n```"
    )
    leave(page)
    page.open(url)
    if state == "token":
        page.js("sessionStorage.clear()")
        page.wait("document.activeElement.id === 'token'")
    elif state == "problem":
        open_service.house.opener.raises = TryAgain("away")
        ask(page, QUESTION)
        page.wait("!document.getElementById('problem').hidden")
    elif state == "answer":
        ask(page, f"{HOSTILE} {QUESTION}")
        answered(page)
        page.click("a.cite")
    for width, dark in product((360, 768, 1280), (False, True)):
        page.look(width, dark)
        assert page.js(SIDEWAYS) == 0, f"scrolls sideways at {width}"
        page.wait(f"({CONTRAST}).length === 0", f"contrast at {width}", 3)  # colours fade in
        assert page.js(NAMELESS) == []
        assert page.js("document.querySelectorAll('h1').length") == 1
        backs.add((dark, page.js("getComputedStyle(document.body).backgroundColor")))
        shoot(page, f"{state}-{width}-{'dark' if dark else 'light'}")
    assert len(backs) == 2
    page.js("document.getElementById('stop').click()")


def test_nothing_is_asked_of_a_port_that_is_not_the_services(open_service: Written) -> None:
    """All addresses of the page are relative: it works behind a proxy, and calls no one else."""
    with socket.create_connection(("127.0.0.1", int(open_service.house.url.rsplit(":", 1)[1])), timeout=10) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        head = b""
        while piece := sock.recv(65536):
            head += piece
    assert b"content-security-policy: default-src 'none'; script-src 'self'" in head
    for file in PAGE.iterdir():
        assert "http://" not in file.read_text().replace("http://www.w3.org/2000/svg", ""), file
        assert "https://" not in file.read_text(), file
