"""Orrery keeps machine-learning models turning: the whole loop, from raw data to retraining, as Airflow Dags.

import orrery
table = orrery.load("flight_delay", "2013-03")     # one partition's features, in a notebook
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

__all__ = ["load"]


def load(project: str, partition: str, dataset: str = "features") -> pyarrow.Table:
    """Return one partition of a project's committed data as an Arrow table.

    `dataset` is `raw/<source>`, `clean/<source>`, `features` or `scores`. Needs pyarrow, so run it in
    an environment that has it (`.venvs/ml`). Raises `UserError` when the project, the dataset or the
    partition does not exist; the message lists what does.
    """
    from orrery.data.load import load as load_table

    return load_table(project, partition, dataset)
