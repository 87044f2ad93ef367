"""Families of column types, as `type:` in a spec's checks names them."""

from __future__ import annotations

import pyarrow as pa


def families(kind: pa.DataType) -> frozenset[str]:
    """Return the families a type belongs to: an integer is a number as well, a date is a timestamp."""
    is_ = pa.types
    if is_.is_integer(kind):
        return frozenset({"integer", "number"})
    if is_.is_floating(kind) or is_.is_decimal(kind):
        return frozenset({"number"})
    if is_.is_string(kind) or is_.is_large_string(kind):
        return frozenset({"string"})
    if is_.is_timestamp(kind) or is_.is_date(kind):
        return frozenset({"timestamp"})
    return frozenset({"boolean"}) if is_.is_boolean(kind) else frozenset()
