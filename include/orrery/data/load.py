"""Committed data for notebooks: `orrery.load(project, partition, dataset)`."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pyarrow as pa

from orrery import platform
from orrery.data.tables import read_parquet
from orrery.errors import RequestError, UserError, nearest
from orrery.store import Manifest, Store

DATASETS = ("raw", "clean", "features", "scores")


def load(project: str, partition: str, dataset: str = "features") -> pa.Table:
    """Return one partition of `raw/<source>`, `clean/<source>`, `features` or `scores` (all parts, in order).

    Raises `SpecError` for a project that there is not, `RequestError` for a dataset or a partition that
    there is not (the hint lists what there is), `UserError` when its file is gone.
    """
    platform.project_folder(project)
    name, _, source = dataset.partition("/")
    if name not in DATASETS or (bool(source) != (name in ("raw", "clean"))):
        forms = ("raw/<source>", "clean/<source>", "features", "scores")
        raise RequestError(f"there is no dataset {dataset!r}", hint=nearest(dataset, forms))
    store = Store(platform.load().store)
    manifest = store.latest_manifest(project, name, partition) if _plain(partition) else None
    if manifest is None:
        there = store.keys(project, name)
        raise RequestError(f"{project} has no {name} for {partition!r}", hint=nearest(partition, there))
    with tempfile.TemporaryDirectory(prefix="orrery-") as scratch:
        tables = [_read(store, manifest.uri(file), Path(scratch)) for file in _files(manifest, name, source)]
    return pa.concat_tables(tables)


def _read(store: Store, path: str, scratch: Path) -> pa.Table:
    try:
        return read_parquet(store.local(path, scratch))
    except FileNotFoundError:
        raise UserError(
            f"{store.uri}/{path} is gone, its manifest is not", hint="run the step that makes it again, with --force"
        ) from None


def _plain(partition: str) -> bool:
    return re.fullmatch(r"[0-9A-Za-z_.-]+", partition, flags=re.ASCII) is not None


def _files(manifest: Manifest, dataset: str, source: str) -> list[str]:
    """Return the files of a dataset's rows. Raises `RequestError` for a source that there is not."""
    if dataset == "features":
        return ["features.parquet"]
    if dataset == "scores":
        return sorted(n for n in manifest.files if re.fullmatch(r"(.*/)?part-[^/]*\.parquet", n))
    sources = sorted(n.removesuffix(".parquet") for n in manifest.files if n.endswith(".parquet"))
    if source not in sources:
        raise RequestError(f"{dataset} has no source {source!r}", hint=nearest(source, sources))
    return [f"{source}.parquet"]
