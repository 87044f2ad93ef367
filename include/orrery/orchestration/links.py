"""Buttons on a task in Airflow's UI: what a step leaves for people to look at, there from the moment it starts.

A button's URL is an XCom. When a plan is made, the attempt's folder in the store is known, and with it the URL of
everything that the attempt may leave: `known` gives them all, before there is anything. What answers there (web/)
says "not there yet" and looks again, until the evidence has come or the attempt has ended without it. A step that
is skipped has no attempt: it is given the links of the result that counts, or none, and the button is off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperatorLink

from orrery.contract import Kind, Result
from orrery.orchestration.web import addresses

if TYPE_CHECKING:
    from airflow.models.taskinstancekey import TaskInstanceKey


class ResultLink(BaseOperatorLink):
    """A link to what a step leaves. The whole URL is an XCom, as Airflow 3 wants it."""

    result_key = ""
    # The file's name in the attempt's evidence; none: it is not in the store.
    evidence = ""
    # Whether there is none without an attempt: a step that is skipped makes none.
    of_attempt = True

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

    def known(self, dag_id: str, run_id: str, attempt: str) -> str:
        """Return the URL at which the link's page will be, given the attempt's folder."""
        return addresses.ours(addresses.EVIDENCE, dag_id=dag_id, path=f"{attempt}/evidence/{self.evidence}")


class MLflowRunLink(ResultLink):
    """The training's run in MLflow, found there by the attempt that made it."""

    result_key = "MLflow run"

    def known(self, dag_id: str, run_id: str, attempt: str) -> str:
        """Return the address that leads on to MLflow."""
        return addresses.ours(addresses.MLFLOW_RUN, dag_id=dag_id, attempt=attempt)


class DataDocsLink(ResultLink):
    """Great Expectations' report of the validation."""

    result_key = "Data Docs"
    evidence = "data_docs/index.html"


class CurvesLink(ResultLink):
    """The evaluation's curves."""

    result_key = "Curves"
    evidence = "curves.html"


class HealthLink(ResultLink):
    """The metric by partition with its promise, slices, and the features that moved."""

    result_key = "Health"
    evidence = "health.html"


class TuningLink(ResultLink):
    """How a search went: history, which parameters made the difference, every trial."""

    result_key = "Tuning"
    evidence = "tuning.html"


class EvidentlyLink(ResultLink):
    """Evidently's drift report of a partition."""

    result_key = "Evidently report"
    evidence = "evidently.html"


class ModelVersionLink(ResultLink):
    """The version in MLflow's registry."""

    result_key = "MLflow model"

    def known(self, dag_id: str, run_id: str, attempt: str) -> str:
        """Return the address that leads on to MLflow."""
        return addresses.ours(addresses.MLFLOW_VERSION, dag_id=dag_id, attempt=attempt)


class SourcesLink(ResultLink):
    """What became of each document: new, changed, gone, failed and why."""

    result_key = "Sources"
    evidence = "sources.html"


class RetrievalLink(ResultLink):
    """How well a generation finds what the labelled questions ask for, and when it abstains."""

    result_key = "Retrieval"
    evidence = "retrieval.html"


class VerdictLink(ResultLink):
    """What came of the run, and why: the run's own tab."""

    result_key = "Verdict"
    of_attempt = False

    def known(self, dag_id: str, run_id: str, attempt: str) -> str:
        """Return the tab's address."""
        return addresses.verdict(dag_id, run_id)


class AttemptsLink(ResultLink):
    """How often a training was interrupted, what that cost, and where it goes on: in the run's own tab."""

    result_key = "Attempts"
    of_attempt = False

    def known(self, dag_id: str, run_id: str, attempt: str) -> str:
        """Return the tab's address."""
        return addresses.verdict(dag_id, run_id)


BY_VERB: dict[str, tuple[type[ResultLink], ...]] = {
    "validate": (DataDocsLink,),
    "train": (MLflowRunLink, AttemptsLink),
    "trial": (MLflowRunLink,),
    "tune": (TuningLink,),
    "evaluate": (CurvesLink,),
    "gate": (VerdictLink,),
    "register": (ModelVersionLink,),
    "promote": (ModelVersionLink,),
    "rollback": (ModelVersionLink,),
    "monitor": (VerdictLink, HealthLink),
    "report": (EvidentlyLink,),
}
KNOWLEDGE: dict[str, tuple[type[ResultLink], ...]] = {
    "collect": (SourcesLink,),
    "evaluate": (RetrievalLink,),
    "gate": (VerdictLink,),
}
LINKS: tuple[type[ResultLink], ...] = tuple(
    dict.fromkeys(link for links in (*BY_VERB.values(), *KNOWLEDGE.values()) for link in links)
)


def of(kind: Kind, verb: str) -> tuple[type[ResultLink], ...]:
    """Return the buttons of a verb."""
    return (BY_VERB if kind == "model" else KNOWLEDGE).get(verb, ())


def expected(kind: Kind, verb: str, dag_id: str, run_id: str, attempt: str | None = None) -> dict[str, str]:
    """Return XCom key -> URL for what an attempt that is about to start may leave; without one, for what needs none."""
    found = [link() for link in of(kind, verb)]
    return {
        link.xcom_key: link.known(dag_id, run_id, attempt or "")
        for link in found
        if (attempt is not None) is link.of_attempt
    }


def shown(result: Result, dag_id: str) -> dict[str, str]:
    """Return name -> URL for a result's links that have a button; a path of the store is served by the plugin."""
    names = {link.result_key for link in LINKS}
    return {name: _url(target, dag_id) for name, target in result.links.items() if name in names}


def urls(result: Result, dag_id: str) -> dict[str, str]:
    """Return XCom key -> URL for a result's links."""
    found = shown(result, dag_id)
    return {link().xcom_key: found[link.result_key] for link in LINKS if link.result_key in found}


def _url(target: str, dag_id: str) -> str:
    if target.startswith(("http://", "https://")):
        return target
    return addresses.ours(addresses.EVIDENCE, dag_id=dag_id, path=target)
