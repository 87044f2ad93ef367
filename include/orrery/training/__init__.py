"""What a project's model.py imports: `tunable`, and the types that `fit` is given and returns. Nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

    from orrery.training.schema import Schema

__all__ = ["Dataset", "OnnxExportable", "tunable"]


def tunable(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    choices: Sequence[Any] | None = None,
) -> Any:
    """Declare a parameter of `Params` that training uses and tuning may vary.

    Give `low` and `high` (both included; `log` searches orders of magnitude alike), or `choices`. The bounds
    are the search's: a value set by hand may lie outside. Raises `ValueError` for bounds that cannot be.
    """
    if choices is not None:
        if low is not None or high is not None or log:
            raise ValueError("tunable: give `choices`, or `low` and `high`")
        if default not in choices:
            raise ValueError(f"tunable: the default {default!r} is not among the choices {list(choices)!r}")
    else:
        if low is None or high is None:
            raise ValueError("tunable: give `low` and `high`, or `choices`")
        if not low <= default <= high or low == high:
            raise ValueError(
                f"tunable: the default {default!r} must lie in low={low!r} .. high={high!r}, low below high"
            )
        if log and low <= 0:
            raise ValueError(f"tunable: `log` needs low above 0, got {low!r}")
    bounds: Any = {"low": low, "high": high, "log": log, "choices": None if choices is None else list(choices)}
    return Field(default, json_schema_extra={"tunable": bounds})


@dataclass(frozen=True)
class Dataset:
    """What `fit` is given: N rows as the export will see them, and the truth.

    numeric      float32 [N, len(schema.numeric)], NaN where missing
    categorical  int64   [N, len(schema.categorical)], ids; 0 is unknown or missing
    label        float32 [N] (binary: 0 or 1; regression: the value), int64 [N] (multiclass: index in schema.classes)
    """

    numeric: npt.NDArray[np.float32]
    categorical: npt.NDArray[np.int64]
    label: npt.NDArray[np.float32] | npt.NDArray[np.int64]
    schema: Schema

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.label)


class OnnxExportable(Protocol):
    """What `fit` returns: any model that can write itself as an ONNX graph with the signature of `schema`."""

    def to_onnx(self) -> bytes | onnx.ModelProto: ...
