"""Make a store with two real generations, in the environment `rag`: `python reindexed.py FOLDER`.

The documents are collected, cut, embedded (by the tiny embedder of tests/rag, exported to ONNX), indexed, evaluated and
promoted by the real steps. Prints what live.json said after each, the older one first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    "guides/dome.md": "# Dome\n\n## Wind\n\nThe dome closes by itself when the wind is above 60 km/h. It opens by hand.\n",
    "guides/camera.md": "# Camera\n\n## Cooling\n\nThe camera is cooled to -20 degrees before the first exposure.\n",
    "guides/flats.html": "<h1>Flats</h1><p>Flat fields are taken at dusk.</p><script>alert(1)</script>",
    "team/safe.md": "# Safe\n\nThe key of the mirror cell is in the blue safe.\n",
}
CHANGED = {
    "guides/dome.md": DOCUMENTS["guides/dome.md"].replace("60", "55"),
    "guides/new.md": "# New\n\nA comet is near.\n",
}


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["PYTHONWARNINGS"] = "ignore"
    sys.path.insert(0, str(ROOT / "tests" / "rag"))
    import rag_house
    import tiny_embedder

    patch = pytest.MonkeyPatch()
    model = tiny_embedder.write(folder / "tiny")
    house = rag_house.make(folder, patch, DOCUMENTS, embedder={"model": str(model)})
    made = []
    for day, documents in (("2026-01-05", {}), ("2026-01-06", CHANGED)):
        for name, content in documents.items():
            house.document(name, content)
        house.reindex(day, run=f"run-{day}", until="promote")
        made.append(json.loads(house.store.read(f"{rag_house.PROJECT}/live.json")))
    sys.stdout.write("\n" + json.dumps({"store": house.store.uri, "live": made}) + "\n")


if __name__ == "__main__":
    main()
