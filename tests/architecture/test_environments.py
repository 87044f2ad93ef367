"""One environment = pyproject extra = docker/<env>/ = key in platform.yaml, and its pins keep what pyproject asks."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ENVIRONMENTS = sorted(PROJECT["optional-dependencies"])
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))


def pins(file: Path) -> dict[str, Version]:
    """Return name and version of every line; each must pin exactly."""
    found: dict[str, Version] = {}
    for line in file.read_text().splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        requirement = Requirement(line.partition(" #")[0])
        (one,) = requirement.specifier
        assert one.operator == "==", f"{file}: {line}"
        if requirement.marker is None or requirement.marker.evaluate():
            found[canonicalize_name(requirement.name)] = Version(one.version)
    return found


def test_extras_folders_and_platform_keys_are_the_same() -> None:
    folders = sorted(p.parent.name for p in (ROOT / "docker").glob("*/requirements.txt"))
    platform = yaml.safe_load((ROOT / "include" / "platform.yaml").read_text())
    assert folders == ENVIRONMENTS
    assert sorted(platform["environments"]) == ENVIRONMENTS


def test_every_environment_is_made_by_make_and_named_by_a_verb() -> None:
    from orrery.catalogue import CATALOGUE

    named = {verb.environment for verbs in CATALOGUE.values() for verb in verbs.values()}
    assert named <= set(ENVIRONMENTS)
    made = re.search(r"^environments:.*\n\t.*venv\.py (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert made is not None
    assert named | {"airflow"} <= set(made[1].split())


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_each_direct_requirement_is_pinned_to_what_it_asks_for(environment: str) -> None:
    pinned = pins(ROOT / "docker" / environment / "requirements.txt")
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][environment]]
    for text in asked:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name == "torch":  # its build (CPU or CUDA) follows the machine: `docker/venv.py`
            assert name not in pinned or pinned[name] in requirement.specifier
            continue
        assert name in pinned, f"{environment}: {text} is not in requirements.txt (make lock)"
        assert pinned[name] in requirement.specifier, f"{environment}: {text}, pinned is {pinned[name]}"


def test_the_environment_that_runs_this_holds_its_pins() -> None:
    """A venv that was made from other pins would test something else than what ships."""
    pinned = pins(ROOT / "docker" / "airflow" / "requirements.txt")
    if Path(sys.prefix).name != "airflow":
        pytest.skip("not the airflow environment")
    wrong = {n: metadata.version(n) for n, v in pinned.items() if Version(metadata.version(n)) != v}
    assert wrong == {}


def test_no_requirements_name_an_index() -> None:
    for file in [
        *(ROOT / "docker").glob("*/requirements.txt"),
        *(ROOT / "tests").glob("**/*.txt"),
        *ROOT.glob("include/demo/*.txt"),
    ]:
        for line in file.read_text().splitlines():
            assert not line.startswith(("-", "git+", "http:", "https:")), f"{file}: {line}"
            assert "://" not in line, f"{file}: {line}"
