"""What OpenLineage is told of a task: what its steps read and wrote, in which version, and how they ended.

Airflow's OpenLineage provider emits the events (START, COMPLETE, FAIL) with run, parent run, owner, documentation
and error, and asks the operator for the rest when the task has ended. The rest is made here, from what is on record
(plan, result, manifest): no data are read. Imported by the worker alone, and only where lineage is configured; what
fails here the provider logs, and the task does not notice.

Names: a dataset of ours is `<project>/<dataset>/<partition or window>` in the store's URI, its version the
manifest's digest. Sources and models are named as OpenLineage's naming rules have it, so that they meet what other
tools tell of them: `file` + path, `s3://bucket` + key, `postgres://host:port` + `database.schema.table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.providers.openlineage.extractors import OperatorLineage
from openlineage.client.event_v2 import InputDataset, OutputDataset
from openlineage.client.facet_v2 import (
    RunFacet,
    data_quality_assertions_dataset,
    dataset_version_dataset,
    datasource_dataset,
    input_statistics_input_dataset,
    output_statistics_output_dataset,
    schema_dataset,
    source_code_location_job,
)

from orrery import platform
from orrery.catalogue import CATALOGUE
from orrery.contract import Result, SourceRef
from orrery.rag.contract import OriginRef
from orrery.spec import load_model
from orrery.store import Manifest, Ref, Store

if TYPE_CHECKING:
    from orrery.orchestration.operators import Told

# Of each step's sentences and figures, what a reader of events needs; the result document has them all.
MAX_REASONS = 20


def of_task(project: str, verb: str, steps: Sequence[Told]) -> OperatorLineage[Any, Any]:
    """Return the datasets and facets of a task that has carried `steps` (it may have failed in the last)."""
    where = platform.load()
    store = Store(where.store)
    inputs: dict[tuple[str, str], InputDataset] = {}
    outputs: dict[tuple[str, str], OutputDataset] = {}
    told, code = [], None
    for step in steps:
        manifest = _manifest(store, step.result)
        for one in _inputs(store, step, manifest):
            inputs.setdefault((one.namespace, one.name), one)
        if manifest is not None:
            written = _output(store, manifest, made=not (step.result and step.result.skipped))
            outputs[written.namespace, written.name] = written
        elif step.result is not None and "model_version" in step.result.facts:
            version = str(step.result.facts["model_version"])
            knowledge = step.request.kind == "knowledge_base"
            model = _live(store, project, version) if knowledge else _model(where.mlflow, project, version)
            outputs[model.namespace, model.name] = model
        code = (step.plan.config.bundle if step.plan else manifest and manifest.fingerprint.get("project")) or code
        told.append(_account(step, manifest))
    facet = RunFacet().with_additional_properties(project=project, verb=verb, steps=told)
    return OperatorLineage(
        inputs=list(inputs.values()),
        outputs=list(outputs.values()),
        run_facets={"orrery": facet},
        job_facets={"sourceCodeLocation": _code(store, code)} if code else {},
    )


def _manifest(store: Store, result: Result | None) -> Manifest | None:
    return store.manifest(result.output) if result is not None and result.output else None


# -- what was read -------------------------------------------------------------------------------------


def _inputs(store: Store, step: Told, manifest: Manifest | None) -> Iterator[InputDataset]:
    if step.request.verb == "ingest":
        yield from _sources(step, manifest)
        return
    if step.request.verb == "collect":
        yield from _origins(step)
        return
    # A step that was skipped has no plan of its own to tell: its output's inputs are what it would have read.
    refs = step.plan.config.inputs if step.plan else manifest.inputs if manifest else {}
    tests = _assertions(store, manifest) if manifest is not None and manifest.verb == "validate" else {}
    for ref in (ref for role in refs.values() for ref in role):
        yield InputDataset(
            namespace=plain(store.uri), name=_name(ref), facets={"version": _version(ref.digest)}, inputFacets=tests
        )


def _sources(step: Told, manifest: Manifest | None) -> Iterator[InputDataset]:
    """Tell where a partition was read from; the counts and columns are those of the snapshot that was taken."""
    if step.plan is None:
        return
    for name, value in step.plan.config.params["sources"].items():
        ref, facts = SourceRef.model_validate(value), manifest.facts.get(name, {}) if manifest else {}
        namespace, dataset = _source(step, name, ref)
        where = plain(ref.uri) if ref.uri else namespace
        facets: dict[str, Any] = {"dataSource": datasource_dataset.DatasourceDatasetFacet(name=name, uri=where)}
        if fields := _fields(facts.get("columns", {})):
            facets["schema"] = schema_dataset.SchemaDatasetFacet(fields=fields)
        statistics: dict[str, Any] = {}
        if "rows" in facts:
            statistics["inputStatistics"] = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(
                rowCount=facts["rows"]
            )
        yield InputDataset(namespace=namespace, name=dataset, facets=facets, inputFacets=statistics)


def _origins(step: Told) -> Iterator[InputDataset]:
    """Tell where documents were read from."""
    for name, value in step.plan.config.params["sources"].items() if step.plan else ():
        ref = OriginRef.model_validate(value)
        for where in (*(uri for uri in (ref.uri, ref.sitemap, ref.notion) if uri), *ref.pages):
            facets: dict[str, Any] = {
                "dataSource": datasource_dataset.DatasourceDatasetFacet(name=name, uri=plain(where))
            }
            namespace, dataset = address(where)
            yield InputDataset(namespace=namespace, name=dataset, facets=facets)


def _source(step: Told, name: str, ref: SourceRef) -> tuple[str, str]:
    """Return namespace and name of one source: its address without login and query."""
    if ref.uri is not None:
        return address(ref.uri)
    url = step.plan.environment.get(ref.secret_env or "", "") if step.plan else ""
    if url:
        return table(url, str(ref.table))
    # A pod has the credential from its cluster: where the database is, nobody knows here.
    spec = load_model(platform.project_folder(step.request.project))
    return f"airflow-connection://{spec.sources[name].connection}", str(ref.table)


def address(uri: str) -> tuple[str, str]:
    """Return OpenLineage's namespace and name of a file, without login and query."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return "file", parts.path
    return f"{parts.scheme or 'file'}://{parts.netloc.rpartition('@')[2]}", parts.path.lstrip("/")


def table(url: str, name: str) -> tuple[str, str]:
    """Return OpenLineage's namespace and name of a database's table, without login and query."""
    parts = urlsplit(url)
    scheme = parts.scheme.partition("+")[0].replace("postgresql", "postgres")
    if not parts.hostname:
        return f"{scheme}://{parts.path}", name
    port = parts.port or {"postgres": 5432, "mysql": 3306}.get(scheme)
    database = parts.path.strip("/")
    return f"{scheme}://{parts.hostname}{f':{port}' if port else ''}", f"{database}.{name}" if database else name


def plain(uri: str) -> str:
    """Return a folder's or a server's URI without login and query."""
    parts = urlsplit(uri)
    return f"{parts.scheme or 'file'}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def _assertions(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Return every check of `validate` as an assertion on the raw partition: what was asked and whether it held."""
    report = store.read_json(manifest.uri("report.json"))
    found = [
        data_quality_assertions_dataset.Assertion(
            assertion=check["check"],
            success=check["passed"],
            column=f"{source}.{check['column']}" if check["column"] else None,
            severity="warn" if check["severity"] == "warning" else check["severity"],
            name=f"{source}: {check['check']}",
        )
        for source, part in report.items()
        for check in part["checks"]
    ]
    facet = data_quality_assertions_dataset.DataQualityAssertionsDatasetFacet(assertions=found)
    return {"dataQualityAssertions": facet}


# -- what was written ----------------------------------------------------------------------------------


def _output(store: Store, manifest: Manifest, *, made: bool) -> OutputDataset:
    """Return an output; how much was written is told only by the step that `made` it, not by one that was skipped."""
    facets: dict[str, Any] = {
        "version": _version(manifest.digest),
        "dataSource": datasource_dataset.DatasourceDatasetFacet(
            name=plain(store.uri), uri=f"{plain(store.uri)}/{manifest.path}"
        ),
    }
    if fields := _schema(manifest.facts):
        facets["schema"] = schema_dataset.SchemaDatasetFacet(fields=fields)
    statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        rowCount=_rows(manifest.facts),
        size=sum(file.size for file in manifest.files.values()),
        fileCount=len(manifest.files),
    )
    return OutputDataset(
        namespace=plain(store.uri),
        name=_name(manifest.ref),
        facets=facets,
        outputFacets={"outputStatistics": statistics} if made else {},
    )


def _model(mlflow: str, project: str, version: str) -> OutputDataset:
    """Return a registered model: what register, promote and rollback act on."""
    facets: dict[str, Any] = {"version": _version(version)}
    return OutputDataset(namespace=plain(mlflow), name=f"models/{project}", facets=facets)


def _live(store: Store, project: str, version: str) -> OutputDataset:
    """Return what a knowledge base answers from: what promote and rollback act on."""
    facets: dict[str, Any] = {"version": _version(version)}
    return OutputDataset(namespace=plain(store.uri), name=f"{project}/live", facets=facets)


def _name(ref: Ref) -> str:
    project, verb, *_ = ref.path.split("/")
    datasets = {name: found.dataset for verbs in CATALOGUE.values() for name, found in verbs.items() if found.dataset}
    return f"{project}/{datasets.get(verb, verb)}/{ref.key}"


def _version(digest: str) -> dataset_version_dataset.DatasetVersionDatasetFacet:
    return dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=digest)


def _code(store: Store, digest: str) -> source_code_location_job.SourceCodeLocationJobFacet:
    return source_code_location_job.SourceCodeLocationJobFacet(
        type="bundle", url=f"{plain(store.uri)}/bundles/{digest}.tar", version=digest
    )


def _schema(facts: Mapping[str, Any]) -> list[schema_dataset.SchemaDatasetFacetFields]:
    """Return the columns that a step wrote down; a dataset of several tables has one field for each of them."""
    if flat := _fields(facts.get("columns") or facts.get("features") or {}):
        return flat
    tables = {
        name: _fields(one["columns"]) for name, one in facts.items() if isinstance(one, dict) and "columns" in one
    }
    return [schema_dataset.SchemaDatasetFacetFields(n, type="table", fields=fields) for n, fields in tables.items()]


def _fields(columns: Mapping[str, Any]) -> list[schema_dataset.SchemaDatasetFacetFields]:
    named = {name: kind for name, kind in columns.items() if isinstance(kind, str)}
    return [schema_dataset.SchemaDatasetFacetFields(name, type=kind) for name, kind in named.items()]


def _rows(facts: Mapping[str, Any]) -> int | None:
    """Return how many rows a dataset has, over all its tables; None where that means nothing (a model)."""
    if isinstance(facts.get("rows"), int):
        return int(facts["rows"])
    tables = [one for one in facts.values() if isinstance(one, dict)]
    counts = [one["rows_clean"] if "rows_clean" in one else one.get("rows") for one in tables]
    found = [count for count in counts if isinstance(count, int)]
    return sum(found) if found else None


# -- how it ended --------------------------------------------------------------------------------------


def _account(step: Told, manifest: Manifest | None) -> dict[str, Any]:
    """Return what the `orrery` facet says of one step; what there is nothing to say of is left out."""
    request, result = step.request, step.result
    fingerprint = (step.plan.config.fingerprint if step.plan else None) or (manifest.fingerprint if manifest else None)
    said: dict[str, Any] = {
        "key": request.key,
        "attempt": request.attempt,
        "actor": request.actor,
        "reason": request.reason,
        "status": result.status if result is not None else "failed",
        "fingerprint": fingerprint,
    }
    if result is not None:
        version = result.facts.get("model_version") or (
            step.plan.config.params.get("model_version") if step.plan else ""
        )
        said |= {
            "verdict": result.verdict,
            "skipped": result.skipped,
            "output": result.output,
            "modelVersion": version,
            "metrics": dict(result.metrics),
            "reasons": result.reasons[:MAX_REASONS],
            "seconds": dict(result.seconds),
        }
    return {name: value for name, value in said.items() if value not in (None, "", [], {})}
