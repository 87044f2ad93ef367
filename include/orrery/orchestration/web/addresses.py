"""Every URL of ours, and those of Airflow's own pages that we point to. Light: workers load it for their links."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import quote, urlsplit

# Routes below `<base>/orrery`; plugins/orrery_plugin.py mounts the app there.
PREFIX = "/orrery"
EVIDENCE = "/evidence/{dag_id}/{path:path}"
MODEL_PAGE, VERDICT_PAGE = "/pages/dags/{dag_id}/model", "/pages/dags/{dag_id}/runs/{run_id}/verdict"
MODEL_JSON, VERDICT_JSON = "/api/dags/{dag_id}/model", "/api/dags/{dag_id}/runs/{run_id}/verdict"
MLFLOW_RUN, MLFLOW_VERSION = "/mlflow/{dag_id}/run/{attempt:path}", "/mlflow/{dag_id}/version/{attempt:path}"
STATIC = "/static/{name}"
# Where Airflow shows our tabs: `…/plugin/<route>`.
MODEL_TAB, VERDICT_TAB = "orrery-model", "orrery-verdict"


@lru_cache(maxsize=1)
def base() -> str:
    """Return the path below which Airflow is served, without its last slash: empty unless `[api] base_url` has one."""
    from airflow.sdk.configuration import conf

    return urlsplit(conf.get("api", "base_url", fallback="") or "").path.rstrip("/")


def _part(text: str) -> str:
    return quote(text, safe="~")


def ours(route: str, **values: str) -> str:
    """Return one of our URLs; what is filled in is quoted, so that it stays one part of the path."""
    path = route.replace(":path", "")
    for name, value in values.items():
        kept = "/" if f"{{{name}:path}}" in route else "~"
        path = path.replace(f"{{{name}}}", quote(value, safe=kept))
    return f"{base()}{PREFIX}{path}"


def dag(dag_id: str) -> str:
    """Return Airflow's page of a Dag."""
    return f"{base()}/dags/{_part(dag_id)}"


def run(dag_id: str, run_id: str) -> str:
    """Return Airflow's page of a run."""
    return f"{dag(dag_id)}/runs/{_part(run_id)}"


def verdict(dag_id: str, run_id: str) -> str:
    """Return the Verdict tab of a run."""
    return f"{run(dag_id, run_id)}/plugin/{VERDICT_TAB}"


def model(dag_id: str) -> str:
    """Return the Model tab of a Dag."""
    return f"{dag(dag_id)}/plugin/{MODEL_TAB}"


def required_actions(dag_id: str) -> str:
    """Return Airflow's page of the questions that a Dag's runs wait for."""
    return f"{dag(dag_id)}/required_actions"


def trigger(dag_id: str) -> str:
    """Return the REST endpoint that starts a run."""
    return f"{base()}/api/v2/dags/{_part(dag_id)}/dagRuns"
