"""How one feature list differs from another; what `orrery check` shows."""

from __future__ import annotations

from collections.abc import Mapping


def diff(old_schema: Mapping[str, str], new_schema: Mapping[str, str]) -> list[str]:
    """Return one line per feature that was added, removed, or changed its type; schemas as in schema.json."""
    lines = [f"+ {name}: {new_schema[name]}" for name in sorted(set(new_schema) - set(old_schema))]
    lines += [f"- {name}: {old_schema[name]}" for name in sorted(set(old_schema) - set(new_schema))]
    for name in sorted(set(old_schema) & set(new_schema)):
        if old_schema[name] != new_schema[name]:
            lines.append(f"~ {name}: {old_schema[name]} -> {new_schema[name]}")
    return lines
