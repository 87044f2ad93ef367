"""Remove from an installed environment what no step uses: packages' tests, headers, static libraries, debug symbols.

    slim.py .venvs/ml --torch cpu

Before a package's tests go, all that stays is searched for imports of them; what is imported stays. Checks as
well that torch is the build that was asked for, since an index may give the other one.
"""

# ruff: noqa: T201  what it prints is for the terminal

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = ("tests", "test")
# Below site-packages. Headers and CMake files serve compilers, of which there is none; torch/test and the programs
# in torch/bin are torch's own tests (torch_shm_manager is not: loaders share tensors through it).
FOLDERS = (
    "torch/include", "torch/share/cmake", "torch/test", "pyarrow/include", "pyarrow/src",
    "pyspark/examples", "pyspark/data", "jupyterlab_plotly",
)  # fmt: skip
FILES = ("**/*.a", "**/*.js.map", "**/*.css.map")
KEPT_PROGRAMS = ("torch_shm_manager",)
IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+([^#\n]+)|import[ \t]+([\w., ]+))", re.MULTILINE
)


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
    for file in (site / "torch" / "bin").glob("*"):
        if file.name not in KEPT_PROGRAMS:
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    if told := strip([f for f in site.rglob("*.so*") if has_debug_information(f)]):
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


def strip(files: list[Path]) -> str:
    """Remove debug information, which only a debugger reads; return what went wrong, or nothing."""
    if not files:
        return ""
    done = subprocess.run(["strip", "--strip-debug", *map(str, files)], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


if __name__ == "__main__":
    raise SystemExit(main())
