"""What `orrery check` tells of a features.py, without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orrery.features.definitions import load


def inspect_features(project_folder: Path, project: str) -> dict[str, Any]:
    """Return what features.py declares, as small JSON: rows, views and derives. Raises `SpecError`."""
    found = load(project_folder, project)
    return {
        "rows": found.rows.source,
        "views": [{"name": v.name, "on": list(v.on), "ttl": v.ttl, "source": v.source} for v in found.views],
        "derives": [d.name for d in found.derives],
    }
