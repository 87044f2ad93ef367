"""The embedder of a spec, made once and kept in the store: `_embedders/<id>/`, whose embedder.json is put last.

Two runs that make the same one at once do no harm: each file is put only when it is not there, and either's will do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from orrery.errors import USER, OrreryError, SpecError, TryAgain
from orrery.log import get
from orrery.rag.embedding import source as sources
from orrery.rag.embedding.session import FACTS, FOLDER, MODEL, TOKENIZER, Facts
from orrery.rag.spec import Embedding
from orrery.store import Store
from orrery.uri import masked


def prepare(store: Store, wanted: Embedding, scratch: Path, folder: Path = Path()) -> str:
    """Return the id of the spec's embedder, which is in the store then. torch is used only when it was not yet there.

    A relative `model` is taken from `folder`, the project's. Raises `SpecError` or `UserError` for a model that cannot
    be used, `TryAgain` when there is too little memory.
    """
    origin = sources.source(wanted, scratch / "model", folder)
    facts = sources.facts(origin, wanted)
    if store.exists(f"{FOLDER}/{facts.id}/{FACTS}"):
        return facts.id
    made = scratch / "made" / facts.id
    if origin.exported is not None:
        _take(origin, made, facts)
    else:
        get().info("the embedder is exported to ONNX, once", model=masked(wanted.model), id=facts.id)
        _make(origin, made, facts)
    for name in (MODEL, TOKENIZER, FACTS):
        store.put_if_absent(f"{FOLDER}/{facts.id}/{name}", (made / name).read_bytes())
    shutil.rmtree(made)
    return facts.id


def _take(origin: sources.Source, target: Path, facts: Facts) -> None:
    """Copy an embedder that is exported already, under its id."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, TOKENIZER):
        shutil.copyfile(origin.need(name), target / name)
    (target / FACTS).write_text(json.dumps(facts.told(), sort_keys=True, indent=1) + "\n")


def _make(origin: sources.Source, target: Path, facts: Facts) -> None:
    """Export in a process of its own (see `graph`)."""
    given = sources.gathered(origin, target.with_name(f"{facts.id}-source"))
    told = json.dumps(facts.told())
    argv = [sys.executable, "-m", "orrery.rag.embedding.graph", str(given), str(target), told]
    env = {**os.environ, "ORRERY_PARENT": str(os.getpid())}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, errors="replace")
    shutil.rmtree(given)
    if done.returncode:
        raise _told(done.returncode, done.stderr)


def _told(code: int, said: str) -> OrreryError:
    last = [line for line in said.splitlines() if line.strip()][-1:]
    if code == USER:
        try:
            told = json.loads(last[0])
            return SpecError(str(told["message"]), hint=str(told["hint"]))
        except (IndexError, ValueError, KeyError, TypeError):
            pass  # it did not come to its last line
    if code < 0 or "MemoryError" in said:
        return TryAgain(
            f"the embedder's export was killed (exit code {code})",
            hint="often out of memory: it takes four times the weights and a gigabyte; give `embedder.compute` more",
        )
    return OrreryError(f"the embedder's export failed (exit code {code})", hint="\n".join(said.splitlines()[-15:]))
