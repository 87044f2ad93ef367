"""Remove from an installed environment what no step uses: packages' tests, headers, static libraries, debug symbols.

    slim.py .venvs/ml --torch cpu

Before a package's tests go, all that stays is searched for imports of them; what is imported stays. Some environments
use a part of a package alone (UNUSED, with the reasons); what they do use is imported at the end. Checks as well that
torch is the build that was asked for, since an index may give the other one.
"""

# ruff: noqa: T201  what it prints is for the terminal

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = ("tests", "test")
# Below site-packages. Headers and CMake files serve compilers, of which there is none; torch/test and the programs
# in torch/bin are torch's own tests (torch_shm_manager is not: loaders share tensors through it).
FOLDERS = (
    "torch/include", "torch/share/cmake", "torch/test", "pyarrow/include", "pyarrow/src",
    "pyspark/examples", "pyspark/data", "jupyterlab_plotly",
)  # fmt: skip
# onnxruntime's library for programs in C: Python's module has the whole runtime in itself.
FILES = ("**/*.a", "**/*.js.map", "**/*.css.map", "onnxruntime/capi/libonnxruntime.so.*")
# Rust's symbol tables, which no one links to: a fifth of these libraries.
SYMBOLS = ("qdrant_edge/*.so", "tokenizers/*.so", "hf_xet/*.so")
KEPT_PROGRAMS = ("torch_shm_manager",)
IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+([^#\n]+)|import[ \t]+([\w., ]+))", re.MULTILINE
)


@dataclass(frozen=True)
class Unused:
    """What an environment does not use of a package: patterns below site-packages, and names that stay all the same."""

    why: str
    gone: tuple[str, ...]
    kept: tuple[str, ...] = ()


S3_ALONE = Unused(
    "botocore describes 400 services; a store is S3, and the others give credentials for it",
    ("botocore/data/*/",),
    ("s3", "sts", "sso", "sso-oidc", "signin"),
)
NO_DATABASE = Unused(
    "only the orchestrator talks to the ledger: no SQL server is asked from here",
    ("psycopg*", "sqlalchemy/testing", "sqlalchemy/dialects/m*sql", "sqlalchemy/dialects/oracle"),
)
NO_HUB = Unused("models come from the store, never from a hub", ("huggingface_hub*", "hf_xet*"))
NO_STUBS = Unused("stubs of types are for type checkers", ("**/*.pyi",))
FEW_LEXERS = Unused(
    "rich colours Python at most",
    ("pygments/lexers/*.py", "pygments/lexers/__pycache__/*"),
    ("__init__", "_mapping", "python", "special"),
)
# An environment that is not named here uses what it has installed.
UNUSED = {
    "serve": (
        S3_ALONE,
        NO_DATABASE,
        NO_HUB,
        NO_STUBS,
        FEW_LEXERS,
        Unused(
            "onnxruntime runs models here, and makes none",
            ("onnxruntime/transformers", "onnxruntime/quantization", "onnxruntime/tools"),
        ),
        Unused(
            "nothing is compiled against numpy, and _simd is for its tests",
            ("numpy/distutils", "numpy/f2py", "numpy/_core/include", "numpy/_core/_simd*.so", "numpy/random/lib"),
        ),
    ),
    "llm": (S3_ALONE, NO_DATABASE, NO_STUBS, FEW_LEXERS),
    "rag": (S3_ALONE,),
}
# What an environment is for, to be imported when all is removed: a build that lacks it must not end well. (xllamacpp
# wants a library of Debian's, which only the image that ships has: tests/prove_images.py has it write.)
USED = {
    "serve": (
        *("fastapi", "uvicorn", "uvloop", "prometheus_client", "openai", "numpy", "numpy.random", "onnxruntime"),
        *("tokenizers", "Stemmer", "qdrant_client", "qdrant_edge"),
        *("s3fs", "sqlalchemy.dialects.sqlite", "rich.traceback"),
    ),
    "llm": ("s3fs", "sqlalchemy.dialects.sqlite", "rich.traceback"),
    "rag": ("torch", "onnx", "onnxruntime", "tokenizers", "sklearn", "qdrant_client", "qdrant_edge", "s3fs", "psycopg"),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--torch", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    site = next(args.environment.glob("lib/python3*/site-packages"))
    if wrong := wrong_torch(site, args.torch):
        print(wrong, file=sys.stderr)
        return 1
    before = size(args.environment)
    imported = imports_of_tests(site)
    for folder in test_folders(site):
        if dotted(site, folder) in imported:
            print(f"kept: {folder.relative_to(site)}, which other modules import")
        else:
            shutil.rmtree(folder)
    for name in FOLDERS:
        shutil.rmtree(site / name, ignore_errors=True)
    shutil.rmtree(args.environment / "share" / "jupyter", ignore_errors=True)
    for pattern in FILES:
        for file in site.glob(pattern):
            file.unlink()
    for unused in UNUSED.get(args.environment.name, ()):
        if stale := remove(site, unused):
            print(stale, file=sys.stderr)
            return 1
    for file in (site / "torch" / "bin").glob("*"):
        if file.name not in KEPT_PROGRAMS:
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    debug = [f for f in site.rglob("*.so*") if has_debug_information(f)]
    symbols = [f for pattern in SYMBOLS for f in site.glob(pattern)]
    told = strip(debug, "--strip-debug") or strip(symbols, "--strip-unneeded") or missed(args.environment)
    if told:
        print(told, file=sys.stderr)
        return 1
    after = size(args.environment)
    print(f"{args.environment}: {before / 1e6:,.0f} MB, {(before - after) / 1e6:,.0f} MB of it not needed and removed")
    return 0


def wrong_torch(site: Path, wanted: str) -> str:
    """Return what is wrong with torch's build, or nothing (no torch included)."""
    file = site / "torch" / "version.py"
    if not file.is_file():
        return ""
    found = "cpu" if re.search(r"^cuda\b[^=]*= None", file.read_text(), re.MULTILINE) else "cuda"
    if found == wanted:
        return ""
    hint = "--wheels FOLDER or --torch-index URL of docker/images.py gives the one that is wanted"
    return f"error: torch is a {found} build, wanted is {wanted}: the index has given another\n  → {hint}"


def test_folders(site: Path) -> list[Path]:
    """Return the outermost folders of tests."""
    found = [p for name in TESTS for p in site.rglob(name) if p.is_dir() and p.parent != site]
    return [p for p in sorted(found) if not any(q in p.parents for q in found)]


def dotted(site: Path, folder: Path) -> str:
    """Return the module name of a folder."""
    return ".".join(folder.relative_to(site).parts)


def imports_of_tests(site: Path) -> set[str]:
    """Return the test packages that modules outside of all tests import."""
    found: set[str] = set()
    for file in site.rglob("*.py"):
        parts = file.relative_to(site).parts
        if any(p in TESTS for p in parts[:-1]):
            continue
        text = file.read_bytes()
        if b"test" in text:
            found.update(m for name in imported(text, parts) for m in above(name))
    return found


def imported(text: bytes, parts: tuple[str, ...]) -> Iterator[str]:
    """Yield the full names of what a module at `parts` imports."""
    for source, names, plain in IMPORT.findall(text):
        if plain:
            yield from (n.split(" as ")[0].strip() for n in plain.decode().split(","))
            continue
        module = source.decode()
        level = len(module) - len(module.lstrip("."))
        base = ".".join([*parts[: len(parts) - level], module.lstrip(".")] if level else [module]).strip(".")
        yield base
        yield from (f"{base}.{n.split(' as ')[0].strip(' ()')}" for n in names.decode().split(","))


def above(name: str) -> Iterator[str]:
    """Yield each of a module's parents, itself included, that is called like tests."""
    parts = name.split(".")
    yield from (".".join(parts[: n + 1]) for n, part in enumerate(parts) if part in TESTS)


def has_debug_information(file: Path) -> bool:
    """Tell whether a shared library of a package's own has any; repacked system libraries (*.libs) are left alone."""
    own = file.is_file() and not file.is_symlink() and not file.parent.name.endswith(".libs")
    return own and b".debug_info\0" in file.read_bytes()


def strip(files: list[Path], what: str) -> str:
    """Remove what only debuggers and linkers read; return what went wrong, or nothing."""
    if not files:
        return ""
    done = subprocess.run(["strip", what, *map(str, files)], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def remove(site: Path, unused: Unused) -> str:
    """Remove what an environment does not use; return what is wrong with the list, or nothing."""
    for pattern in unused.gone:
        found = [p for p in site.glob(pattern) if p.name.split(".")[0] not in unused.kept]
        if not found:
            return f"error: {pattern} ({unused.why}) matches nothing: has the package changed? see UNUSED in slim.py"
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return ""


def missed(environment: Path) -> str:
    """Import what an environment is for; return what is missing now, or nothing."""
    wanted = USED.get(environment.name, ())
    if not wanted:
        return ""
    argv = [str(environment / "bin" / "python"), "-B", "-c", "; ".join(f"import {name}" for name in wanted)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


if __name__ == "__main__":
    raise SystemExit(main())
