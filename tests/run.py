"""Run every check and every test, each test folder in its own environment: what `make test` calls.

python tests/run.py                  everything
python tests/run.py --only NAME      one group: lint, types, airflow, demo, ml, spark, cloud, rag,
                                 serve, llm, faults
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
# Test folder -> environment. tests/architecture proves that no folder is left out.
FOLDERS = {
    "faults": ("faults",),
    "airflow": ("core", "architecture", "dags", "cluster", "servers", "projects"),
    "demo": ("demo",),
    "ml": ("data", "features", "training", "evaluation", "registry", "monitoring", "tuning"),
    "spark": ("scoring",),
    "cloud": ("cloud",),
    "rag": ("rag",),
    "serve": ("serving",),
    "llm": ("llm",),
}
ENVIRONMENT = {
    "airflow": "airflow",
    "ml": "ml",
    "spark": "spark",
    "cloud": "cloud",
    "rag": "rag",
    "serve": "serve",
    "llm": "llm",
    "faults": "airflow",
    "demo": "airflow",
}


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
        ]
    }
    # The longest first, so that two at a time end together.
    for group, folders in FOLDERS.items():
        there = [f"tests/{f}" for f in folders if any((ROOT / "tests" / f).glob("test_*.py"))]
        groups[group] = [[binary(ENVIRONMENT[group], "pytest"), *there]] if there else []
    scripts = ["docker/venv.py", "docker/images.py", "docker/image/slim.py", "include/demo", "plugins", "dags"]
    groups["types"] = [[mypy, *python, "-p", "orrery"], [mypy, *python, *scripts]]
    return groups


class Group:
    """One group's commands, its output kept until it ends: two groups run at a time."""

    def __init__(self, name: str, commands: list[list[str]], env: dict[str, str]) -> None:
        self.name, self.commands, self.env = name, commands, env
        self.failed, self.passed, self.summary = False, 0, list[str]()

    def run(self) -> None:
        for command in self.commands:
            began = time.monotonic()
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            self.passed += sum(int(n) for n in re.findall(r"(\d+) passed", done.stdout))
            self.failed = self.failed or done.returncode != 0
            state = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
            line = f"{self.name:8} {Path(command[0]).name:8} {state:12} {time.monotonic() - began:5.0f} s"
            self.summary.append(line)
            print(
                f"\n=== {self.name}: {Path(command[0]).name} {' '.join(command[1:])}\n{done.stdout}{line}", flush=True
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = commands()
    parser.add_argument("--only", choices=sorted(known), help="one group")
    args = parser.parse_args()
    # A test must never find the servers, the store or the projects of the person who runs it.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ORRERY_", "AIRFLOW_", "MLFLOW_", "AWS_ENDPOINT"))}
    env |= {k: v for k, v in os.environ.items() if k in ("ORRERY_VENVS", "ORRERY_FAULT_KILLS")}
    env["ORT_DISABLE_TELEMETRY"] = "1"
    groups = [Group(name, known[name], env) for name in ([args.only] if args.only else known)]
    print(f"running {', '.join(g.name for g in groups)}; each prints when it ends", flush=True)
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(Group.run, groups))
    print("\n" + "\n".join(line for g in groups for line in g.summary))
    failed = [g.name for g in groups if g.failed]
    print(f"\n{sum(g.passed for g in groups)} passed, {len(failed)} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
