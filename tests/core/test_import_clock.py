"""The clock of imports: what stands inside functions counts, what is nested counts once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from orrery import imports
imports.watch()
def later():
    import slow_outer
    import slow_outer
    return slow_outer.VALUE
assert later() == 7
time.sleep(0.3)
print(imports.spent())
"""


def test_imports_are_told_from_work(tmp_path: Path) -> None:
    (tmp_path / "slow_outer.py").write_text("import time\ntime.sleep(0.1)\nfrom slow_inner import VALUE\n")
    (tmp_path / "slow_inner.py").write_text("import time\ntime.sleep(0.1)\nVALUE = 7\n")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    # The two sleeps of the modules once each, and not the one of the work. (No upper bound closer: machines stall.)
    assert 0.2 <= float(done.stdout) < 0.2 + 0.3
