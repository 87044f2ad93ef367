"""A generation's figures in MLflow, one run per evaluation. An evaluation never fails for want of MLflow."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from orrery.errors import TryAgain, UserError
from orrery.registry import client
from orrery.registry.tracking import ANSWER_S, attempt_run
from orrery.step import Work


def log(work: Work, metrics: Mapping[str, float], plots: Mapping[str, bytes]) -> str | None:
    """Log figures and plots; return the run's id, or None when there is no MLflow or it does not answer."""
    try:
        server = client.from_environment(ANSWER_S)
        if server is None:
            return None
        generation = work.input("generation")
        run = attempt_run(server, work, name=f"evaluate {work.config.key} {generation.address[:12]}")
        told = [
            {"key": k, "value": float(v), "step": 0, "timestamp": run.started}
            for k, v in sorted(metrics.items())
            if math.isfinite(v)
        ]
        params = [{"key": "generation", "value": generation.path}, {"key": "key", "value": generation.key}]
        server.call("POST", "runs/log-batch", run_id=run.id, metrics=told, params=params)
        for name, data in plots.items():
            server.put_file(f"{run.artifacts}/{name.lower().replace(' ', '-')}.png", data)
        server.call("POST", "runs/update", run_id=run.id, status="FINISHED", end_time=int(time.time() * 1000))
    except (TryAgain, UserError) as e:  # Interrupted goes on up
        work.log.warning(f"the evaluation is not in MLflow: {e.message}")
        return None
    return run.id
