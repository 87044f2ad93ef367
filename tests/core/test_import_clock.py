"""The clock of imports: what stands inside functions counts, what is nested counts once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import clock
from orrery import imports
imports.time = SimpleNamespace(perf_counter=lambda: clock.now)
imports.watch()
def later():
    import slow_outer
    import slow_outer
    return slow_outer.VALUE
assert later() == 7
clock.now += 100
print(imports.spent())
"""


def test_imports_are_told_from_work(tmp_path: Path) -> None:
    (tmp_path / "clock.py").write_text("now = 0\n")
    (tmp_path / "slow_outer.py").write_text("import clock\nclock.now += 10\nfrom slow_inner import VALUE\n")
    (tmp_path / "slow_inner.py").write_text("import clock\nclock.now += 1\nVALUE = 7\n")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "11.0"
