"""Make the local environments: one virtual environment per `docker/<env>/requirements.txt`.

    python3.11 docker/venv.py airflow ml spark     make or refresh those under .venvs/
    python3.11 docker/venv.py --test airflow       with what the tests need inside it as well
    python3.11 docker/venv.py --lock               write every requirements.txt anew from pyproject.toml

Only the standard library is needed. uv is fetched into `.venvs/tools`. An environment whose
requirements have not changed since it was made is left alone, so a second run takes no time.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
VENVS = Path(os.environ.get("ORRERY_VENVS") or ROOT / ".venvs")
UV_VERSION = "0.13.9"
NETWORK = "is there a network, and does pip's own configuration (pip config list) reach a package index?"
ENVIRONMENTS = ("airflow", "ml", "spark", "cloud", "rag", "serve", "llm")
# Installed as locked, without asking each package what it depends on: see [tool.uv] in pyproject.toml.
NO_DEPS = ("llm",)
# The demo's data and the benchmarks' rivals: each in a folder of its own, without what it depends on.
DATA = {
    "upstream": ROOT / "include" / "demo" / "requirements.txt",
    "bench": ROOT / "tests" / "benchmarks" / "requirements.txt",
}
# torch is pinned by hand below: its CPU build carries a local version (2.13.0+cpu) and its CUDA
# packages follow from it, so neither belongs in a file that both kinds of machine install.
NOT_LOCKED = ("torch", "triton")
CUDA = ("nvidia-", "cuda-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "environments", nargs="*", metavar="ENV", help="one of: " + ", ".join((*ENVIRONMENTS, "dev", *DATA))
    )
    parser.add_argument("--test", action="store_true", help="add tests/requirements.txt to each environment")
    parser.add_argument("--lock", action="store_true", help="re-resolve every requirements.txt from pyproject.toml")
    args = parser.parse_args()
    known = (*ENVIRONMENTS, "dev", *DATA)
    for name in args.environments:
        if name not in known:
            parser.error(f"unknown environment {name!r}; known: {', '.join(known)}")
    VENVS.mkdir(parents=True, exist_ok=True)
    with (VENVS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once would write into one environment
        uv = fetch_uv()
        if args.lock:
            lock_all(uv)
        for name in args.environments:
            if name in DATA:
                fetch_data(uv, name)
            else:
                make(uv, name, with_tests=args.test and name != "dev")
    return 0


class Failed(Exception):
    """A command that we need has failed: what was being done, and what may help."""


def run(what: str, argv: list[str], hint: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed. Raises `Failed`; what it printed has said why."""
    try:
        done = subprocess.run(argv, text=True, check=False, **options)
    except OSError as e:
        raise Failed(f"{what}: {argv[0]}: {e.strerror}\n  → {hint}") from None
    if done.returncode:
        said = f"\n{done.stderr.strip()[-1000:]}" if done.stderr else ""
        raise Failed(f"{what}: {Path(argv[0]).name} ended with {done.returncode}{said}\n  → {hint}")
    return done


def fetch_uv() -> Path:
    """Return the project's own uv, fetched by pip on first use (pip knows the user's index and proxies)."""
    uv = VENVS / "tools" / "bin" / "uv"
    stamp = VENVS / "tools" / ".uv-version"
    if uv.exists() and stamp.exists() and stamp.read_text() == UV_VERSION:
        return uv
    made = [sys.executable, "-m", "venv", "--clear", str(VENVS / "tools")]
    run("making .venvs/tools", made, "this Python needs venv and ensurepip: on Debian, apt install python3.11-venv")
    pip = [str(VENVS / "tools" / "bin" / "python"), "-m", "pip", "install", "--quiet", f"uv=={UV_VERSION}"]
    run("fetching uv", pip, NETWORK)
    stamp.write_text(UV_VERSION)
    return uv


def pip_setting(name: str) -> str:
    """Return pip's own setting `name` (the environment wins over the files), or an empty string."""
    from_env = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if from_env:
        return from_env
    got = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", f"global.{name}"], capture_output=True, text=True, check=False
    )
    return got.stdout.strip() if got.returncode == 0 else ""


def uv_environment() -> dict[str, str]:
    """Hand pip's configuration on to uv, which does not read it; a variable of uv's own wins.

    With an extra index pip takes the best version of all, uv the first index that knows the package unless told.
    """
    env = dict(os.environ)
    env.setdefault("UV_PYTHON_DOWNLOADS", "never")
    env.setdefault("UV_LINK_MODE", "hardlink")
    env.setdefault("UV_CACHE_DIR", str(VENVS / "cache"))
    extra = [url for url in pip_setting("extra-index-url").split() if usable(url)]
    given = {
        "UV_DEFAULT_INDEX": pip_setting("index-url"),
        "UV_INDEX": " ".join(extra),
        "UV_INDEX_STRATEGY": "unsafe-best-match" if extra else "",
        "UV_FIND_LINKS": ",".join(pip_setting("find-links").split()),
        "SSL_CERT_FILE": pip_setting("cert"),
    }
    for name, value in given.items():
        if value:
            env.setdefault(name, value)
    return env


def usable(index: str) -> bool:
    """Tell whether uv can ask an extra index: pip passes over a folder that is not there, uv fails."""
    parts = urlsplit(index)
    return parts.scheme in ("http", "https") or (parts.scheme == "file" and Path(unquote(parts.path)).is_dir())


def digest(files: list[Path]) -> str:
    """Return the digest of what an environment is made of."""
    h = hashlib.sha256(UV_VERSION.encode())
    for file in files:
        h.update(file.read_bytes())
    return h.hexdigest()


def make(uv: Path, name: str, *, with_tests: bool) -> None:
    """Create or refresh `.venvs/<name>`; leave it alone when nothing changed."""
    home = VENVS / name
    python = home / "bin" / "python"
    base = ROOT / "tests" / "dev.txt" if name == "dev" else ROOT / "docker" / name / "requirements.txt"
    files = [base] + ([ROOT / "tests" / "requirements.txt"] if with_tests else [])
    wanted = digest([*files, ROOT / "pyproject.toml"])
    stamp = home / (".digest-test" if with_tests else ".digest")
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    began = time.monotonic()
    print(f"environment {name}: installing {', '.join(str(f.relative_to(ROOT)) for f in files)}", flush=True)
    env = uv_environment()
    # A stamp from before must not survive a half-finished refresh.
    for old in home.glob(".digest*"):
        old.unlink()
    if not sound(home):
        # Killed while it was made, or its Python has moved: what is there is of no use.
        made = [str(uv), "venv", "-q", "--clear", "--python", sys.executable, str(home)]
        run(f"making environment {name}", made, f"remove {home}, then run it again", env=env)
    # --exact: what is pinned no more leaves. One call, or the second would remove what the first has brought.
    install = [str(uv), "pip", "install", "-q", "--exact", "--compile-bytecode", "--python", str(python)]
    if name in NO_DEPS:
        install.append("--no-deps")
    for file in files:
        install += ["-r", str(file)]
    if name != "dev":
        install += ["-e", str(ROOT)]
    run(f"installing environment {name}", install, NETWORK, env=env)
    stamp.write_text(wanted)
    if with_tests:
        (home / ".digest").write_text(digest([base, ROOT / "pyproject.toml"]))
    print(f"environment {name}: ready in {time.monotonic() - began:.0f} s", flush=True)


def sound(home: Path) -> bool:
    """Tell whether an environment was made to its end and its Python still runs."""
    python = home / "bin" / "python"
    if not (home / "pyvenv.cfg").is_file() or not os.access(python, os.X_OK):
        return False
    return subprocess.run([str(python), "-c", ""], capture_output=True, check=False).returncode == 0


def fetch_data(uv: Path, name: str) -> None:
    """Fetch packages into the folder `.venvs/<name>`, outside every environment."""
    home, stamp = VENVS / name, VENVS / name / ".digest"
    wanted = digest([DATA[name]])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(home, ignore_errors=True)  # of an earlier pin nothing may stay
    install = [str(uv), "pip", "install", "-q", "--no-deps", "--target", str(home), "-r", str(DATA[name])]
    run(f"fetching {name}", [*install, "--python", sys.executable], NETWORK, env=uv_environment())
    stamp.write_text(wanted)


def lock_all(uv: Path) -> None:
    """Resolve every environment anew. The files name no index, so they install from anyone's."""
    env = uv_environment()
    common = [str(uv), "pip", "compile", "-q", "--universal", "--python-version", "3.11"]
    common += ["--no-emit-index-url", "--no-emit-find-links", "--no-header", "--no-annotate", "--upgrade"]
    jobs = [(["--extra", e], ROOT / "docker" / e / "requirements.txt") for e in ENVIRONMENTS]
    jobs.append((["--group", "dev"], ROOT / "tests" / "dev.txt"))
    # What the tests add sits inside every environment, so it may not pull anything the environments pin.
    jobs.append((["--group", "test"], ROOT / "tests" / "requirements.txt"))
    for options, target in jobs:
        print(f"locking {target.relative_to(ROOT)}", flush=True)
        source = [] if "--group" in options else ["pyproject.toml"]
        argv = [*common, *options, *source]
        out = run(f"locking {target.name}", argv, NETWORK, env=env, cwd=ROOT, capture_output=True)
        lines = [
            line for line in out.stdout.splitlines() if not line.startswith((*CUDA, *(f"{n}==" for n in NOT_LOCKED)))
        ]
        if any(line.startswith("torch==") for line in out.stdout.splitlines()):
            lines.append(next(line for line in pyproject_pins() if line.startswith("torch==")))
        header = f"# Written by `make lock` from pyproject.toml ({' '.join(options)}). Do not edit."
        target.write_text("\n".join([header, *sorted(lines)]) + "\n")


def pyproject_pins() -> list[str]:
    """Return the dependency strings of the `ml` extra."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [str(d) for d in project["optional-dependencies"]["ml"]]


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except Failed as e:
        raise SystemExit(f"error: {e}") from None
    except OSError as e:
        raise SystemExit(f"error: {e.filename or VENVS}: {e.strerror}\n  → may it be written?") from None
