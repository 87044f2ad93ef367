"""What holds for every file: owners, runbooks, docstrings, and nothing that only this machine knows."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "include" / "orrery"


def tracked() -> list[Path]:
    """Return what git has, or would have: no ignored file."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def texts() -> dict[Path, str]:
    found = {}
    for path in tracked():
        try:
            found[path] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    assert len(found) > 100
    return found


def lines_with(pattern: str, *, without: tuple[str, ...] = ()) -> list[str]:
    """Return `file:line: text` of every tracked line that matches."""
    regex = re.compile(pattern)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path, text in texts().items()
        if path != Path(__file__) and not path.match("tests/core/*") and str(path.relative_to(ROOT)) not in without
        for number, line in enumerate(text.splitlines(), 1)
        if regex.search(line)
    ]


def test_no_path_of_this_machine() -> None:
    assert (
        lines_with(r"(?<![\w.}$)/-])/(work|opt|root|home/\w+)/(?!airflow|orrery|spark|ml/checkpoints|\.config/pip)")
        == []
    )


def test_no_package_index() -> None:
    assert lines_with(r"(?i)--(extra-)?index-url\s*[= ]\s*\S*://|--find-links\s*[= ]\s*\S*://|https?://[^\s\"']*/simple\b|https?://(\w+\.)*(pypi\.org|pythonhosted\.org|pytorch\.org/whl)") == []  # fmt: skip


def test_no_latest_image() -> None:
    """Where `:latest` is spoken of, it is to refuse it."""
    found = lines_with(r"[\w}]:latest\b")
    assert found == []


def test_no_secret() -> None:
    assert (
        lines_with(
            r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|[Aa][Ww][Ss]_\w*[Kk][Ee][Yy]\s*[=:]\s*['\"]?[A-Za-z0-9/+]{40}"
        )
        == []
    )


def test_no_merge_marker_and_no_stray_debugging() -> None:
    assert lines_with(r"^(<{7} |>{7} |={7}$)") == []
    assert lines_with(r"^\s*(breakpoint\(\)|import i?pdb)") == []


# -- documentation -----------------------------------------------------------------------------------


def test_every_module_and_public_name_of_the_engine_has_a_docstring() -> None:
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        name = str(path.relative_to(PACKAGE))
        if ast.get_docstring(tree) is None:
            missing.append(name)
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            overload = any("overload" in ast.unparse(d) for d in node.decorator_list)
            if ast.get_docstring(node) is None and not overload:
                missing.append(f"{name}:{node.lineno} {node.name}")
    assert missing == []


def dags() -> list[Path]:
    return sorted((ROOT / "dags").glob("*.py"))


@pytest.mark.parametrize("path", dags(), ids=lambda p: p.stem)
def test_every_dag_has_an_owner_and_a_runbook(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None
    assert re.search(r"\bowner\b|^Owner:", text, re.IGNORECASE | re.MULTILINE), "the docstring names no owner"
    assert len(text.splitlines()) >= 5, "the docstring is no runbook"
    assert "|" in text or "- " in text, "the runbook has neither table nor list"


def test_a_dag_file_is_thin_and_belongs_to_a_project_or_the_house() -> None:
    projects = {p.parent.name for p in (ROOT / "include" / "projects").glob("*/spec.yaml")}
    assert projects
    for path in dags():
        assert path.stem in projects | {"housekeeping"}, path
        code = [n for n in ast.parse(path.read_text()).body if not isinstance(n, (ast.Import, ast.ImportFrom))]
        assert len(code) <= 3, f"{path} does more than declare"


def test_every_project_has_an_owner_and_a_readme() -> None:
    from orrery import spec

    folders = [p.parent for p in (ROOT / "include" / "projects").glob("*/spec.yaml")]
    for folder in folders:
        assert spec.load(folder).owner
        readme = folder / "README.md"
        assert readme.is_file(), f"{readme} is missing"
        assert len(readme.read_text().split()) > 20, f"{readme} says nothing"


def test_the_make_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "help"} <= targets
    named: dict[str, str] = {}
    for path, text in texts().items():
        if path.suffix not in (".md", ".py", ".sh", ".yaml", ".yml", ".txt") or path == Path(__file__):
            continue
        for target in re.findall(r"`make ([a-z][a-z-]*)", text):
            named[target] = str(path.relative_to(ROOT))
    assert {t: where for t, where in named.items() if t not in targets} == {}
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == targets


def test_every_test_folder_is_run_in_one_environment() -> None:
    spec = importlib.util.spec_from_file_location("orrery_tests_run", ROOT / "tests" / "run.py")
    assert spec is not None and spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    listed = [folder for folders in run.FOLDERS.values() for folder in folders]
    assert len(set(listed)) == len(listed)
    there = {str(p.parent.relative_to(ROOT / "tests")) for p in (ROOT / "tests").rglob("test_*.py")}
    assert {t for t in there if t not in listed and t.split("/")[0] not in listed} == set()
    assert set(run.ENVIRONMENT) == set(run.FOLDERS)


def test_no_two_tests_of_one_run_have_the_same_file_name() -> None:
    """Without packages, pytest imports a test by its bare name: two alike cannot run together."""
    files = (p for p in (ROOT / "tests").rglob("*.py") if not (p.parent / "spec.yaml").exists())  # no project's files
    names = [p.name for p in files if p.name != "conftest.py"]
    assert {n for n in names if names.count(n) > 1} - {"run.py"} == set()
