"""Buttons on a task in Airflow's UI: what a step left for people to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink

from orrery.contract import Result

if TYPE_CHECKING:
    from airflow.models.taskinstancekey import TaskInstanceKey

# Where plugins/orrery_plugin.py serves evidence from the store, to people whom Airflow has logged in.
EVIDENCE = "/orrery/evidence"


class ResultLink(BaseOperatorLink):
    """A link to what a result names, once it is there. The whole URL is an XCom, as Airflow 3 wants it."""

    result_key = ""

    @property
    def name(self) -> str:
        """The button's text, and the key in the result's `links`."""
        return self.result_key

    @property
    def xcom_key(self) -> str:
        """Where the URL is kept."""
        return f"link_{self.result_key.lower().replace(' ', '_')}"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Return the URL, or nothing while there is none (the button is then off)."""
        # Runs in the worker alone; at parse time this import would load Airflow's whole execution side.
        from airflow.sdk.execution_time.xcom import XCom

        return str(XCom.get_value(key=self.xcom_key, ti_key=ti_key) or "")


class MLflowRunLink(ResultLink):
    """The training's run in MLflow."""

    result_key = "MLflow run"


class DataDocsLink(ResultLink):
    """Great Expectations' report of the validation."""

    result_key = "Data Docs"


class CurvesLink(ResultLink):
    """The evaluation's curves."""

    result_key = "Curves"


class ModelVersionLink(ResultLink):
    """The version in MLflow's registry."""

    result_key = "MLflow model"


BY_VERB: dict[str, tuple[type[ResultLink], ...]] = {
    "validate": (DataDocsLink,),
    "train": (MLflowRunLink,),
    "evaluate": (CurvesLink,),
    "register": (ModelVersionLink,),
    "promote": (ModelVersionLink,),
}
LINKS: tuple[type[ResultLink], ...] = (MLflowRunLink, DataDocsLink, CurvesLink, ModelVersionLink)


def urls(result: Result, dag_id: str) -> dict[str, str]:
    """Return XCom key -> URL for a result's links; a path of the store is served by the plugin."""
    known = {k.result_key: k for k in LINKS}
    out = {}
    for name, target in result.links.items():
        if name in known:
            url = (
                target if target.startswith(("http://", "https://")) else f"{EVIDENCE}/{quote(dag_id)}/{quote(target)}"
            )
            out[known[name]().xcom_key] = url
    return out
