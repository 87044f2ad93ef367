"""A few real rows through a model before an alias moves: the last moment at which a bad model costs nothing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orrery.data import tables
from orrery.errors import DataError, UserError
from orrery.evaluation.exported import Exported
from orrery.evaluation.metrics import Array
from orrery.step import Work
from orrery.store import Manifest

ROWS = 64
# What float32 sums differ by between two machines; a different model differs by far more.
TOLERANCE = 1e-5


def recorded(work: Work, features: list[Manifest], evaluation: Manifest) -> tuple[pa.Table, Array]:
    """Return up to `ROWS` rows of the last features, and what the evaluation recorded of the candidate for them."""
    predictions = tables.read_parquet(work.open_input(evaluation, "predictions.parquet"), [tables.KEY, "candidate"])
    for manifest in reversed(features):
        rows = tables.read_parquet(work.open_input(manifest, "features.parquet"))
        place = pc.index_in(rows[tables.KEY], value_set=predictions[tables.KEY].combine_chunks())
        kept = np.flatnonzero(pc.is_valid(place).to_numpy(zero_copy_only=False))[-ROWS:]
        if len(kept):
            wanted = predictions["candidate"].take(place.take(pa.array(kept)))
            return rows.take(pa.array(kept)), np.asarray(wanted.to_pylist(), dtype=np.float64)
    raise UserError(
        f"no row of {evaluation.path} is in the features it was made from", hint="run the release again from evaluate"
    )


def compare(model: Exported, rows: pa.Table, wanted: Array) -> float:
    """Return the largest difference. Raises `UserError` when it is above the tolerance, `DataError` for NaN."""
    found = model.predict(rows)
    scale = max(1.0, float(np.abs(wanted).max()))
    worst = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
    if not worst <= TOLERANCE * scale:
        raise UserError(
            f"{model.name} is not the model that was evaluated: {len(wanted)} rows differ by up to {worst:.3g} "
            f"(allowed {TOLERANCE * scale:.1g})",
            hint="nothing was promoted; the files of this version were changed in MLflow's artifact store",
        )
    return worst


def sound(work: Work, model: Exported, features: Manifest) -> int:
    """Score the first rows of some features; return how many. Raises `DataError` for NaN, a wrong shape or no rows."""
    rows = tables.read_parquet(work.open_input(features, "features.parquet")).slice(0, ROWS)
    if not rows.num_rows:
        raise DataError(f"{features.path} has no rows to try {model.name} on", hint="materialize a later partition")
    return len(model.predict(rows))
