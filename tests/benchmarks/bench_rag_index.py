"""A knowledge base of 100,000 chunks, from its documents to its index; and what a search costs.

    .venvs/rag/bin/python tests/benchmarks/bench_rag_index.py [--only chain|search] [--chunks 100000]

chain   collect, chunk, embed and index as steps of their own, planned as the Dags plan them, on synthetic documents and
        with an embedder that is quick and made for this alone (384 random numbers for each of MiniLM's tokens, averaged).
        The seconds of the first build; of a night on which nothing has changed; of one on which a hundredth of the chunks has; how many
        chunks were embedded each time; and the largest peak of memory of any step.
search  hybrid searches with payloads, 4 access groups of 10 allowed, at 20,000 and 100,000 points: median and 99th
        percentile of the embedded engine, against qdrant-client's local mode at 5,000 points.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from orrery.rag.engines import Condition, Engine, Point, Search
from orrery.rag.engines.edge import EdgeEngine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "rag"))
PROJECT, VERBS = "synthetic", ("collect", "chunk", "embed", "index")
NIGHTS = ("2026-01-05", "2026-01-06", "2026-01-07")
DIMENSIONS, VOCABULARY, SECTIONS, WORDS = 384, 20_000, 100, 45
UNCHANGED_S, CHANGED_S, MEMORY_GB = 60, 300, 2.0
SMALL, LARGE, RIVAL, SEARCHES = 20_000, 100_000, 5_000, 200
ALLOWED = tuple(f"g{i}" for i in range(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("chain", "search"))
    parser.add_argument("--chunks", type=int, default=LARGE)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if asked.only != "search":
            rows += chain(Path(folder), asked.chunks)
        if asked.only != "chain":
            rows += search(Path(folder), min(asked.chunks, LARGE))
    print(json.dumps(rows))


# -- the chain -----------------------------------------------------------------------------------------


@dataclass
class Night:
    """What one reindex took."""

    seconds: dict[str, float]
    peak_gb: dict[str, float]
    chunks: int
    embedded: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def chain(folder: Path, chunks: int) -> list[dict[str, object]]:
    from tiny_embedder import write as embedder

    corpus, home = folder / "corpus", folder / "home"
    model = embedder(folder / "table", dimensions=DIMENSIONS)
    words = vocabulary(model / "tokenizer.json")
    count = chunks // SECTIONS
    for number in range(count):
        write(corpus, words, number)
    house(home, corpus, model)
    first = night(home, NIGHTS[0])
    say("first build", first)
    unchanged = night(home, NIGHTS[1])
    say("nothing changed", unchanged)
    # The hundredth of the documents that is rewritten is a hundredth of the chunks.
    for number in range(0, count, 100):
        write(corpus, words, number, edition=1)
    changed = night(home, NIGHTS[2])
    say("1 % changed", changed)
    assert first.chunks == unchanged.chunks == changed.chunks == count * SECTIONS, first.chunks
    wanted = len(range(0, count, 100)) * SECTIONS
    peak = max(value for one in (first, unchanged, changed) for value in one.peak_gb.values())
    return [
        row(
            "rag_index_first",
            first.total,
            "s",
            first.chunks / first.total,
            f"{first.chunks:,} chunks (ratio: a second)",
        ),
        row("rag_index_unchanged", unchanged.total, "s", UNCHANGED_S / unchanged.total, f"at most {UNCHANGED_S} s"),
        row("rag_index_unchanged_embedded", unchanged.embedded, "chunks", float(unchanged.embedded == 0), "exactly 0"),
        row("rag_index_changed", changed.total, "s", CHANGED_S / changed.total, f"at most {CHANGED_S} s"),
        row("rag_index_changed_embedded", changed.embedded, "chunks", changed.embedded / wanted, f"exactly {wanted:,}"),
        row("rag_index_memory", peak, "GB", MEMORY_GB / peak, f"at most {MEMORY_GB:g} GB, any step"),
    ]


def vocabulary(tokenizer: Path) -> list[str]:
    """Return words that are one token each, mixed."""
    known = json.loads(tokenizer.read_bytes())["model"]["vocab"]
    words = sorted(word for word in known if word.isascii() and word.isalpha() and len(word) > 2)
    random.Random(0).shuffle(words)
    return words


def write(corpus: Path, words: list[str], number: int, edition: int = 0) -> None:
    """Write a document of `SECTIONS` sections, each one chunk long."""
    draw = random.Random(f"{number}/{edition}")
    # Few words are frequent and most are rare, as in a language.
    weights = [1 / (rank + 10) for rank in range(len(words))]
    lines = [f"# Document {words[number % len(words)]} {number}\n"]
    drawn = draw.choices(words, weights, k=SECTIONS * WORDS)
    for section in range(SECTIONS):
        lines.append(f"## Section {section}\n\n{' '.join(drawn[section * WORDS : (section + 1) * WORDS])}.\n")
    file = corpus / f"{number // 100:03d}" / f"{number}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines))


def house(home: Path, corpus: Path, model: Path) -> None:
    project = home / "include" / "projects" / PROJECT
    project.mkdir(parents=True)
    spec = {
        "version": 1,
        "kind": "knowledge_base",
        "owner": "bench",
        "sources": {"corpus": {"uri": f"file://{corpus}"}},
        "embedder": {"model": f"file://{model}"},
    }
    (project / "spec.yaml").write_text(yaml.safe_dump(spec))
    platform = {
        "version": 1,
        "environments": {name: {"image": f"orrery/{name}:1"} for name in ("airflow", "rag", "serve")},
        "compute": {"cpu-light": {"cpu": "1"}, "cpu-small": {"cpu": "1"}},
    }
    (home / "include" / "platform.yaml").write_text(yaml.safe_dump(platform))
    for name in platform["environments"]:
        (home / "docker" / name).mkdir(parents=True)
        (home / "docker" / name / "requirements.txt").write_text("")
    for name in [n for n in os.environ if n.startswith("ORRERY_")]:
        del os.environ[name]
    os.environ |= {
        "ORRERY_HOME": str(home),
        "ORRERY_STORE": f"file://{home / 'store'}",
        "ORRERY_LEDGER": f"sqlite:///{home / 'ledger.db'}",
    }


def night(home: Path, key: str) -> Night:
    """Carry the chain, each step a process of its own, whose memory is looked at ten times a second."""
    from orrery import runner
    from orrery.planner import Plan, Request
    from orrery.rag.planning import KnowledgePlanner

    seconds, peak = dict.fromkeys(VERBS, 0.0), dict.fromkeys(VERBS, 0.0)
    told: dict[str, dict[str, float]] = {}

    def launch(plan: Plan) -> int:
        config = plan.config
        uri = f"{config.store}/{config.folder}"
        argv = [
            sys.executable,
            "-m",
            "orrery",
            "step",
            "--config",
            f"{uri}/config.json",
            "--result",
            f"{uri}/result.json",
        ]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd=home)
        while process.poll() is None:
            peak[config.verb] = max(peak[config.verb], held(process.pid))
            time.sleep(0.1)
        return process.returncode

    for verb in VERBS:
        began = time.monotonic()
        request = Request(PROJECT, verb, (key,), f"night-{key}", verb, actor="bench", kind="knowledge_base")
        result = runner.run(KnowledgePlanner(PROJECT), request, launch)
        seconds[verb] = time.monotonic() - began
        told[verb] = result.metrics if not result.skipped else {**result.metrics, "embedded": 0}
    return Night(seconds, peak, int(told["chunk"]["chunks"]), int(told["embed"]["embedded"]))


def held(pid: int) -> float:
    """Return the memory of a process and all below it now, in GB: what they share counts once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):  # it has ended
        return 0.0
    return own / 1e6 + sum(held(int(child)) for child in below)


def say(name: str, one: Night) -> None:
    each = ", ".join(f"{verb} {one.seconds[verb]:.1f} s {one.peak_gb[verb]:.2f} GB" for verb in VERBS)
    print(f"{name}: {one.total:.1f} s, {one.embedded:,} of {one.chunks:,} chunks embedded ({each})", flush=True)


# -- searches ------------------------------------------------------------------------------------------


def search(folder: Path, most: int) -> list[dict[str, object]]:
    rival = rivals(folder)
    rows = []
    for count in sorted({min(SMALL, most), most}):
        building = EdgeEngine.create(folder / f"edge-{count}", DIMENSIONS, count)
        building.upsert(synthetic(count))
        building.seal()
        building.close()
        engine = EdgeEngine.load(folder / f"edge-{count}")
        median, late = timed(engine)
        engine.close()
        against = f"qdrant-client's local mode, {RIVAL:,} points: {rival * 1e3:.0f} ms (ratio: theirs to ours)"
        rows.append(row(f"rag_search_{count // 1000}k", median * 1e3, "ms, median", rival / median, against))
        rows.append(row(f"rag_search_{count // 1000}k_p99", late * 1e3, "ms, p99", rival / late, against))
    return rows


def rivals(folder: Path) -> float:
    """Return the seconds of a search in qdrant-client's local mode, by the same code as for a server."""
    from qdrant_client import QdrantClient

    from orrery.rag.engines.server import ServerEngine

    engine = ServerEngine.create(QdrantClient(path=str(folder / "local")), "rival", DIMENSIONS, "local")
    engine.upsert(synthetic(RIVAL))
    median, _ = timed(engine, 20)
    engine.close()
    return median


def synthetic(count: int) -> Iterator[Point]:
    """Yield points in clusters, as passages of one subject are, with 40 terms each."""
    draw = np.random.default_rng(1)
    centres = draw.standard_normal((200, DIMENSIONS)).astype(np.float32)
    for number in range(count):
        dense = centres[number % 200] + 0.8 * draw.standard_normal(DIMENSIONS).astype(np.float32)
        terms = np.unique(np.minimum(draw.zipf(1.3, 40), VOCABULARY))
        payload = {
            "groups": [f"g{number % 10}"],
            "source": f"s{number % 3}",
            "document": f"d{number // 20}",
            "uri": f"s/{number // 20}.md",
            "title": "Title",
            "heading": ["One", "Two"],
            "page": None,
            "text": "word " * 150,
            "position": number % 20,
        }
        weights = (terms.tolist(), (0.5 + draw.random(len(terms))).tolist())
        yield Point(str(uuid.UUID(int=number + 1)), dense / np.linalg.norm(dense), weights, payload)


def timed(engine: Engine, searches: int = SEARCHES) -> tuple[float, float]:
    """Return median and 99th percentile of a hybrid search, in seconds."""
    where = (Condition("groups", ALLOWED),)
    spent = []
    for number, point in zip(range(searches + 10), synthetic(SMALL), strict=False):
        draw = np.random.default_rng(number)
        terms = np.unique(np.minimum(draw.zipf(1.3, 8), VOCABULARY)).tolist()
        asked = Search(where, np.asarray(point.dense, np.float32), (terms, [1.0] * len(terms)))
        began = time.perf_counter()
        found = engine.search(asked)
        spent.append(time.perf_counter() - began)
        assert len(found) == asked.limit
    spent = sorted(spent[10:])
    return statistics.median(spent), spent[int(0.99 * len(spent))]


def row(name: str, value: float, unit: str, ratio: float, against: str) -> dict[str, object]:
    return {"name": name, "value": value, "unit": unit, "against": against, "ratio": ratio}


if __name__ == "__main__":
    main()
