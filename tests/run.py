"""Run every check and every test, each test folder in its own environment: what `make test` calls.

python tests/run.py                  everything
python tests/run.py --only NAME      one group: lint, types, airflow, ml, spark, faults
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
# Test folder -> environment. tests/architecture proves that no folder is left out.
FOLDERS = {
    "airflow": ("core", "architecture", "dags", "orchestration", "servers", "projects"),
    "ml": ("data", "features", "training", "evaluation", "registry"),
    "spark": ("scoring",),
    "faults": ("faults",),
}
ENVIRONMENT = {"airflow": "airflow", "ml": "ml", "spark": "spark", "faults": "airflow"}


def binary(environment: str, name: str) -> str:
    return str(VENVS / environment / "bin" / name)


def commands() -> dict[str, list[list[str]]]:
    """Return the commands of every group."""
    mypy = binary("dev", "mypy")
    python = ["--python-executable", binary("airflow", "python")]
    groups: dict[str, list[list[str]]] = {
        "lint": [
            [binary("dev", "ruff"), "check", "."],
            [binary("dev", "ruff"), "format", "--check", "."],
        ],
        "types": [[mypy, *python, "-p", "orrery"], [mypy, *python, "docker/venv.py", "include/demo"]],
    }
    for group, folders in FOLDERS.items():
        there = [f"tests/{f}" for f in folders if any((ROOT / "tests" / f).glob("test_*.py"))]
        groups[group] = [[binary(ENVIRONMENT[group], "pytest"), *there]] if there else []
    return groups


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = commands()
    parser.add_argument("--only", choices=sorted(known), help="one group")
    args = parser.parse_args()
    failed, passed, summary = [], 0, []
    # A test must never find the servers, the store or the projects of the person who runs it.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ORRERY_", "AIRFLOW_", "MLFLOW_", "AWS_ENDPOINT"))}
    env |= {k: v for k, v in os.environ.items() if k in ("ORRERY_VENVS", "ORRERY_FAULT_KILLS")}
    for group in [args.only] if args.only else list(known):
        for command in known[group]:
            print(f"\n=== {group}: {Path(command[0]).name} {' '.join(command[1:])}", flush=True)
            began = time.monotonic()
            done = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert done.stdout is not None
            for line in done.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                if match := re.search(r"(\d+) passed", line):
                    passed += int(match.group(1))
            code = done.wait()
            summary.append(
                f"{group:8} {Path(command[0]).name:8} {'ok' if code == 0 else f'FAILED ({code})':12} {time.monotonic() - began:5.0f} s"
            )
            if code:
                failed.append(group)
    print("\n" + "\n".join(summary))
    print(f"\n{passed} passed, {len(failed)} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
