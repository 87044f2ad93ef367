"""What `orrery check` tells of a model.py, without data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from orrery.training.user_model import load, values


def inspect_model(folder: Path, project: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return what model.py declares, as small JSON. Raises `SpecError`, as a training with these overrides would.

    {"kind": "build" or "fit", "params": {name: {"value": what training uses, "tunable": bounds or None}}}
    """
    model = load(folder, project)
    effective, params = values(model, overrides), {}
    for name, field in model.params.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        params[name] = {
            "value": to_jsonable_python(getattr(effective, name), fallback=repr),
            "tunable": extra.get("tunable"),
        }
    return {"kind": model.kind, "params": params}
