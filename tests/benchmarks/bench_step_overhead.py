"""step_overhead: seconds of a light step (gate) that are not its work: start to first work, lease, and commit.

Against Airflow's own way to run a task in another environment, `ExternalPythonOperator` with a callable that does
nothing, in the same environment; both are whole processes, best of five. The rival reads no config, checks no input,
takes no lease and commits nothing: what the ratio shows is the price of those.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
REPEATS = 5


def nothing() -> int:
    return 1


def main() -> None:
    from loop import PROJECT, WINDOW, Loop

    with tempfile.TemporaryDirectory() as folder:
        os.environ["AIRFLOW_HOME"] = folder
        loop = Loop(Path(folder), "http://127.0.0.1:9")
        loop.data()
        for verb in ("train", "evaluate", "gate"):
            loop.run(verb, WINDOW)
        overheads = []
        for _ in range(REPEATS):
            loop.run("gate", WINDOW, "--force")
            seconds = loop.ledger.find(PROJECT, "run")[-1].payload["seconds"]
            overheads.append(seconds["total"] - seconds["work"])
        theirs = min(external_python() for _ in range(REPEATS))
    ours = min(overheads)
    against = f"ExternalPythonOperator, no work and no commit: {theirs:.2f} s (ratio: theirs to ours)"
    print(
        json.dumps([{"name": "step_overhead", "value": ours, "unit": "s", "against": against, "ratio": theirs / ours}])
    )


def external_python() -> float:
    """Return the seconds of one ExternalPythonOperator call in the ml environment."""
    import warnings

    warnings.simplefilter("ignore")
    from airflow.providers.standard.operators.python import ExternalPythonOperator
    from airflow.sdk import DAG
    from loop import VENVS

    with DAG("bench", schedule=None):
        operator = ExternalPythonOperator(
            task_id="nothing",
            python=str(VENVS / "ml" / "bin" / "python"),
            python_callable=nothing,
            expect_airflow=False,
            expect_pendulum=False,
        )
    began = time.monotonic()
    operator.execute({"ti": SimpleNamespace(bundle_instance=None)})
    return time.monotonic() - began


if __name__ == "__main__":
    main()
