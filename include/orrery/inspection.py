"""Import a project's features.py and model.py and print, as JSON, what they declare (run in the `ml` environment).

python -m orrery.inspection FOLDER PROJECT PARAMS

PARAMS is `train.params` of the spec, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from orrery.errors import OrreryError


def main(folder: str, project: str, params: str) -> None:
    """Print one JSON document: what is declared, or the error."""
    from orrery.features.inspection import inspect_features
    from orrery.training.inspection import inspect_model

    try:
        answer: dict[str, Any] = {
            "features": inspect_features(Path(folder), project),
            "model": inspect_model(Path(folder), project, json.loads(params)),
        }
    except OrreryError as e:
        answer = {"error": e.message, "hint": e.hint}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
