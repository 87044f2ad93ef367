"""model.py read: what it has, what its Params take, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from orrery.errors import SpecError
from orrery.training import tunable
from orrery.training.inspection import inspect_model
from orrery.training.settings import Settings, from_params
from orrery.training.user_model import load, values

PARAMS = """
from pydantic import BaseModel
from orrery.training import tunable
from orrery.training.inspection import inspect_model
class Params(BaseModel):
    dim: int = tunable(16, low=8, high=64)
    kind: str = tunable("a", choices=["a", "b"])
    epochs: int = 3
"""


def project(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(text)
    return folder


def test_inspect_shows_kind_effective_values_and_bounds(tmp_path: Path) -> None:
    found = inspect_model(project(tmp_path, PARAMS + "def fit(train, valid, params): ...\n"), "shown", {"epochs": 5})
    assert found["kind"] == "fit"
    assert found["params"]["dim"] == {"value": 16, "tunable": {"low": 8, "high": 64, "log": False, "choices": None}}
    assert found["params"]["kind"]["tunable"]["choices"] == ["a", "b"]
    assert found["params"]["epochs"] == {"value": 5, "tunable": None}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "has neither `build` nor `fit`"),
        ("def build(schema, params): ...\ndef fit(train, valid, params): ...\n", "has both `build` and `fit`"),
        ("def build(schema): ...\n", r"build\(schema\) cannot be called as build\(schema, params\)"),
        ("Params = 3\ndef build(schema, params): ...\n", "Params is not a pydantic model"),
        ("import nothing_like_it\n", r"model.py:1: ModuleNotFoundError"),
    ],
)
def test_a_wrong_model_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        inspect_model(project(tmp_path, text), "wrong", {})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [({"epoks": 5}, r"train\.params\.epoks: .* no 'epoks'"), ({"dim": "x"}, r"train\.params\.dim: ")],
)
def test_inspect_refuses_what_training_would(tmp_path: Path, overrides: dict[str, object], says: str) -> None:
    folder = project(tmp_path, PARAMS + "def build(schema, params): ...\n")
    with pytest.raises(SpecError, match=says):
        inspect_model(folder, "refused", overrides)


def test_overrides_are_checked_by_params(tmp_path: Path) -> None:
    model = load(project(tmp_path, PARAMS + "def build(schema, params): ...\n"), "overridden")
    assert values(model, {"dim": 9}).model_dump() == {"dim": 9, "kind": "a", "epochs": 3}
    with pytest.raises(SpecError, match=r"no 'dims'.*\n.*did you mean 'dim'"):
        values(model, {"dims": 9})
    with pytest.raises(SpecError, match=r"train\.params\.dim: Input should be a valid integer.*got 'wide'"):
        values(model, {"dim": "wide"})


def test_a_model_without_params_takes_none(tmp_path: Path) -> None:
    model = load(project(tmp_path, "def build(schema, params): ...\n"), "bare")
    assert from_params(values(model, {}), 1) == Settings()
    with pytest.raises(SpecError, match="no 'dim'"):
        values(model, {"dim": 1})


def test_the_loop_takes_its_numbers_from_params_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    fields = "epochs: int = 7\n    batch_size: int = 1000\n    learning_rate: float = 0.5\n"
    text = f"from pydantic import BaseModel\nclass Params(BaseModel):\n    {fields}def build(schema, params): ...\n"
    model = load(project(tmp_path, text), "loop")
    assert from_params(values(model, {}), 2) == Settings(0.5, 0.01, 7, 1000, strategy="ddp")
    with pytest.raises(SpecError, match=r"batch_size 1000 \(global\) = processes 3 x 333.33 rows") as e:
        from_params(values(model, {}), 3)
    assert "999 or 1002" in e.value.hint
    with pytest.raises(SpecError, match=r"train\.params\.epochs is 0"):
        from_params(values(model, {"epochs": 0}), 1)
    with pytest.raises(SpecError, match=r"learning_rate -1\.0 must be above 0"):
        from_params(values(model, {"learning_rate": -1}), 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give `low` and `high`"),
        ({"low": 1, "high": 3, "choices": [5]}, "give `choices`, or"),
        ({"low": 6, "high": 9}, "must lie in"),
        ({"low": 0, "high": 9, "log": True}, "low above 0"),
        ({"choices": [1, 2]}, "not among the choices"),
    ],
)
def test_tunable_refuses_bounds_that_cannot_be(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tunable(5, **arguments)  # type: ignore[arg-type]
