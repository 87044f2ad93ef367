"""What a search varies, and what a person has fixed."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from orrery.errors import SpecError
from orrery.training import tunable
from orrery.tuning.space import space


class Params(BaseModel):
    """One of each kind."""

    dim: int = tunable(8, low=4, high=32, log=True)
    rate: float = tunable(1, low=0.1, high=10)
    sizes: tuple[int, ...] = tunable((8, 4), choices=[(8, 4), (16,)])
    name: str | None = tunable(None, choices=[None, "a"])
    epochs: int = 3


def test_only_what_is_tunable_and_not_fixed_is_searched() -> None:
    found = space(Params, {"rate": 2.0, "epochs": 5})
    assert found.defaults == {"dim": 8, "sizes": (8, 4), "name": None}


def test_optuna_is_given_the_same_bounds_kinds_and_scales() -> None:
    kinds = space(Params, {}).distributions()
    dim, rate = kinds["dim"], kinds["rate"]
    assert (type(dim).__name__, dim.low, dim.high, dim.log) == ("IntDistribution", 4, 32, True)
    assert (type(rate).__name__, rate.low, rate.high, rate.log) == ("FloatDistribution", 0.1, 10.0, False)
    assert list(kinds["sizes"].choices) == ["[8, 4]", "[16]"]


def test_a_point_comes_back_as_params_takes_it() -> None:
    found = space(Params, {})
    point = {"dim": 16, "rate": 0.5, "sizes": (16,), "name": "a"}
    again = Params(**found.from_optuna(found.to_optuna(point)))
    assert again.model_dump(exclude={"epochs"}) == point


def test_another_model_s_parameters_count_as_far_as_they_lie_within() -> None:
    values = {"dim": 64, "rate": 0.5, "name": "b", "epochs": 9, "gone": 1}
    assert space(Params, {}).within(values) == {"dim": 8, "rate": 0.5, "sizes": (8, 4), "name": None}
    assert space(Params, {}).within({"dim": 16.5})["dim"] == 8
    assert space(Params, {}).within({"dim": True})["dim"] == 8


def test_nothing_to_search_is_told() -> None:
    class Plain(BaseModel):
        epochs: int = 3

    with pytest.raises(SpecError, match="no field that is `tunable`"):
        space(Plain, {})
    with pytest.raises(SpecError, match=r"train\.params fixes dim, rate, sizes, name"):
        space(Params, {"dim": 1, "rate": 1, "sizes": [16], "name": "a"})
