"""A training in Weights & Biases, beside MLflow, where platform.yaml names a project of it. Never in the way.

Logged when the training has ended: the curves while it goes on are MLflow's. Offline, the run is a folder of the
attempt's evidence, which `wandb sync` sends later. The key is read from the steps' environment alone (WANDB_API_KEY).
Of this machine nothing is sent: no host, no program, no git remote, no console, no code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orrery.step import Work

# JSON of platform.yaml's `wandb`; the planner sets it for the steps that train.
VARIABLE = "ORRERY_WANDB"
# A training that is done waits this long for a server that does not answer; then it is a warning.
INIT_S, WHOLE_S = 15.0, 60.0


def log(
    work: Work,
    params: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    metrics: Mapping[str, float],
    name: str = "",
    group: str = "",
) -> None:
    """Log one training attempt. `history` has one mapping per epoch; `group` holds the trials of a search together."""
    if not os.environ.get(VARIABLE):
        return
    where: dict[str, Any] = json.loads(os.environ[VARIABLE])
    if where["mode"] == "online" and not os.environ.get("WANDB_API_KEY"):
        work.log.warning("the training is not in Weights & Biases: WANDB_API_KEY is not in the step's environment")
        return
    config = {
        **params,
        "orrery": {"window": work.config.key, "address": work.address, "bundle": work.config.bundle,
                   "data": [ref.digest for ref in work.config.inputs.get("features", ())]},
    }  # fmt: skip
    told = {"config": config, "name": name or f"{work.config.key} {work.config.run}", "group": group or None}
    # In a thread: whatever its client waits for, the step goes on after a while. It ends with the process.
    found: list[str] = []
    thread = threading.Thread(target=_send, args=(work, where, told, history, metrics, found), daemon=True)
    thread.start()
    thread.join(WHOLE_S)
    if thread.is_alive():
        found.append(f"it did not answer within {WHOLE_S:.0f} s")
    for problem in found:
        work.log.warning(f"the training is not (wholly) in Weights & Biases: {problem}")


def _send(
    work: Work,
    where: Mapping[str, Any],
    told: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    metrics: Mapping[str, float],
    found: list[str],
) -> None:
    """Write the run; a problem is put into `found`, for another thread cannot be told by an exception."""
    folder = work.scratch / "wandb_run"
    try:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=where["project"], entity=where.get("entity"), mode=where["mode"], id=_id(work), resume="allow",
            job_type=work.config.verb, dir=str(folder), settings=_settings(wandb), **told,
        )  # fmt: skip
        for epoch, losses in enumerate(history):
            run.log({k: v for k, v in losses.items() if math.isfinite(v)}, step=epoch)
        run.summary.update({k: v for k, v in metrics.items() if math.isfinite(v)})
        run.finish()
        wandb.teardown()  # its service has the last word in the file, and would outlive the step
        if where["mode"] == "offline":
            kept = work.evidence_folder("wandb", _run_folder(folder))
            work.log.info("the Weights & Biases run is with the evidence: wandb sync sends it", folder=kept)
        else:
            work.log.info("the training is in Weights & Biases", page=run.url)
    except Exception as e:  # its client has errors of many kinds, and none may cost the training
        found.append(f"{type(e).__name__}: {str(e)[:300]}")


def _settings(wandb: Any) -> Any:
    return wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, save_code=False, disable_job_creation=True,
        x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True, init_timeout=INIT_S,
        finish_timeout=WHOLE_S / 2, login_timeout=INIT_S, host="step",
    )  # fmt: skip


def _id(work: Work) -> str:
    """Return the run's id: that of the attempt, so that logging again completes the same run."""
    return hashlib.sha256(work.config.folder.encode()).hexdigest()[:16]


def _run_folder(folder: Path) -> Path:
    """Return the folder of the run with its record alone: the client's own logs tell of this machine."""
    (run,) = [p for p in (folder / "wandb").iterdir() if p.is_dir() and not p.is_symlink()]
    for file in sorted(run.rglob("*")):
        if file.is_file() and file.suffix != ".wandb":
            file.unlink()
    return folder / "wandb"
