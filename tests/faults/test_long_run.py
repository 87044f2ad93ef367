"""A long training that is killed all the time ends with the same model, and its account of itself is right.

`make test-faults` kills 50 times and more (ORRERY_FAULT_KILLS), `make test` a few times.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs")) / "ml" / "bin" / "python"
LONG = int(os.environ.get("ORRERY_FAULT_KILLS", "0")) >= 50
KILLS = int(os.environ["ORRERY_FAULT_KILLS"]) if LONG else 3


def test_killed_all_the_time_it_loses_nothing_and_says_what_it_cost(tmp_path: Path) -> None:
    argv = [str(PYTHON), str(Path(__file__).with_name("long_run.py")), str(tmp_path), str(KILLS)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["kills"] == KILLS and told["attempts"] > KILLS
    assert told["damaged"] == 0 and told["same"]
    assert told["kept"] == told["steps"]  # each step of the model is counted once, whatever was repeated
    # By the steps' medians of these very attempts: another run's differs as much as the machine's load does. The account
    # takes an attempt's useful time from what is left of it beside saves and evaluations, so short ones count less.
    # A save that became whole after an attempt's last document is counted, but no time is known for it: a second of few.
    assert told["reported"] == pytest.approx(told["counted"], rel=0.15 if LONG else 0.3), told
    if LONG:  # and by the uninterrupted run's, on a machine that does nothing else for so long
        assert told["reported"] == pytest.approx(told["expected"], rel=0.02), told
