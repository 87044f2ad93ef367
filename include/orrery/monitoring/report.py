"""`report`: Evidently's own drift report of a partition, to look at; what is decided rests on `monitor`'s counts.

    drift.json       Evidently's score per column (a distance, or a p-value when rows are few), and how many rows it saw
    evidently.html   evidence: the page, self-contained, with a sentence on the rows that it was drawn on

Evidently works on rows in memory, so it is given a sample of each side, the same on every run. The reference is the
training window of the model that scored; a prediction is there for those of its rows that the model was not fitted on.
"""

from __future__ import annotations

import html
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from orrery.contract import ReportParams, Result
from orrery.data import tables
from orrery.errors import DataError
from orrery.evaluation import exported, holdout
from orrery.evaluation.exported import Exported
from orrery.evaluation.reference import PREDICTION, prediction_table
from orrery.step import Work
from orrery.store import Manifest

# The button's text (orchestration.links) and the file's name.
LINK, PAGE = "Evidently report", "evidently.html"
# The page runs the scripts it contains and loads nothing; the same as its server says (orchestration.evidence), for
# whoever opens it from the store.
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; font-src data:\">"
)
# In a column of this name a feature would take the prediction's place.
OURS = "(prediction)"


def run(work: Work, params: ReportParams) -> Result:
    """Draw the report. Raises `DataError` when scores and features of the partition do not belong together."""
    model, scores = work.input("model"), work.input("scores")
    scored = exported.load(work.open_input, model, f"the model of {model.key}")
    before, of_before = _reference(work, scored, model, params)
    now, of_now = _current(work, scored, scores, params)
    counts = {"reference": [before.num_rows, of_before], "current": [now.num_rows, of_now]}
    told = _told(work.config.key, model.key, counts)
    if not before.num_rows or not now.num_rows:
        work.write_json("drift.json", {"rows": counts, "columns": {}})
        return Result(reasons=[f"no report: {told}"], metrics={"rows": 0.0}, facts={"rows": counts})
    columns = [c for c in before.column_names if _usable(before[c]) and _usable(now[c])]
    left_out = [c for c in before.column_names if c not in columns]
    if left_out:
        told += f" Left out, since one side has no value: {', '.join(left_out)}."
    page, scores_of = draw(before.select(columns), now.select(columns))
    work.write_json("drift.json", {"rows": counts, "columns": scores_of, "left_out": left_out})
    link = work.evidence(PAGE, with_sentence(page, told).encode())
    return Result(
        reasons=[told],
        metrics={"rows": float(now.num_rows), "columns": float(len(columns))},
        facts={"rows": counts},
        links={LINK: link},
    )


def _reference(work: Work, model: Exported, training: Manifest, params: ReportParams) -> tuple[pa.Table, int]:
    """Return the sample of the training window and its number of rows; prediction is null where it was fitted on."""
    files = [work.open_input(m, "features.parquet") for m in work.inputs("training")]
    wanted = [tables.KEY, tables.PREDICTION_TIME, *model.schema.columns]
    table, total = sample_rows(files, wanted, params.rows, params.seed)
    table = tables.sample(table, work.config.sample)
    start = json.loads(work.open_input(training, "split.json").read_bytes())["holdout_start"]
    later = holdout.not_before(table, start)
    values = model.predict(table)
    values[~later] = np.nan
    return _columns(table, values, model), total


def _current(work: Work, model: Exported, scores: Manifest, params: ReportParams) -> tuple[pa.Table, int]:
    """Return the sample of the partition with its scores, and its number of rows."""
    features = [work.open_input(m, "features.parquet") for m in work.inputs("features")]
    parts = [work.open_input(scores, n) for n in sorted(scores.files) if n.startswith("part-")]
    table, total = sample_rows(features, [tables.KEY, *model.schema.columns], params.rows, params.seed)
    # Scores are in the order of the features, so equal draws are the same rows.
    scored, same = sample_rows(parts, [tables.KEY, PREDICTION], params.rows, params.seed)
    if total != same or not table[tables.KEY].equals(scored[tables.KEY]):
        raise DataError(
            f"the scores of {work.config.key} are not those of its features", hint="run score for the partition again"
        )
    table = table.append_column(OURS, scored[PREDICTION])
    table = tables.sample(table, work.config.sample)
    return _columns(table, _values(table[OURS], len(model.schema.classes)), model), total


def _values(column: pa.ChunkedArray, classes: int) -> npt.NDArray[np.float64]:
    """Return predictions as float64 [N] or [N, classes], NaN where there is none."""
    width = [float("nan")] * classes if classes else float("nan")
    rows = [width if v is None else v for v in column.to_pylist()]
    return np.array(rows, np.float64).reshape((len(rows), classes) if classes else (len(rows),))


def _columns(table: pa.Table, predictions: npt.NDArray[np.float64], model: Exported) -> pa.Table:
    """Return what Evidently is given: the model's inputs as it knows them, and the prediction."""
    numeric, _ = model.schema.encode(table)
    made: dict[str, Any] = {n: pa.array(numeric[:, i], from_pandas=True) for i, n in enumerate(model.schema.numeric)}
    for name in model.schema.vocabularies:
        made[name] = table[name].cast(pa.string()).combine_chunks()
    predicted = prediction_table(predictions, model.schema.classes)[PREDICTION]
    if pa.types.is_dictionary(predicted.type):
        made[OURS] = predicted.cast(pa.string()).combine_chunks()
    else:
        made[OURS] = pa.array(predicted.to_numpy(), from_pandas=True)
    return pa.table(made)


def _usable(column: pa.ChunkedArray) -> bool:
    return bool(column.null_count < len(column))


def sample_rows(files: Sequence[Path], columns: list[str], rows: int, seed: int) -> tuple[pa.Table, int]:
    """Return `rows` rows of Parquet files (all, when there are fewer) in file order, and how many there are.

    Which rows depends on their number and the seed alone. In memory is one row group at a time.
    """
    sources = [pq.ParquetFile(f, memory_map=True) for f in files]
    total = sum(s.metadata.num_rows for s in sources)
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(total, rows, replace=False)) if total > rows else np.arange(total)
    parts, start = [], 0
    for source in sources:
        if not source.metadata.num_row_groups:
            parts.append(source.read(columns=columns))
        for group in range(source.metadata.num_row_groups):
            count = source.metadata.row_group(group).num_rows
            low, high = np.searchsorted(chosen, [start, start + count])
            part = source.read_row_group(group, columns=columns)
            parts.append(part.take(pa.array(chosen[low:high] - start)))
            start += count
    return pa.concat_tables(parts, promote_options="permissive"), total


def draw(reference: pa.Table, current: pa.Table) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return Evidently's page for two tables of the same columns, and its score, test and threshold per column."""
    os.environ["DO_NOT_TRACK"] = "1"  # read when it is imported: it would report usage to its maker
    texts = [f.name for f in reference.schema if pa.types.is_string(f.type)]
    numbers = [n for n in reference.column_names if n not in texts]
    with warnings.catch_warnings():
        # Of its own dependencies, and of constant columns: the page says what it makes of those.
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

        shape = DataDefinition(numerical_columns=numbers, categorical_columns=texts)
        sides = [Dataset.from_pandas(_frame(t, texts), data_definition=shape) for t in (reference, current)]
        made = Report([DataDriftPreset(columns=[*numbers, *texts])]).run(sides[1], sides[0])
        page = made.get_html_str(as_iframe=False)
    found = {}
    for metric in made.dict()["metrics"]:
        config = metric["config"]
        if "column" in config:
            score = float(metric["value"])
            found[config["column"]] = {"test": config["method"], "score": score if np.isfinite(score) else None}
    return page, found


def _frame(table: pa.Table, texts: list[str]) -> Any:
    """Return a frame whose texts are safe in a page: Evidently writes them into a script as they are."""
    frame = table.to_pandas()
    for name in texts:
        frame[name] = frame[name].map(html.escape, na_action="ignore")
    return frame


def with_sentence(page: str, sentence: str) -> str:
    """Return the page with a sentence on top, and with its own content policy."""
    style = "font: 14px sans-serif; margin: 16px 24px 0; padding: 10px 14px; border-left: 4px solid #c60; color: #222;"
    said = f'<p style="{style} background: #fff4e5">{html.escape(sentence)}</p>'
    head, body = page.replace("<head>", f"<head>{POLICY}", 1).split("<body>", 1)
    return f"{head}<body>{said}{body}"


def _told(key: str, window: str, counts: dict[str, list[int]]) -> str:
    (before, of_before), (now, of_now) = counts["reference"], counts["current"]
    return (
        f"Drawn by Evidently on a sample, the same on every run: {before:,} of the {of_before:,} rows of the training "
        f"window {window} (reference) and {now:,} of the {of_now:,} rows of {key} (current). "
        f"The verdict does not rest on this page but on counts of all rows."
    )
