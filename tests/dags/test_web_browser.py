"""The pages in a real browser, alone and inside of Airflow's own UI: light and dark, narrow and wide, and the rollback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from urllib.parse import quote

import browser
import httpx
import pytest
import web_house
from browser import Page
from mlflow_house import free_port
from web_house import PROJECT, RUNS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.program() is None, reason=f"none of {', '.join(browser.NAMES)} is on PATH"),
]
TRAIN = f"{PROJECT}.train"
MODEL = f"/orrery/pages/dags/{TRAIN}/model"
TAB = f"/dags/{TRAIN}/plugin/orrery-model"


def verdict(run: str) -> str:
    verb, run_id, _, _ = RUNS[run]
    return f"/orrery/pages/dags/{PROJECT}.{verb}/runs/{quote(run_id, safe='')}/verdict"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with web_house.api_server(tmp_path_factory.mktemp("browser"), free_port()) as found:
        yield found


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    with browser.chromium() as found:
        sign_in(found, address, "ada")
        yield found


def sign_in(page: Page, address: str, user: str) -> None:
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as http:
        token = http.post("/auth/token", json={"username": user, "password": user}).json()["access_token"]
    page.call("Network.setCookie", name="_token", value=token, url=address, httpOnly=True, sameSite="Lax")


CONTRAST = """(() => {
  const lum = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 && m[3] === 0 ? null : m.slice(0, 3); };
  const back = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('main *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest('svg') || e.disabled || !e.getClientRects().length) continue;
    const a = lum(parse(getComputedStyle(e).color)), b = lum(back(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(e.className + ' ' + e.textContent.trim().slice(0, 40) + ' ' + ratio.toFixed(2));
  }
  return bad;
})()"""
NAMELESS = """[...document.querySelectorAll('a,button,select,textarea,input,svg[role=img]')].filter(e =>
  !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.textContent.trim() ||
    (e.id && document.querySelector(`label[for="${e.id}"]`)))).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("path", [MODEL, *(verdict(r) for r in RUNS), "/orrery/pages/dags/reports/model"])
def test_every_page_fits_is_legible_and_says_no_error(address: str, page: Page, path: str) -> None:
    backs = set()
    for width, dark in product((380, 390, 1600), (False, True)):
        page.look(width, dark)
        page.open(address + path)
        wide = page.js("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, f"scrolls sideways at {width}"
        assert page.js(CONTRAST) == [], (width, dark)
        assert page.js(NAMELESS) == []
        assert page.js("document.querySelectorAll('h1').length") == 1
        backs.add((dark, page.js("getComputedStyle(document.body).backgroundColor")))
    assert len(backs) == 2  # one per theme
    assert page.said == []


def test_airflows_theme_wins_over_the_systems_and_is_followed(address: str, page: Page) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    page.look(1600, dark=False)
    page.open(address + MODEL)
    light = page.js(back)
    page.js("localStorage.setItem('theme', 'dark')")
    page.open(address + MODEL)
    assert page.js(back) != light
    page.js("localStorage.setItem('theme', 'system')")
    page.open(address + MODEL)
    assert page.js(back) == light


def test_the_tab_stands_in_airflows_own_page(address: str, page: Page) -> None:
    page.look(1600, dark=True)
    page.open(address + TAB)
    frame = "document.querySelector('iframe')"
    page.wait(
        f"!!({frame} && {frame}.contentDocument && {frame}.contentDocument.querySelector('#live'))", "the Model tab"
    )
    assert page.js(f"{frame}.contentDocument.querySelector('h1').textContent") == PROJECT
    inside = f"getComputedStyle({frame}.contentDocument.body).backgroundColor"
    dark = page.js(inside)
    # The switch in Airflow's page is heard in the frame.
    page.js("localStorage.setItem('theme', 'light')")
    page.wait(f"{inside} !== {json.dumps(dark)}", "the other theme")
    # A link leads out of the frame, to Airflow's own page.
    # A slow machine may still be drawing the other theme, and lose the click.
    click = f"{frame}?.contentDocument?.querySelector('a[data-app]')?.click()"
    page.wait(f"({click}, location.pathname.endsWith('/required_actions'))", "Airflow's required actions")
    # (Chromium warns of the sandbox that Airflow gives every tab.)
    ours = [said for said in page.said if "/orrery/" in said and "can escape its sandboxing" not in said]
    assert ours == []


def test_a_run_that_goes_on_is_kept_fresh_without_losing_its_place(address: str, page: Page) -> None:
    page.look(1600, dark=False)
    page.open(address + verdict("asking"))
    page.js("document.querySelector('details').open = true; window.mine = document.getElementById('live')")
    page.js("fetch = (old => (...a) => { window.looks = (window.looks || 0) + 1; return old(...a); })(fetch)")
    page.wait("window.looks > 1", "a second look")
    # Nothing is different, so nothing was put in its place.
    assert page.js("window.mine === document.getElementById('live') && document.querySelector('details').open")


def test_a_rollback_asks_for_a_reason_and_starts_airflows_dag(address: str, page: Page) -> None:
    page.look(390, dark=True)
    page.open(address + MODEL)
    page.click("[data-open=rollback]")
    page.wait("document.getElementById('rollback').open", "the dialog")
    assert "version 3" in page.js("document.querySelector('#rollback .change').textContent")
    assert page.js("document.activeElement.name") == "reason"
    page.press("Escape")
    assert not page.js("document.getElementById('rollback').open")
    page.click("[data-open=rollback]")
    # Without a reason nothing is sent.
    page.click("#rollback [type=submit]")
    assert page.js("document.getElementById('rollback').open && !document.querySelector('.answer a')")
    page.js(
        "(e => { e.value = '1'; e.dispatchEvent(new Event('change')); })(document.getElementById('rollback-version'))"
    )
    assert page.js("document.getElementById('rollback-to').textContent") == "1"
    why = "p99 is up \"'<script>alert(1)</script>"
    page.js(f"document.getElementById('rollback-reason').value = {json.dumps(why)}")
    page.click("#rollback [type=submit]")
    page.wait("document.querySelector('.answer a')", "the run's link")
    target = page.js("document.querySelector('.answer a').getAttribute('href')")
    assert target.startswith(f"/dags/{PROJECT}.rollback/runs/")
    conf = page.js(f"fetch('/api/v2{target.replace('/runs/', '/dagRuns/')}').then(r => r.json()).then(r => r.conf)")
    assert conf == {"version": "1", "reason": why}
    assert page.said == []


def test_a_rollback_that_airflow_refuses_says_so(address: str, page: Page) -> None:
    page.look(1600, dark=False)
    page.open(address + MODEL)
    page.click("[data-open=rollback]")
    page.js("document.getElementById('rollback-reason').value = 'x'")
    sign_in(page, address, "viv")  # may read, not start: as if the right had been taken away meanwhile
    page.click("#rollback [type=submit]")
    page.wait("document.querySelector('.answer').textContent.includes('does not let you')", "the refusal")
    assert not page.js("document.querySelector('#rollback [type=submit]').disabled")
