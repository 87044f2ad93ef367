"""The scores of a partition beside the labels that have come since, joined by key.

The columns that are needed are read, and no others; a key costs its text once. Ten million rows of a twenty-letter key
take about a gigabyte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orrery.data import tables
from orrery.data.tables import KEY, LABEL, PREDICTION_TIME
from orrery.training import labels

PREDICTION = "prediction"


@dataclass(frozen=True)
class Joined:
    """`table`: the scored rows that have a prediction and a label. Everything else is counted.

    `predictions` are of all scored rows, null where the model gave none. `gone`: scored rows that the features no
    longer have (the partition landed again without them); `unscored`: rows of the features that were never scored.
    """

    table: pa.Table
    predictions: pa.ChunkedArray
    scored: int
    labelled: int
    gone: int
    unscored: int
    unpredicted: int

    @property
    def share_labelled(self) -> float:
        """Share of the scored rows that have a label; 0 when nothing was scored."""
        return self.labelled / self.scored if self.scored else 0.0


def read(scores: Sequence[Path], features: Path, columns: Sequence[str], share: float = 1.0) -> Joined:
    """Join the scores' parts with the features' label, time and `columns` (those that are there).

    `share` samples by key, as scores of a sample are.
    """
    parts = [tables.read_parquet(f, [KEY, PREDICTION]) for f in scores]
    scored = tables.sample(pa.concat_tables(parts, promote_options="permissive"), share)
    there = pq.read_schema(features).names
    wanted = [KEY, PREDICTION_TIME, LABEL, *(c for c in columns if c in there)]
    known = tables.sample(tables.read_parquet(features, list(dict.fromkeys(wanted))), share)
    place = pc.index_in(scored[KEY].cast(pa.string()), value_set=known[KEY].cast(pa.string()).combine_chunks())
    found = pc.is_valid(place)
    rows = known.drop_columns([KEY]).take(place.filter(found))
    rows = rows.append_column(PREDICTION, scored[PREDICTION].filter(found))
    has_label, has_prediction = labels.is_known(rows[LABEL]), pc.is_valid(rows[PREDICTION])
    return Joined(
        table=rows.filter(pc.and_(has_label, has_prediction)),
        predictions=scored[PREDICTION],
        scored=scored.num_rows,
        labelled=_true(has_label),
        gone=scored.num_rows - rows.num_rows,
        unscored=known.num_rows - rows.num_rows,
        unpredicted=scored[PREDICTION].null_count,
    )


def _true(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)
