"""docker/venv.py makes environments: when anew, when not at all, and with which of pip's settings. No network."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from core_house import ROOT

# Stands in for uv: notes its arguments and index settings, makes a Python for `venv`, and may be killed half-way.
UV = """\
#!{python}
import json, os, sys
from pathlib import Path
here, argv = Path(__file__).parent, sys.argv[1:]
index = {{k: v for k, v in os.environ.items() if k.startswith("UV_")}}
with (here / "calls").open("a") as f:
    f.write(json.dumps([argv, index]) + "\\n")
if argv[0] == "venv":
    home = Path(argv[-1])
    if home.exists() and "--clear" not in argv:
        sys.exit("a folder is there already")
    (home / "bin").mkdir(parents=True, exist_ok=True)
    if (here / "killed").exists():
        os.kill(os.getpid(), 9)
    (home / "bin" / "python").unlink(missing_ok=True)
    (home / "bin" / "python").symlink_to(sys.executable)
    (home / "pyvenv.cfg").write_text("home = x")
if argv[:2] == ["pip", "install"] and (here / "no-network").exists():
    sys.exit("error: could not connect")
"""


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a project, environments and a uv of the test's own."""
    spec = importlib.util.spec_from_file_location("orrery_docker_venv", ROOT / "docker" / "venv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for file in ("docker/ml/requirements.txt", "tests/requirements.txt", "tests/dev.txt", "pyproject.toml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("numpy==2.0\n")
    tools = tmp_path / ".venvs" / "tools"
    (tools / "bin").mkdir(parents=True)
    (tools / ".uv-version").write_text(module.UV_VERSION)
    (tools / "bin" / "uv").write_text(UV.format(python=sys.executable))
    (tools / "bin" / "uv").chmod(0o755)
    for name in [n for n in os.environ if n.startswith(("UV_", "PIP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENVS", tmp_path / ".venvs")
    return module


def make(venv: ModuleType, *argv: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run the script; return the calls of uv that it took."""
    monkeypatch.setattr(sys, "argv", ["venv.py", *argv])
    notes = venv.VENVS / "tools" / "bin" / "calls"
    notes.unlink(missing_ok=True)
    assert venv.main() == 0
    return [json.loads(line)[0] for line in notes.read_text().splitlines()] if notes.exists() else []


def test_an_environment_is_made_once_and_anew_when_its_pins_change(
    venv: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, installed = make(venv, "ml", monkeypatch=monkeypatch)
    assert made[0] == "venv"
    assert "--exact" in installed  # a pin that is dropped leaves the environment
    assert [installed[i + 1] for i, a in enumerate(installed) if a in ("-r", "-e")] == [
        str(venv.ROOT / "docker/ml/requirements.txt"),
        str(venv.ROOT),
    ]
    assert make(venv, "ml", monkeypatch=monkeypatch) == []
    (venv.ROOT / "docker/ml/requirements.txt").write_text("numpy==2.1\n")
    (again,) = make(venv, "ml", monkeypatch=monkeypatch)
    assert again[:2] == ["pip", "install"]


def test_the_tests_needs_go_in_by_the_same_call(venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact means that a second call would remove what the first one brought."""
    make(venv, "ml", monkeypatch=monkeypatch)
    (installed,) = make(venv, "--test", "ml", "dev", monkeypatch=monkeypatch)[:1]
    assert installed.count("-r") == 2
    assert "-e" in installed
    assert make(venv, "ml", monkeypatch=monkeypatch) == []
    assert make(venv, "--test", "ml", "dev", monkeypatch=monkeypatch) == []


def test_killed_half_way_it_is_made_anew(venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = venv.VENVS / "tools" / "bin" / "killed"
    killed.touch()
    with pytest.raises(venv.Failed, match="making environment ml: uv ended with -9"):
        make(venv, "ml", monkeypatch=monkeypatch)
    assert (venv.VENVS / "ml").is_dir()
    killed.unlink()
    assert [c[0] for c in make(venv, "ml", monkeypatch=monkeypatch)] == ["venv", "pip"]
    # The system's Python has moved.
    python = venv.VENVS / "ml" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3.11")
    assert [c[0] for c in make(venv, "ml", monkeypatch=monkeypatch)] == ["venv", "pip"]
    assert make(venv, "ml", monkeypatch=monkeypatch) == []


def test_a_failed_refresh_is_tried_again(venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make(venv, "ml", monkeypatch=monkeypatch)
    (venv.ROOT / "docker/ml/requirements.txt").write_text("numpy==2.1\n")
    (venv.VENVS / "tools" / "bin" / "no-network").touch()
    with pytest.raises(venv.Failed, match="installing environment ml: uv ended with 1\n.*is there a network"):
        make(venv, "ml", monkeypatch=monkeypatch)
    (venv.VENVS / "tools" / "bin" / "no-network").unlink()
    (venv.ROOT / "docker/ml/requirements.txt").write_text("numpy==2.0\n")  # as it was, but what is installed?
    assert len(make(venv, "ml", monkeypatch=monkeypatch)) == 1


def test_pips_settings_reach_uv(venv: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not {"UV_INDEX", "UV_INDEX_STRATEGY", "UV_DEFAULT_INDEX"} & set(venv.uv_environment())
    (tmp_path / "simple").mkdir()
    there, gone = f"file://{tmp_path}/simple", f"file://{tmp_path}/none"
    monkeypatch.setenv("PIP_INDEX_URL", "https://a.example.org/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"https://b.example.org/simple {gone}\n{there}")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    env = venv.uv_environment()
    assert env["UV_DEFAULT_INDEX"] == "https://a.example.org/simple"
    assert env["UV_INDEX"] == f"https://b.example.org/simple {there}"
    assert env["UV_INDEX_STRATEGY"] == "unsafe-best-match"  # what pip does with an extra index
    assert env["UV_FIND_LINKS"] == "/wheels,/more"
    monkeypatch.setenv("UV_INDEX", "https://mine.example.org")
    assert venv.uv_environment()["UV_INDEX"] == "https://mine.example.org"


@pytest.mark.parametrize(
    ("fake", "told"),
    [
        ("import sys; sys.exit('ensurepip is not available' if 'venv' in sys.argv else 0)", "needs venv and ensurepip"),
        ("import os, sys; 'venv' in sys.argv and os.makedirs(sys.argv[-1] + '/bin')", "fetching uv"),
    ],
)
def test_no_pip_and_no_network_end_in_a_clear_line(tmp_path: Path, fake: str, told: str) -> None:
    """As a fresh machine has it: nothing is there yet. The Python is a stand-in that cannot do what is asked."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{fake}" "$@"\n')
    python.chmod(0o755)
    code = f"import sys, runpy; sys.argv[1:] = ['ml']; sys.executable = {str(python)!r}; runpy.run_path({str(ROOT / 'docker/venv.py')!r}, run_name='__main__')"
    env = {**os.environ, "ORRERY_VENVS": str(tmp_path / "venvs")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
