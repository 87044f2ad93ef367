"""The counts of Spark's tasks, merged, are those of Arrow."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from scoring_house import SCHEMA, features

from orrery.data import histograms


def test_counts_merged_by_spark_are_those_of_arrow(spark, tmp_path: Path):
    table, file = features(5_000), tmp_path / "features.parquet"
    pq.write_table(table, file, row_group_size=700)
    bins = histograms.bins_of_files([file], SCHEMA.numeric, SCHEMA.vocabularies)
    frame = spark.read.parquet(str(file)).select(*bins).repartition(3)
    handed = frame.mapInArrow(partial(histograms.count_batches, bins=bins), histograms.SPARK_SCHEMA).collect()
    assert len(handed) == 3
    assert histograms.merged((row["counts"] for row in handed), bins) == histograms.count_files([file], bins)
    assert histograms.count(table, bins).rows == 5_000
