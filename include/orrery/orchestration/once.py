"""A Dag's run in this process, without a scheduler: `dag.test()`, on the Airflow that the environment names.

For a demonstration or a look at one Dag. Airflow reads its configuration when it is first imported: set AIRFLOW_HOME
and the rest before this module is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def prepare() -> None:
    """Make Airflow's database, or bring it up to date."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.utils.db import initdb

    initdb()
    DagBundlesManager().sync_bundles_to_db()


def run(folder: Path, dag_id: str, conf: dict[str, Any]) -> str:
    """Run one Dag of a folder of Dag files to its end; return the state. Raises `KeyError` when it is not there."""
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db

    bag = DagBag(str(folder))
    sync_bag_to_db(bag, "dags-folder", None)
    dag = bag.dags[dag_id]
    dag.deadline = []  # dag.test() looks for a deadline in the database, where it has not put it (Airflow 3.3)
    return str(dag.test(run_conf=conf).state)
