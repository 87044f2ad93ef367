"""The import law, proved twice: by what is really loaded, and by import-linter over the whole graph."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "include" / "orrery"
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
HEAVY = {
    *("torch", "pandas", "numpy", "pyarrow", "sklearn", "lightgbm", "mlflow", "feast", "great_expectations", "onnx"),
    *("onnxruntime", "pyspark", "matplotlib", "airflow"),
}
LIGHT = (
    "spec",
    "platform",
    "errors",
    "contract",
    "plan",
    "runner",
    "ledger",
    "step",
    "cli",
    "partitions",
    "checking",
    "attempts",
    "budgets",
    "placement",
    "costs",
    "effort",
    "endings",
    "faults",
    "twin",
    "lastwords",
    "housekeeping",
)
LINT = [str(VENVS / "dev" / "bin" / "lint-imports"), "--no-cache", "--no-logo"]


def loaded(python: Path, modules: list[str], suspects: set[str]) -> set[str]:
    """Return which suspects a fresh Python holds after it has imported these modules."""
    code = f"import sys\nfor m in {modules}:\n    __import__(m)\nprint(*(set(sys.modules) & {suspects}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_light_modules_load_nothing_heavy_where_it_is_installed() -> None:
    python = VENVS / "ml" / "bin" / "python"
    if not python.exists():
        pytest.skip("the ml environment, in which there would be something to load, has not been made")
    assert loaded(python, ["numpy"], HEAVY) == {"numpy"}
    assert loaded(python, [f"orrery.{m}" for m in LIGHT], HEAVY) == set()


def top_level_imports(file: Path) -> set[str]:
    """Return the root names that a file imports when it is imported (not in functions, not for types only)."""
    found: set[str] = set()
    queue: list[ast.AST] = [ast.parse(file.read_text())]
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        queue.extend(ast.iter_child_nodes(node))
    return found


def test_dags_plugins_and_packages_are_light() -> None:
    files = [
        *(ROOT / "dags").glob("*.py"),
        *(ROOT / "plugins").glob("*.py"),
        *PACKAGE.glob("*.py"),
        *PACKAGE.glob("*/__init__.py"),
    ]
    assert len(files) > 20
    for file in files:
        assert not top_level_imports(file) & (HEAVY - {"airflow"}), file


def test_orchestration_imports_airflow_and_nothing_heavy() -> None:
    found = {p.name: top_level_imports(p) & HEAVY for p in (PACKAGE / "orchestration").rglob("*.py")}
    assert set().union(*found.values()) == {"airflow"}


def test_only_orchestration_dags_and_plugins_name_airflow() -> None:
    for file in (ROOT / "include").rglob("*.py"):
        if "orchestration" in file.parts:
            continue
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            for name in (
                [a.name for a in node.names] if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            )
        }  # fmt: skip
        assert "airflow" not in names, file


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    config = ["--config", str(folder / "pyproject.toml")]
    env = {**os.environ, "PYTHONPATH": str(folder / "include")}
    return subprocess.run([*LINT, *config], capture_output=True, text=True, cwd=folder, env=env, check=False)


def test_the_contracts_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("data/tables.py", "from orrery.training import schema", "Subjects import downwards only BROKEN"),
        ("evaluation/gate.py", "from orrery.registry import client", "Subjects import downwards only BROKEN"),
        ("partitions.py", "def f():\n    import numpy", "What the scheduler parses is light BROKEN"),
        ("store.py", "from airflow.sdk import dag", "Only orchestration imports Airflow BROKEN"),
    ],
)
def test_the_contracts_bite(tmp_path: Path, file: str, line: str, contract: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "include" / "orrery", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "include" / "orrery" / file).open("a") as f:
        f.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert contract in done.stdout
