"""How fast drift is counted, against Evidently's drift report: ten million rows of 15 features.

    .venvs/ml/bin/python tests/benchmarks/bench_drift_vs_evidently.py [--rows 10000000]

The partition has that many rows, the reference a fifth of it. Ours is the whole of it: bins and counts of the reference
(which `evaluate` makes once per model), counts of the partition, and every figure of `monitoring.drift`. Evidently
works on rows in memory, so it is given a tenth of both sides, and a fortieth; from the two times follows what it takes
per row and what per report, and so what the whole would take: that it grows in a straight line favours it. Both read
the same Parquet files; imports are counted for neither. Evidently computes PSI for every column, as ours does, and once
more the tests that its preset chooses by itself. Its PSI and ours must agree to 1e-6 on its own bins.

Every measurement is a process of its own; peak memory is the process's own high-water mark (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["DO_NOT_TRACK"] = "1"  # Evidently would report usage

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orrery.data import histograms
from orrery.data.histograms import Category, Numeric
from orrery.data.tables import ROW_GROUP
from orrery.monitoring import drift

ROWS, CHUNK = 10_000_000, 500_000
LIMIT_GB, FASTER, SAME = 2.0, 10.0, 1e-6
NUMERIC = [*(f"n{i}" for i in range(8)), "rain", "wait", "hour", "flag"]
SIZES = {"carrier": 16, "dest": 104, "weekday": 7}
PARTS = (10, 40)  # Evidently is given one row of so many


def chunk(rows: int, seed: int, shift: float) -> pa.Table:
    """12 numbers, some with nulls, one with a point mass, two with few values; three categories."""
    rng = np.random.default_rng(seed)
    made: dict[str, Any] = {}
    for i in range(8):
        made[f"n{i}"] = pa.array(rng.normal(shift * i / 8, 1, rows), mask=rng.random(rows) < 0.04 if i % 2 else None)
    made["rain"] = np.where(rng.random(rows) < 0.8, 0.0, rng.exponential(1 + shift, rows))
    made["wait"] = rng.gamma(2 + shift, 3, rows)
    made["hour"] = pa.array(rng.binomial(12, 0.5 + shift / 10, rows).astype(np.int64))
    made["flag"] = (rng.random(rows) < 0.3 + shift / 10).astype(np.int64)
    for name, size in SIZES.items():
        share = 1 / np.arange(1, size + 1) ** (1 + shift / 5)
        ids = rng.choice(size, rows, p=share / share.sum()).astype(np.int32)
        values = pa.array([f"{name}{i:03d}" for i in range(size)])
        made[name] = pa.DictionaryArray.from_arrays(ids, values).cast(pa.string())
    return pa.table(made)


def write(file: Path, rows: int, seed: int, shift: float) -> None:
    """Write the rows chunk by chunk, as committed features are written."""
    with pq.ParquetWriter(file, chunk(1, 0, 0).schema, compression="zstd") as writer:
        for start in range(0, rows, CHUNK):
            table = chunk(min(CHUNK, rows - start), seed + start // CHUNK, shift)
            writer.write_table(table, row_group_size=ROW_GROUP)


def peak_gb() -> float:
    """Peak memory of this process (an `ru_maxrss` would begin with that of the process that started it)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


# -- what is measured, each in a process of its own --------------------------------------------------


def ours(folder: Path) -> dict[str, Any]:
    """Count all rows."""
    import scipy.special  # noqa: F401  imports are not timed

    before, now = [folder / "reference.parquet"], [folder / "partition.parquet"]
    began = time.perf_counter()
    bins = histograms.bins_of_files(before, NUMERIC, dict.fromkeys(SIZES))
    reference = histograms.count_files(before, bins)
    binned = time.perf_counter() - began
    partition = histograms.count_files(now, bins)
    found = drift.of_counts(reference, partition)
    seconds = time.perf_counter() - began
    rows = {"reference": reference.rows, "partition": partition.rows}
    assert len(found) == len(NUMERIC) + len(SIZES)
    return {"seconds": seconds, "of_reference": binned, "gb": peak_gb(), "rows": rows}


def evidently(folder: Path, part: int, method: str | None) -> dict[str, Any]:
    """Have Evidently report on one row of `part`; return its time, and with `psi` how far ours is from its figures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

    shape = DataDefinition(numerical_columns=NUMERIC, categorical_columns=list(SIZES))
    began = time.perf_counter()
    tables = [share(folder / f"{n}.parquet", part) for n in ("partition", "reference")]
    frames = [Dataset.from_pandas(t.to_pandas(), data_definition=shape) for t in tables]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preset = DataDriftPreset(columns=[*NUMERIC, *SIZES], method=method)
        report = Report([preset]).run(current_data=frames[0], reference_data=frames[1])
    made = report.dict()["metrics"]
    seconds = time.perf_counter() - began
    theirs = {m["config"]["column"]: float(m["value"]) for m in made if "column" in m["config"]}
    assert len(theirs) == len(NUMERIC) + len(SIZES)
    off = {n: abs(psi_on_its_bins(tables[1], tables[0], n) - v) for n, v in theirs.items()} if method else {}
    return {"seconds": seconds, "gb": peak_gb(), "off": max(off.values(), default=0.0), "rows": tables[0].num_rows}


def share(file: Path, part: int) -> pa.Table:
    """Read the first of every `part` row groups' worth of a file, in one piece."""
    source = pq.ParquetFile(file)
    groups = max(1, source.metadata.num_row_groups // part)
    return source.read_row_groups(list(range(groups)))


def psi_on_its_bins(reference: pa.Table, current: pa.Table, name: str) -> float:
    """Return our PSI on the bins that Evidently chooses: Sturges' over both sides, or one per value for up to 20."""
    bins: Numeric | Category
    if name in SIZES:
        bins = histograms.bins_of(pa.concat_tables([reference, current]).select([name]))[name]  # type: ignore[assignment]
    else:
        sides = [t[name].drop_null().to_numpy() for t in (reference, current)]
        if len(np.unique(sides[0])) > 20:
            inner = np.histogram_bin_edges(np.concatenate(sides), bins="sturges")[1:-1]
        else:
            inner = np.unique(np.concatenate(sides))
        bins = Numeric(tuple(inner.astype(float).tolist()))
    p, q = (histograms.count(t.select([name]), {name: bins}).of(name)[:-1] for t in (reference, current))
    return drift.psi(p, q, empty=None)  # it leaves nulls out


# -- all of it ---------------------------------------------------------------------------------------


def measured(folder: Path, *what: str) -> dict[str, Any]:
    """Run one measurement as a process."""
    argv = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder), "--measure", *what]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def whole(few: dict[str, Any], many: dict[str, Any], rows: int) -> float:
    """Return the seconds that all rows would take, in a straight line through two measurements."""
    slope = (many["seconds"] - few["seconds"]) / (many["rows"] - few["rows"])
    return float(many["seconds"] + slope * (rows - many["rows"]))


def run(rows: int) -> list[dict[str, Any]]:
    """Return one row per comparison: `value` is our time (or memory), `ratio` how many times that of `against`."""
    folder = Path(tempfile.mkdtemp(prefix="bench-drift-"))
    try:
        write(folder / "reference.parquet", rows // 5, 0, 0.0)
        write(folder / "partition.parquet", rows, 1_000_000, 0.3)
        best = min((measured(folder, "ours") for _ in range(3)), key=lambda m: m["seconds"])
        theirs = {m: [measured(folder, "evidently", str(p), m) for p in reversed(PARTS)] for m in ("psi", "preset")}
    finally:
        shutil.rmtree(folder)
    assert best["rows"] == {"reference": rows // 5, "partition": rows}, best
    off = max(m["off"] for m in theirs["psi"])
    assert off <= SAME, f"PSI differs by {off} on the same bins"
    out = []
    for method, name, how in (
        ("psi", "drift_vs_evidently", "PSI for every column"),
        ("preset", "drift_vs_evidently_preset", "the tests that its preset chooses"),
    ):
        few, many = theirs[method]
        seconds = whole(few, many, rows)
        said = (
            f"Evidently's report, {how}: {seconds:,.0f} s, scaled from {many['seconds']:.1f} s for "
            f"{many['rows']:,} rows ({many['gb']:.1f} GB) and {few['seconds']:.1f} s for {few['rows']:,}"
        )
        out.append(
            {"name": name, "value": best["seconds"], "unit": "s", "against": said, "ratio": seconds / best["seconds"]}
        )
    out.append(
        {
            "name": "drift_memory",
            "value": best["gb"],
            "unit": "GB peak",
            "against": f"the limit of {LIMIT_GB:g} GB; PSI on Evidently's bins differs by {off:.1e} at most",
            "ratio": LIMIT_GB / best["gb"],
        }
    )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the partition")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, *rest = args.measure
        done = ours(args.folder) if what == "ours" else evidently(args.folder, int(rest[0]), _method(rest[1]))
        print(json.dumps(done))
        return 0
    print(json.dumps(run(args.rows)))
    return 0


def _method(name: str) -> str | None:
    return None if name == "preset" else name


if __name__ == "__main__":
    raise SystemExit(main())
