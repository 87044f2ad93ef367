"""Step `materialize`: clean tables of one partition, and of those before it, into its features table.

Writes features.parquet (key, prediction_time, label, label_time, features, `_` helpers; sorted by
prediction_time and key) and schema.json ({feature: "numeric" | "categorical" | "unknown", when it has no value}).
With `features: {online: true}` in the spec, the views' latest rows go to Feast's online store as well.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from orrery.contract import MaterializeParams, Result
from orrery.data.tables import KEY, LABEL, LABEL_TIME, PREDICTION_TIME, read_parquet, sample, write_parquet
from orrery.errors import DataError
from orrery.features import shapes
from orrery.features.definitions import Definitions, View, collect
from orrery.features.known import latest_known
from orrery.step import Work
from orrery.store import Manifest


def run(work: Work, params: MaterializeParams) -> Result:
    """Make one partition's features. Raises `DataError` for tables that are not what they must be."""
    definitions = collect(work.module("features"), work.spec)
    rows = _rows(work, definitions)
    known = [(view, latest_known(view, shapes.view_table(view, _raw(work, view)))) for view in definitions.views]
    if known:
        # Without a view there is nothing to join: a table already joined needs no Feast.
        from orrery.features.join import join

        joined = join(rows, known, work.scratch / "feast")
    else:
        joined = rows
    features = _finish(joined, shapes.derived(definitions, joined))
    schema = shapes.kinds(features)
    if not schema:
        raise DataError("there is no feature: every column is reserved or begins with _")
    write_parquet(features, work.path("features.parquet"))
    work.write_json("schema.json", schema)
    # Before the commit: whoever is killed in between pushes again, which changes nothing. Neither a sample nor a
    # repeat is what counts, so neither is published nor pushed.
    if work.spec.features.online and known and work.config.publish:
        from orrery.features.online import Home, push

        home = Home(work.config.project, params.feast_registry, params.feast_online)
        work.fence()  # an orphan must not push its older rows over those of its retry
        pushed = push(definitions, {view.name: table for view, table in known}, home)
        work.log.info("online", **pushed)
    return _result(work, features, known)


def _rows(work: Work, definitions: Definitions) -> pa.Table:
    """Return the partition's rows, sampled by key, sorted by prediction_time and key."""
    source = definitions.rows.source
    raw = read_parquet(work.open_input(work.input("clean"), f"{source}.parquet"))
    rows = sample(shapes.rows_table(definitions.rows, raw, work.spec.task), work.config.sample)
    if not rows.num_rows:
        hint = "ask for a larger sample" if work.config.sample < 1 else "a partition without rows has no features"
        raise DataError(f"@rows {source}: no rows are left of {raw.num_rows:,}", hint=hint)
    return rows.sort_by([(PREDICTION_TIME, "ascending"), (KEY, "ascending")])


def _raw(work: Work, view: View) -> pa.Table:
    """Return what a view's function is given: its source's clean rows, earlier partitions first."""
    name = f"{view.source}.parquet"
    manifests: list[Manifest] = [work.input("clean")]
    if work.spec.sources[view.source].partition != "none":  # one without partitions is whole each time
        manifests = [*(m for m in work.inputs("history") if name in m.files), *manifests]
    tables = [read_parquet(work.open_input(m, name)) for m in manifests]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
        keys = ", ".join(m.key for m in manifests)
        raise DataError(f"source {view.source}: its columns' types differ between {keys}: {e}") from None


def _finish(joined: pa.Table, features: pa.Table) -> pa.Table:
    """Put the label back, which no derive has seen, beside the keys."""
    first = joined.select([KEY, PREDICTION_TIME, LABEL, LABEL_TIME])
    for name in features.column_names:
        if name not in first.column_names:
            first = first.append_column(name, features[name])
    return first.combine_chunks()


def _result(work: Work, features: pa.Table, known: list[tuple[View, pa.Table]]) -> Result:
    """Return counts, and the share of rows that each view knew anything for."""
    labelled = features.num_rows - features[LABEL].null_count
    schema = shapes.kinds(features)
    result = Result(
        metrics={"rows": float(features.num_rows), "features": float(len(schema)), "labelled": float(labelled)}
    )
    shares = {view.name: round(_covered(features, view), 6) for view, _ in known}
    result.facts = {"rows": features.num_rows, "labelled": labelled, "features": schema, "known": shares}
    for name, share in shares.items():
        if share == 0:
            result.reasons.append(f"view {name} knew nothing for any row: see its `on` values, its ttl and its history")
    work.log.info("features", rows=features.num_rows, features=len(schema), labelled=labelled)
    return result


def _covered(features: pa.Table, view: View) -> float:
    """Return the share of rows for which at least one of a view's columns is known."""
    some = pa.chunked_array([pa.repeat(False, features.num_rows)])
    for name in features.column_names:
        if name.startswith(f"{view.name}__"):
            some = pc.or_(some, pc.is_valid(features[name]))
    return float(pc.mean(some.cast(pa.float64())).as_py() or 0.0)
