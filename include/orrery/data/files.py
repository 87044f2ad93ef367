"""Files of a source, Parquet or CSV at any fsspec URI, as a stream of Arrow record batches."""

from __future__ import annotations

import bisect
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from orrery.data.tables import ROW_GROUP
from orrery.errors import DataError, RequestError, UserError
from orrery.store import storage_options, trouble

ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".csv.gz": "csv"}
NEIGHBOURS = 6
# Types are inferred from one block; a later block that contradicts them costs a second reading of the file.
CSV_BLOCK = 32 << 20
# The next wider type when a value does not fit the one that was inferred: no value is ever lost to it.
WIDER: dict[str, pa.DataType] = {
    "null": pa.int64(),
    "int64": pa.float64(),
    "date32[day]": pa.timestamp("us"),
    "timestamp[s]": pa.timestamp("us"),
}
_CONVERSION = re.compile(r"In CSV column #(\d+).*conversion error to ([^:]+):")


@dataclass(frozen=True)
class Stream:
    """A schema, and batches that have it."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]


@contextlib.contextmanager
def read(uri: str, form: str | None) -> Iterator[Stream]:
    """Open a file of a source. Memory stays within a few row groups (Parquet) or blocks (CSV).

    Raises `RequestError` (64) when it is not there or its form is unknown, `DataError` (64) when it is broken
    or empty, `UserError` (64) without permission, `TryAgain` (75) when the network fails.
    """
    form = form or form_of(uri)
    with trouble(uri), _broken(uri, form):
        fs, path = filesystem(uri)
        try:
            if int(fs.info(path)["size"] or 0) == 0 and fs.isfile(path):
                raise DataError(f"{uri} is empty: 0 bytes", hint="land the file again")
        except FileNotFoundError:
            raise _missing(fs, path, uri) from None
        reader = _parquet if form == "parquet" else _csv
        with reader(fs, path, uri) as stream:
            yield stream


def form_of(uri: str) -> str:
    """Return `parquet` or `csv` by the file's ending. Raises `RequestError` for another one."""
    for ending, form in ENDINGS.items():
        if uri.lower().endswith(ending):
            return form
    raise RequestError(
        f"{uri}: the ending tells neither Parquet nor CSV",
        hint=f"use one of {', '.join(ENDINGS)}, or set the source's `format` in spec.yaml",
    )


def filesystem(uri: str) -> tuple[Any, str]:
    """Return the filesystem of a URI and the path on it. Raises `UserError` for a protocol that is not there."""
    try:
        fs, path = fsspec.core.url_to_fs(uri, **storage_options(uri))
    except (ImportError, ValueError) as e:
        raise UserError(f"{uri} cannot be read: {e}", hint="file://…, s3://… or a plain path") from None
    fs.invalidate_cache()
    return fs, path


@contextlib.contextmanager
def _broken(uri: str, form: str) -> Iterator[None]:
    """Tell a damaged file from a network that fails: Arrow's own OSError has no errno."""
    hint = f"it is damaged, cut short or not {form}: land it again"
    try:
        yield
    except MemoryError:
        raise
    except pa.ArrowException as e:
        raise DataError(f"{uri} cannot be read as {form}: {_first_line(e)}", hint=hint) from None
    except (EOFError, UnicodeDecodeError) as e:
        raise DataError(f"{uri} cannot be read as {form}: {_first_line(e)}", hint=hint) from None
    except OSError as e:
        if type(e) is OSError and e.errno is None:
            raise DataError(f"{uri} cannot be read as {form}: {_first_line(e)}", hint=hint) from None
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _missing(fs: Any, path: str, uri: str) -> RequestError:
    """Say what lies where the file should be: the names that would stand beside it."""
    folder, _, name = path.rstrip("/").rpartition("/")
    there: list[str] = []
    while folder and not there:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            there = sorted(str(p).rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(folder, detail=False))
        if not there:
            folder, _, name = folder.rpartition("/")
    place = bisect.bisect_left(there, name)
    first = max(0, min(place - NEIGHBOURS // 2, len(there) - NEIGHBOURS))
    shown = ", ".join(there[first : first + NEIGHBOURS]) or "nothing"
    more = f" (of {len(there)})" if len(there) > NEIGHBOURS else ""
    return RequestError(
        f"{uri} is not there; {folder or '/'} holds {shown}{more}",
        hint="land the file there, or correct the source's `uri` in spec.yaml (and `data` in platform.yaml)",
    )


@contextlib.contextmanager
def _parquet(fs: Any, path: str, uri: str) -> Iterator[Stream]:
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        yield Stream(parquet.schema_arrow, parquet.iter_batches(batch_size=ROW_GROUP))


@contextlib.contextmanager
def _csv(fs: Any, path: str, uri: str) -> Iterator[Stream]:
    """Read CSV with types inferred; where a later value contradicts them, begin again with a wider type.

    Unquoted NA, NaN, null and nothing at all are missing values, in strings as well; "NA" in quotes is a string.
    """
    schema = _csv_schema(fs, path, uri)
    types = dict(zip(schema.names, schema.types, strict=True))
    with _open_text(fs, path, uri) as file, csv.open_csv(file, **_csv_options(types)) as reader:
        yield Stream(reader.schema, iter(reader))


def _csv_schema(fs: Any, path: str, uri: str) -> pa.Schema:
    """Return the types that hold every value of a CSV file; each type that must be widened costs another reading."""
    types: dict[str, pa.DataType] = {}
    while True:
        names: list[str] = []
        try:
            with _open_text(fs, path, uri) as file, csv.open_csv(file, **_csv_options(types)) as reader:
                names = reader.schema.names
                for _ in reader:
                    pass
                return reader.schema
        except pa.ArrowInvalid as e:
            match = _CONVERSION.search(str(e))
            if match is None or not names:
                raise
            name, now = names[int(match[1])], match[2].strip()
            wider = WIDER.get(now, pa.string())
            if types.get(name) == wider:
                raise
            types[name] = wider


def _open_text(fs: Any, path: str, uri: str) -> IO[bytes]:
    return fs.open(path, "rb", compression="gzip" if uri.lower().endswith(".gz") else None)  # type: ignore[no-any-return]


def _csv_options(types: dict[str, pa.DataType]) -> dict[str, Any]:
    return {
        "read_options": csv.ReadOptions(block_size=CSV_BLOCK),
        "parse_options": csv.ParseOptions(newlines_in_values=True),
        "convert_options": csv.ConvertOptions(
            column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    }
