"""A Great Expectations expectation that it lacks: the rarest value of a column has at least some share.

Imported by `gx.load` after Great Expectations; importing it registers metric and expectation.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyarrow as pa
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import ColumnAggregateExpectation
from great_expectations.expectations.metrics.column_aggregate_metric_provider import (
    ColumnAggregateMetricProvider,
    column_aggregate_value,
)

from orrery.data.rules import smallest_class

METRIC = "column.smallest_class_share"


class ColumnSmallestClassShare(ColumnAggregateMetricProvider):  # type: ignore[misc]
    """The share of the rarest value among those that are not missing."""

    metric_name = METRIC

    @column_aggregate_value(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, column: Any, **kwargs: Any) -> float:
        return smallest_class(pa.chunked_array([pa.array(column.dropna(), from_pandas=True)]))[0]


class ExpectColumnSmallestClassShareToBeAtLeast(ColumnAggregateExpectation):  # type: ignore[misc]
    """Expect the rarest value of a column to have at least a given share of the values."""

    min_value: float
    max_value: float | None = None

    metric_dependencies = (METRIC,)
    success_keys = ("min_value", "max_value")
    library_metadata: ClassVar[dict[str, Any]] = {"maturity": "production", "tags": [], "contributors": []}

    def _validate(
        self, metrics: dict[str, Any], runtime_configuration: Any = None, execution_engine: Any = None
    ) -> dict[str, Any]:
        return dict(
            self._validate_metric_value_between(
                metric_name=METRIC,
                metrics=metrics,
                runtime_configuration=runtime_configuration,
                execution_engine=execution_engine,
            )
        )
