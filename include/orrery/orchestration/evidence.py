"""Serves what steps leave for people (Data Docs, curves, drift reports) to whom Airflow lets read the Dag's task logs.

Documents are made from data that came from outside, so they are shown in a sandbox: no script runs, nothing
is loaded from elsewhere, and they cannot act on Airflow's pages as the user who looks at them. Evidently's page is made
by its own scripts: there these run, in an origin of their own (no cookies, no storage), and still reach nothing.
"""

from __future__ import annotations

import mimetypes
import re

from fastapi import APIRouter, HTTPException, Response

from orrery import platform
from orrery.errors import OrreryError
from orrery.orchestration.links import LINKS
from orrery.orchestration.web import addresses
from orrery.orchestration.web.access import READ_LOGS, OurDag
from orrery.orchestration.web.pages import not_yet
from orrery.orchestration.web.waiting import ended
from orrery.store import Store

MAX_BYTES = 50 << 20
EVIDENCE_PATH = re.compile(r"^[a-z][a-z0-9_]{0,62}/runs/[^/]+/[^/]+/[0-9]+/evidence/.+$", flags=re.ASCII)
# What people look for, by its name in the evidence.
NAMES = {link.evidence: link.result_key for link in LINKS if link.evidence}
HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "private, max-age=300",
    "Referrer-Policy": "no-referrer",
}
# It needs no more: no eval, no worker, no request; `sandbox` without allow-same-origin makes the origin opaque.
DRAWN_BY_SCRIPTS = re.compile(r"^[^/]+/runs/[^/]+/report-[^/]+/[0-9]+/evidence/evidently\.html$", flags=re.ASCII)
SCRIPTS = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; font-src data:"
)
SHOWN = {
    ".html": "text/html",
    ".png": "image/png",
    ".json": "application/json",
    ".css": "text/css",
    ".txt": "text/plain",
}

router = APIRouter(dependencies=[READ_LOGS])


@router.get(addresses.EVIDENCE)
def evidence(seen: OurDag, path: str) -> Response:
    """Return one file of an attempt's evidence; a page that looks again while the attempt may still leave it.

    404 for anything that is not evidence of this Dag's project.
    """
    if not EVIDENCE_PATH.match(path) or not path.startswith(f"{seen.project}/"):
        raise HTTPException(404, "not a file of this project's evidence")
    try:
        store = Store(platform.load().store)
        if store.size(path) > MAX_BYTES:
            raise HTTPException(413, "too large to be shown here; it is in the store")
        data = store.read(path)
    except FileNotFoundError:
        attempt, _, name = path.partition("/evidence/")
        return not_yet(NAMES.get(name, "such file"), ended(seen.project, attempt))
    except OrreryError as e:
        raise HTTPException(404 if e.exit_code == 64 else 503, e.message) from None
    suffix = mimetypes.guess_extension(mimetypes.guess_type(path)[0] or "") or ""
    headers = HEADERS | ({"Content-Security-Policy": SCRIPTS} if DRAWN_BY_SCRIPTS.search(path) else {})
    return Response(data, media_type=SHOWN.get(suffix, "application/octet-stream"), headers=headers)
