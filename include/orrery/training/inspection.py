"""What `orrery check` tells of a model.py, without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from orrery.training.user_model import load


def inspect_model(folder: Path, project: str) -> dict[str, Any]:
    """Return what model.py declares, as small JSON. Raises `SpecError`.

    {"kind": "build" or "fit", "params": {name: {"default": value, "tunable": bounds or None}}}
    """
    model = load(folder, project)
    params = {}
    for name, field in model.params.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        params[name] = {"default": to_jsonable_python(default), "tunable": extra.get("tunable")}
    return {"kind": model.kind, "params": params}
