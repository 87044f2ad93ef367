"""Split a table by its rules: the rows that stay, and the rows that are set aside with their reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from orrery.data.rules import Outcome

REASONS = "_reasons"


@dataclass(frozen=True)
class Split:
    """Every row of a table is in one of the two, in its old order; `counts` tells how often each reason was given."""

    clean: pa.Table
    quarantined: pa.Table
    counts: dict[str, int]


def split(table: pa.Table, outcomes: Sequence[Outcome]) -> Split:
    """Set aside the rows that break a rule of severity `error`; `_reasons` lists all the rules each one breaks."""
    active = [o for o in outcomes if o.quarantines and o.bad]
    bad = np.zeros(table.num_rows, dtype=np.bool_)
    for outcome in active:
        assert outcome.mask is not None
        bad |= outcome.mask
    aside = np.flatnonzero(bad)
    reasons = [[o.rule.name for o in active if o.mask is not None and o.mask[i]] for i in aside]
    quarantined = table.take(pa.array(aside)).append_column(REASONS, pa.array(reasons, pa.list_(pa.string())))
    clean = table.filter(pa.array(~bad))
    # The law of this room: a row is kept or set aside, and never lost.
    assert clean.num_rows + quarantined.num_rows == table.num_rows
    return Split(clean, quarantined, dict(sorted(Counter(r for row in reasons for r in row).items())))
