"""Each test its own house (`core_house`), and the verb `probe` in the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import core_verbs
import pytest
from core_house import House, build, environment

from orrery.contract import VERBS


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    made = build(tmp_path / "home")
    for name in ("ORRERY_PROFILE", "ORRERY_STAGE", "ORRERY_MLFLOW", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(made).items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture(autouse=True)
def _verbs() -> Iterator[None]:
    before = dict(VERBS)
    core_verbs.register()
    yield
    VERBS.clear()
    VERBS.update(before)
