"""serve_*: the service without a language model, as a process of its own, asked over HTTP with tokens.

    serve_p50, serve_p99       milliseconds at 20 questions a second, arriving at random (open loop: a question that has
                               to wait counts from when it was due), search, extractive answer and all; best of 2 rounds
    serve_overload_refused     share answered by 503 at ten times the rate; the others are answered
    serve_overload_errors      anything else than 200 and 503 (Retry-After), hang-ups too
    serve_overload_memory      growth of the service's memory from the first seconds of it to the last

2,000 passages with the text of the handbook and the real embedder for the questions; the passages' own vectors are
random, which costs a search the same. The asker runs on the same cores, so its time is in the figures.
`python bench_serve.py build FOLDER` makes the store, in the environment `rag`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENVS = Path(os.environ.get("ORRERY_VENVS", ROOT / ".venvs"))
HANDBOOK = ROOT / "include" / "projects" / "handbook"
PROJECT = "handbook"
PASSAGES, RATE, ROUNDS, SECONDS, OVERLOAD_S = 2000, 20.0, 2, 15.0, 12.0
START_S = 60.0
GOOD_P50_MS, GOOD_P99_MS = 50.0, 200.0


# -- the store, made in the environment rag ------------------------------------------------------------


def build(folder: Path) -> None:
    """Put the embedder, one generation and live.json into a store."""
    import numpy as np

    from orrery.rag.embedding.export import prepare
    from orrery.rag.embedding.session import Embedder, store_folder
    from orrery.rag.embedding.sparse import fit
    from orrery.rag.engines import Point
    from orrery.rag.spec import Embedding
    from orrery.store import Store

    store = Store(f"file://{folder / 'store'}")
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    embedder = Embedder.open(store_folder(store, prepare(store, Embedding(), scratch), scratch))
    made = passages(PASSAGES)
    model, (starts, indices, values) = fit(p["text"] for p in made)
    rng = np.random.default_rng(0)
    points = []
    for i, payload in enumerate(made):
        dense = rng.standard_normal(embedder.dimensions).astype(np.float32)
        part = slice(int(starts[i]), int(starts[i + 1]))
        sparse = (indices[part].tolist(), values[part].tolist())
        points.append(Point(payload.pop("id"), dense / np.linalg.norm(dense), sparse, payload))
    publish(store, points, embedder.id, embedder.dimensions, model.told(), scratch)


def publish(store, points, embedder: str, dimensions: int, sparse: dict, scratch: Path) -> None:
    """Commit a generation as `index` does, and make it the live one as `promote` does."""
    from orrery.rag.engines import archive
    from orrery.rag.engines.edge import EdgeEngine
    from orrery.rag.generations import FACTS, POINTS, SHARD
    from orrery.store import Manifest, content_digest

    engine = EdgeEngine.create(scratch / "index", dimensions, len(points))
    engine.upsert(points)
    engine.seal()
    engine.close()
    archive.pack(scratch / "index", scratch / SHARD)
    ids = "".join(f"{p.id}\n" for p in sorted(points, key=lambda p: p.id))
    facts = {"backend": "embedded", "count": len(points), "embedder": embedder, "dimensions": dimensions}
    facts |= {"ids": hashlib.sha256(ids.encode()).hexdigest(), "sparse": sparse}
    (scratch / FACTS).write_text(json.dumps(facts))
    (scratch / POINTS).write_text(ids)
    folder = f"{PROJECT}/index/{'b' * 32}"
    files = {}
    for name in (SHARD, FACTS, POINTS):
        file = store.upload(scratch / name, f"{folder}/1/{name}")
        files[name] = file.model_copy(update={"path": f"1/{name}"})
    manifest = Manifest(
        project=PROJECT, verb="index", key="2026-01-05", address="b" * 32, digest=content_digest(files), files=files
    )
    store.put(manifest.path, manifest.model_dump_json().encode())
    live = {"version": 1, "generation": manifest.path, "digest": manifest.digest, "evaluation": None, "proven": False}
    store.put(f"{PROJECT}/live.json", json.dumps(live).encode())


def passages(count: int) -> list[dict]:
    """Return passages of about 130 words, cut from the handbook's pages over and over."""
    import uuid

    text = "\n".join(p.read_text() for p in sorted((HANDBOOK / "documents").rglob("*.md")))
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n+", text) if len(s.split()) > 4]
    draw = random.Random(0)
    made = []
    for n in range(count):
        some: list[str] = []
        while sum(len(s.split()) for s in some) < 130:
            some.append(draw.choice(sentences))
        uri = f"guides/{n // 5}.md"
        made.append(
            {
                "id": str(uuid.UUID(int=n)),
                "document": hashlib.sha256(uri.encode()).hexdigest()[:32],
                "source": "guides",
                "uri": uri,
                "title": f"Page {n // 5}",
                "groups": ["everyone"],
                "heading": ["Part", str(n % 5)],
                "page": None,
                "text": " ".join(some),
                "position": n % 5,
            }
        )
    return made


def questions() -> list[str]:
    """Return the handbook's labelled questions; each is asked once before any is asked again."""
    rows = [json.loads(line) for line in (HANDBOOK / "questions.jsonl").read_text().splitlines() if line.strip()]
    return [row["question"] for row in rows]


# -- the asker -----------------------------------------------------------------------------------------


@dataclass
class Heard:
    """What came back: seconds of the answers, and how often what."""

    seconds: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    def percentile(self, share: float) -> float:
        """Return a percentile in milliseconds."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def load(url: str, token: str, rate: float, seconds: float, seed: int) -> Heard:
    """Ask at random moments, `rate` a second, whatever the answers take."""
    import httpx

    draw, asked, heard = random.Random(seed), questions(), Heard()
    draw.shuffle(asked)
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(timeout=30, limits=limits, headers=headers) as client, asyncio.TaskGroup() as tasks:

        async def one(question: str, due: float) -> None:
            try:
                done = await client.post(f"{url}/query", json={"question": question})
            except httpx.HTTPError as e:
                heard.ends[type(e).__name__] += 1
                return
            if done.status_code == 200:
                heard.seconds.append(time.perf_counter() - due)
            fine = done.status_code == 200 or (done.status_code == 503 and "retry-after" in done.headers)
            heard.ends[str(done.status_code) if fine else f"bad {done.status_code}"] += 1

        began, due, number = time.perf_counter(), 0.0, 0
        while (due := due + draw.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            # Numbered when all were asked once: the service must not answer from memory.
            question = asked[number % len(asked)] + ("" if number < len(asked) else f" ({seed} {number})")
            tasks.create_task(one(question, began + due))
            number += 1
    return heard


def resident(pid: int) -> float:
    """Return a process's memory in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


# -- the service ---------------------------------------------------------------------------------------


def start(folder: Path) -> tuple[subprocess.Popen[str], str, str]:
    """Start the service; return the process, its address and a token."""
    project = folder / "projects" / PROJECT
    project.mkdir(parents=True, exist_ok=True)
    spec = {"version": 1, "kind": "knowledge_base", "owner": "bench", "sources": {"guides": {"uri": "guides"}}}
    (project / "spec.yaml").write_text(json.dumps(spec))
    env = {k: v for k, v in os.environ.items() if not k.startswith("ORRERY_")}
    env |= {"ORRERY_PROJECTS": str(project.parent), "ORRERY_STORE": f"file://{folder / 'store'}", "ORRERY_LOG": "json"}
    env |= {"ORRERY_HOME": str(ROOT), "ORRERY_SERVE_TOKENS": str(folder / "tokens.yaml")}
    (folder / "tokens.yaml").unlink(missing_ok=True)
    argv = [sys.executable, "-m", "orrery.serving"]
    token = subprocess.run(
        [*argv, "token", "bench"], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    log = (folder / "log").open("w+")
    process = subprocess.Popen([*argv, PROJECT, "--port", "0"], env=env, stdout=log, stderr=log, text=True)
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        lines = [json.loads(x) for x in (folder / "log").read_text().splitlines() if x.startswith("{")]
        if any(x["event"] == "live" for x in lines):
            return process, next(x["url"] for x in lines if x["event"] == "listening"), token
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the service did not start:\n{(folder / 'log').read_text()[-3000:]}")


def row(name: str, value: float, unit: str, against: str, ratio: float) -> dict[str, object]:
    return {"name": name, "value": value, "unit": unit, "against": against, "ratio": ratio}


def measure(folder: Path) -> list[dict[str, object]]:
    process, url, token = start(folder)
    try:
        asyncio.run(load(url, token, RATE, 3, seed=99))  # first strides
        rounds = [asyncio.run(load(url, token, RATE, SECONDS, seed)) for seed in range(ROUNDS)]
        assert all(set(r.ends) == {"200"} for r in rounds), [r.ends for r in rounds]
        first = asyncio.run(load(url, token, 10 * RATE, 3, seed=10))
        before = resident(process.pid)
        heavy = asyncio.run(load(url, token, 10 * RATE, OVERLOAD_S, seed=11))
        after = resident(process.pid)
        ends = first.ends + heavy.ends
        later = asyncio.run(load(url, token, RATE, 3, seed=12))
        process.send_signal(signal.SIGTERM)
        code = process.wait(15)
    finally:
        process.kill()
        process.wait()
    assert code == 0, code
    assert set(later.ends) == {"200"}, later.ends
    total = sum(heavy.ends.values())
    p50, p99 = min(r.percentile(0.5) for r in rounds), min(r.percentile(0.99) for r in rounds)
    errors = sum(n for end, n in ends.items() if end not in ("200", "503"))
    print(
        f"rounds p50/p99: {[(round(r.percentile(0.5), 1), round(r.percentile(0.99), 1)) for r in rounds]}; overload {dict(heavy.ends)}"
    )
    return [
        row("serve_p50", p50, "ms", f"at most {GOOD_P50_MS:g} at {RATE:g}/s", GOOD_P50_MS / p50),
        row("serve_p99", p99, "ms", f"at most {GOOD_P99_MS:g} at {RATE:g}/s", GOOD_P99_MS / p99),
        row(
            "serve_overload_refused",
            100 * heavy.ends["503"] / total,
            "% 503",
            f"{10 * RATE:g}/s; {heavy.ends['200'] / OVERLOAD_S:.0f} answered a second, p99 {heavy.percentile(0.99):.0f} ms",
            heavy.ends["200"] / total,
        ),
        row("serve_overload_errors", errors, "requests", f"of {sum(ends.values())}: none", float(errors == 0)),
        row("serve_overload_memory", after - before, "MB", f"{before:.0f} MB before (ratio: after to before)", after / before),
    ]  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["build"]:
        build(Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        argv = [str(VENVS / "rag" / "bin" / "python"), __file__, "build", name]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        print(json.dumps(measure(Path(name))))


if __name__ == "__main__":
    main()
