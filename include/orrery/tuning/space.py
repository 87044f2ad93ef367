"""What a search varies: the fields of model.py's Params that are declared `tunable`, less those that the spec fixes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from orrery.errors import SpecError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Dimension:
    """One parameter: an interval (both ends included), or choices. `whole`: only whole numbers."""

    name: str
    default: Any
    low: float | None
    high: float | None
    log: bool
    choices: tuple[Any, ...] | None
    whole: bool

    def holds(self, value: Any) -> bool:
        """Tell whether a value lies within."""
        if self.choices is not None:
            return value in self.choices
        number = isinstance(value, int | float) and not isinstance(value, bool)
        assert self.low is not None and self.high is not None
        return number and self.low <= value <= self.high and (not self.whole or float(value).is_integer())


@dataclass(frozen=True)
class Space:
    """All dimensions, in the order of their fields."""

    dimensions: tuple[Dimension, ...]

    @property
    def defaults(self) -> dict[str, Any]:
        """model.py's own values."""
        return {d.name: d.default for d in self.dimensions}

    def within(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return another model's parameters as a point of this space; what is not in it stays at the default."""
        kept = {d.name: values[d.name] for d in self.dimensions if d.name in values and d.holds(values[d.name])}
        return {**self.defaults, **kept}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the space as Optuna knows it. A choice is its JSON text: a storage holds text, whatever it is."""
        from optuna import distributions as kinds

        found: dict[str, BaseDistribution] = {}
        for d in self.dimensions:
            if d.choices is not None:
                found[d.name] = kinds.CategoricalDistribution([json.dumps(c) for c in d.choices])
                continue
            assert d.low is not None and d.high is not None
            if d.whole:
                found[d.name] = kinds.IntDistribution(int(d.low), int(d.high), log=d.log)
            else:
                found[d.name] = kinds.FloatDistribution(float(d.low), float(d.high), log=d.log)
        return found

    def to_optuna(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a point as Optuna keeps it."""
        kinds = {d.name: d for d in self.dimensions}
        return {n: json.dumps(v) if kinds[n].choices is not None else v for n, v in values.items()}

    def from_optuna(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a point as model.py's Params takes it."""
        kinds = {d.name: d for d in self.dimensions}
        return {n: json.loads(v) if kinds[n].choices is not None else v for n, v in values.items()}


def space(params: type[BaseModel], fixed: Mapping[str, Any]) -> Space:
    """Return what may be searched. Raises `SpecError` when nothing is left.

    `fixed` is the spec's `train.params`: what a person has set there is not searched.
    """
    declared = [(n, f) for n, f in params.model_fields.items() if _bounds(f.json_schema_extra) is not None]
    dimensions = []
    for name, field in declared:
        bounds = _bounds(field.json_schema_extra)
        if name in fixed or bounds is None:
            continue
        choices, default = bounds["choices"], field.default
        dimensions.append(
            Dimension(
                name=name,
                default=default,
                low=bounds["low"],
                high=bounds["high"],
                log=bool(bounds["log"]),
                choices=None if choices is None else tuple(choices),
                whole=field.annotation is int,
            )
        )
    if not dimensions:
        pinned = ", ".join(name for name, _ in declared)
        raise SpecError(
            f"there is nothing to tune: train.params fixes {pinned}"
            if pinned
            else "there is nothing to tune: model.py's Params has no field that is `tunable`",
            hint="class Params(BaseModel): dim: int = tunable(16, low=4, high=64)",
        )
    return Space(tuple(dimensions))


def _bounds(extra: Any) -> dict[str, Any] | None:
    found = extra.get("tunable") if isinstance(extra, dict) else None
    return found if isinstance(found, dict) else None
