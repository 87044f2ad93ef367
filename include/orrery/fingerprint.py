"""What a pure step's output depends on, as one digest; equal digest, equal output, so the work is skipped.

Fingerprint = the step's code (the import closure of its module inside `orrery`, read from the sources and
not imported) + the project bundle + the environment's pins + the canonical config + the digests of the
inputs. URIs, resources, secrets and the clock are left out.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from orrery.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def _source(module: str) -> Path | None:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports(module: str, file: Path) -> set[str]:
    """Return the orrery modules that `file` imports anywhere, inside functions as well."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.split(".")[0] == "orrery")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
            if base.split(".")[0] == "orrery":
                found.add(base)
                found.update(f"{base}.{a.name}" for a in node.names)
    # Importing a.b.c runs a/__init__ and a.b/__init__ as well.
    found |= {".".join(m.split(".")[:n]) for m in {module, *found} for n in range(1, m.count(".") + 1)}
    return {m for m in found if _source(m)}


# The machinery that carries a step says nothing about what it computes: a better error message in the
# store must not retrain every model. What shapes an output lives in the subject rooms and these few.
MACHINERY = frozenset(
    f"orrery{m}"
    for m in (
        "",
        ".errors",
        ".store",
        ".lease",
        ".contract",
        ".step",
        ".log",
        ".bundle",
        ".platform",
        ".uri",
        ".databases",
        ".yamlfile",
        ".registry.tracking",
        ".registry.client",
        ".catalogue",
        # The parts of a knowledge base's spec that a verb reads are in its config's digest, with their defaults.
        ".rag.spec",
        ".rag.contract",
    )
)


@lru_cache(maxsize=64)
def closure(module: str) -> tuple[str, ...]:
    """Return the modules that `module` consists of, itself included, sorted."""
    seen: set[str] = set()
    queue = [module]
    while queue:
        here = queue.pop()
        file = _source(here)
        if here in seen or here in MACHINERY or file is None:
            continue
        seen.add(here)
        queue.extend(_imports(here, file))
    return tuple(sorted(seen))


@lru_cache(maxsize=64)
def code(module: str) -> str:
    """Return the digest of a step's code."""
    h = hashlib.sha256()
    for name in closure(module):
        file = _source(name)
        assert file is not None
        h.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return h.hexdigest()


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: the same value, the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """Return sha256 over the canonical JSON of a value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@lru_cache(maxsize=32)
def _file_digest(path: Path, mtime: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pins(home: Path, environment: str) -> str:
    """Return the digest of an environment's pinned requirements."""
    file = home / "docker" / environment / "requirements.txt"
    try:
        return _file_digest(file, file.stat().st_mtime_ns)
    except OSError as e:
        raise UserError(
            f"{file}: {e.strerror}", hint=f"it holds the pins of environment {environment!r}: make lock"
        ) from None
