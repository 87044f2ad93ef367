"""Serves what steps left for people (Data Docs, curves) to whom Airflow lets read the Dag's task logs.

Documents are made from data that came from outside, so they are shown in a sandbox: no script runs, nothing
is loaded from elsewhere, and they cannot act on Airflow's pages as the user who looks at them.
"""

from __future__ import annotations

import mimetypes
import re

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from fastapi import Depends, FastAPI, HTTPException, Response

from orrery import platform
from orrery.errors import OrreryError
from orrery.orchestration.assets import DAGS
from orrery.store import Store

MAX_BYTES = 50 << 20
EVIDENCE_PATH = re.compile(r"^[a-z][a-z0-9_]{0,62}/runs/[^/]+/[^/]+/[0-9]+/evidence/.+$", flags=re.ASCII)
HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "private, max-age=300",
    "Referrer-Policy": "no-referrer",
}
SHOWN = {
    ".html": "text/html",
    ".png": "image/png",
    ".json": "application/json",
    ".css": "text/css",
    ".txt": "text/plain",
}

app = FastAPI(title="Orrery evidence", docs_url=None, redoc_url=None, openapi_url=None)


@app.get("/{dag_id}/{path:path}", dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.TASK_LOGS))])
def evidence(dag_id: str, path: str) -> Response:
    """Return one file of an attempt's evidence. 404 for anything that is not evidence of this Dag's project."""
    project, _, verb = dag_id.partition(".")
    # Only Dags that there are: who may read what is asked of the Dag, and nobody owns one that does not exist.
    known = verb in DAGS and EVIDENCE_PATH.match(path) and path.startswith(f"{project}/")
    if not known:
        raise HTTPException(404, "not a file of this project's evidence")
    try:
        store = Store(platform.load().store)
        if store.size(path) > MAX_BYTES:
            raise HTTPException(413, "too large to be shown here; it is in the store")
        data = store.read(path)
    except FileNotFoundError:
        raise HTTPException(404, "it is not in the store (any more)") from None
    except OrreryError as e:
        raise HTTPException(404 if e.exit_code == 64 else 503, e.message) from None
    suffix = mimetypes.guess_extension(mimetypes.guess_type(path)[0] or "") or ""
    return Response(data, media_type=SHOWN.get(suffix, "application/octet-stream"), headers=HEADERS)
