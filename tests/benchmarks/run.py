"""Run the benchmarks, each in its environment; print a table and write var/bench/report.json: `make bench`.

Every benchmark prints its figure and the ratio against the obvious alternative, measured in the same run.
A benchmark is `tests/benchmarks/bench_<subject>.py`; it prints a JSON list of
{name, value, unit, against, ratio} as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
# Benchmark file -> its environment and the names that it has to print (it may print more).
BENCHMARKS = {
    "bench_step_overhead": ("airflow", ("step_overhead",)),
    "bench_parse": ("airflow", ("parse_200",)),
    "bench_spark": ("spark", ("spark_vs_row_udf", "spark_vs_arrow_udf", "spark_vs_onnxruntime")),
    "bench_point_in_time_join": ("ml", ("point_in_time_join",)),
    "bench_alarms": ("ml", ("alarms", "alarms_rough", "alarms_seen")),
    "bench_drift_vs_evidently": ("ml", ("drift_vs_evidently", "drift_memory")),
    "bench_train": (
        "ml",
        ("train_vs_bare_loop_single", "train_vs_lightning_single", "train_vs_bare_loop_ddp", "train_vs_lightning_ddp"),
    ),
    "bench_rag_embed": ("rag", ("embed_vs_sentence_transformers", "embed_int8_vs_sentence_transformers")),
    "bench_rag_quality": (
        "rag",
        ("rag_ndcg_handbook_hybrid", "rag_ndcg_handbook_bm25", "rag_ndcg_handbook_dense"),
    ),
    "bench_rag_index": (
        "rag",
        (
            *("rag_index_first", "rag_index_unchanged", "rag_index_unchanged_embedded", "rag_index_changed"),
            *("rag_index_changed_embedded", "rag_index_memory", "rag_search_20k", "rag_search_20k_p99"),
            *("rag_search_100k", "rag_search_100k_p99"),
        ),
    ),
    "bench_serve": (
        "serve",
        ("serve_p50", "serve_p99", "serve_overload_refused", "serve_overload_errors", "serve_overload_memory"),
    ),
    "bench_pods": ("airflow", ("pods_requests", "pods_overhead")),
    "bench_checkpoint_overhead": ("ml", ("checkpoint_overhead", "checkpoint_cost", "checkpoint_blocked")),
    "bench_stream": ("ml", ("stream_speed", "stream_shuffle_drift", "stream_memory")),
    "bench_spot_month": ("ml", ("spot_goodput_1h", "spot_goodput_15min", "spot_deadlines_missed")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [n for _, ns in BENCHMARKS.values() for n in ns]
    parser.add_argument("--only", choices=sorted([*BENCHMARKS, *names]), help="one benchmark, by file or by name")
    only = parser.parse_args().only
    rows: list[dict[str, object]] = []
    failed = 0
    for file, (environment, given) in BENCHMARKS.items():
        if only and only != file and only not in given:
            continue
        print(f"{file} …", flush=True)
        began = time.monotonic()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("ORRERY_", "AIRFLOW_"))}
        env |= {"ORRERY_VENVS": str(VENVS)}
        argv = [str(VENVS / environment / "bin" / "python"), str(ROOT / "tests" / "benchmarks" / f"{file}.py")]
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"  failed ({done.returncode})\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
            failed += 1
            continue
        made = json.loads(done.stdout.splitlines()[-1])
        if missing := set(given) - {r["name"] for r in made}:
            print(f"  printed no {', '.join(sorted(missing))}", file=sys.stderr)
            failed += 1
        rows += [r for r in made if not only or only in (file, r["name"])]
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
    width = max([len(str(r["name"])) for r in rows], default=4)
    print(f"\n{'name':{width}}  {'value':>12}  {'unit':14} {'ratio':>8}  against")
    for r in rows:
        print(f"{r['name']:{width}}  {r['value']:12,.4g}  {r['unit']:14} {r['ratio']:8.2f}  {r['against']}")
    target = ROOT / "var" / "bench" / "report.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{target}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
