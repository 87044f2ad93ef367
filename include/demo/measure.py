"""How good were the scores, now that the labels are known? Prints one JSON document (run in the `ml` environment).

python include/demo/measure.py PROJECT PARTITION
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.compute as pc

import orrery
from orrery import platform
from orrery.evaluation.metrics import auc
from orrery.ledger import Ledger
from orrery.store import Store
from orrery.training.schema import Schema


def main(project: str, partition: str) -> None:
    """Compare the committed scores with the labels, and the baseline on the same rows."""
    features = orrery.load(project, partition)
    scores = orrery.load(project, partition, "scores")
    joined = features.join(scores.select(["key", "prediction"]), "key", join_type="inner")
    known = joined.filter(pc.is_valid(joined["label"]))
    label = np.asarray(known["label"].to_numpy(), dtype=np.float64)
    store = Store(platform.load().store)
    scored = store.latest_manifest(project, "scores", partition)
    assert scored is not None
    used = scored.inputs["model"][0].path
    version = next(v for v, path in Ledger(platform.load().ledger).versions(project).items() if path == used)
    model = store.manifest(used)
    assert model is not None
    with tempfile.TemporaryDirectory() as scratch:
        schema = Schema.model_validate_json(store.read(model.uri("schema.json")))
        session = onnxruntime.InferenceSession(store.local(model.uri("baseline.onnx"), Path(scratch)))
        baseline = session.run(["prediction"], schema.feed(known))[0]
    out = {
        "partition": partition,
        "rows": features.num_rows,
        "rows_scored": scores.num_rows,
        "rows_with_label": known.num_rows,
        "model_version": version,
        "auc": auc(label, np.asarray(known["prediction"].to_numpy(), dtype=np.float64)),
        "baseline_auc": auc(label, np.asarray(baseline, dtype=np.float64)),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
