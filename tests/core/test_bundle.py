"""The project folder as an archive, and the fingerprint of code."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from core_house import ROOT

from orrery import bundle, fingerprint
from orrery.errors import SpecError, UserError
from orrery.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "delays"
    (made / "sub").mkdir(parents=True)
    (made / "spec.yaml").write_text("version: 1\n")
    (made / "features.py").write_text("from .helper import VALUE\nTWICE = 2 * VALUE\n")
    (made / "helper.py").write_text("from .sub import deep\nVALUE = deep.VALUE\n")
    (made / "sub" / "__init__.py").write_text("")
    (made / "sub" / "deep.py").write_text("VALUE = 21\n")
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


def forge(digest: str, store: Store, members: dict[str, bytes], link: str = "") -> None:
    """Put an archive under a digest that is not its own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)
    store.put(bundle.path_of(digest), buffer.getvalue())


def members(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_there_and_back(folder: Path, store: Store, tmp_path: Path) -> None:
    packed = bundle.pack(folder)
    bundle.push(store, packed)
    bundle.push(store, packed)
    target = bundle.fetch(store, packed.digest, tmp_path / "there")
    assert members(target) == members(folder)


def test_the_digest_is_of_names_and_bytes(folder: Path, tmp_path: Path) -> None:
    before = bundle.pack(folder)
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    (folder / "README.md").write_text("for people")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    (folder / ".idea").mkdir()
    (folder / ".idea" / "x").write_text("")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_x.py").write_text("")
    (folder / "features.py").chmod(0o700)
    assert bundle.pack(folder) == before
    copy = tmp_path / "copy"
    for name, data in reversed(list(members(folder).items())):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    assert bundle.pack(copy) == before
    (copy / "helper.py").rename(copy / "helped.py")
    renamed = bundle.pack(copy)
    assert renamed.digest != before.digest
    (folder / "sub" / "deep.py").write_text("VALUE = 22\n")
    assert bundle.pack(folder).digest not in (before.digest, renamed.digest)


def test_of_folders_that_are_packed_wholly_only_what_is_hidden_stays_out(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    kept = ["guide.md", "tests/howto.md", "__pycache__/x.pyc", "deep/tests/image.png"]
    for name in [*kept, ".git/x.md", "deep/.hidden.md"]:
        for parent in ("documents/guides", "sub/tests"):
            path = folder / parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    packed = bundle.pack(folder, ("documents/guides",))
    bundle.push(store, packed)
    found = members(bundle.fetch(store, packed.digest, tmp_path / "there"))
    assert sorted(name for name in found if "documents" in name) == sorted(f"documents/guides/{name}" for name in kept)
    assert not any("tests" in name for name in found if not name.startswith("documents"))


def test_links_and_heaps_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(SpecError, match="passwd: a project folder may hold no symbolic links"):
        bundle.pack(folder)
    (folder / "passwd").unlink()
    (folder / "etc").symlink_to("/etc")
    with pytest.raises(SpecError, match="etc: a project folder"):
        bundle.pack(folder)
    (folder / "etc").unlink()
    monkeypatch.setattr(bundle, "MAX_BYTES", 100)
    (folder / "large.csv").write_bytes(bytes(200))
    with pytest.raises(SpecError, match=r"a project may have 100\n.*large\.csv"):
        bundle.pack(folder)


@pytest.mark.parametrize(
    "tampered",
    [
        {"helper.py": b"from .sub import deep\nVALUE = deep.VALUF\n"},  # of the same length
        {"more.py": b""},
        {"__pycache__/features.cpython-311.pyc": b"code that would run instead"},
        {".hidden": b""},
        {"tests/x.py": b""},
        {"../evil.py": b"x"},
        {"/tmp/orrery-evil.py": b"x"},
        {"sub/../../evil.py": b"x"},
    ],
)
def test_a_tampered_archive_is_refused(folder: Path, store: Store, tmp_path: Path, tampered: dict[str, bytes]) -> None:
    packed = bundle.pack(folder)
    bundle.push(store, packed)
    for target in ("first", "second"):  # a good one was unpacked before: nothing may be remembered
        bundle.fetch(store, packed.digest, tmp_path / target / "project")
        shutil.rmtree(tmp_path / target / "project")
    forge(packed.digest, store, {**members(folder), **tampered})
    with pytest.raises(UserError, match="bundles/"):
        bundle.fetch(store, packed.digest, tmp_path / "first" / "project")
    assert not (tmp_path / "evil.py").exists()
    assert not (tmp_path / "first" / "evil.py").exists()
    assert not Path("/tmp/orrery-evil.py").exists()


@pytest.mark.parametrize("link", ["/etc/passwd", "features.py", "../../x"])
def test_links_in_an_archive_are_refused(folder: Path, store: Store, tmp_path: Path, link: str) -> None:
    digest = bundle.pack(folder).digest
    forge(digest, store, members(folder), link)
    with pytest.raises(UserError):
        bundle.fetch(store, digest, tmp_path / "there")


@pytest.mark.parametrize("data", [b"", b"not a tar", b"\x1f\x8b\x08garbage"])
def test_not_an_archive_and_none_at_all(store: Store, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match="bundle is gone"):
        bundle.fetch(store, "d" * 64, tmp_path / "there")
    store.put(bundle.path_of("d" * 64), data)
    with pytest.raises(UserError):
        bundle.fetch(store, "d" * 64, tmp_path / "there")


def test_siblings_import_each_other(folder: Path) -> None:
    assert bundle.load_module(folder, "delays", "features").TWICE == 42
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    (other / "sub" / "deep.py").write_text("VALUE = 1\n")
    assert bundle.load_module(other, "delays", "features").TWICE == 2
    assert bundle.load_module(other, "delays", "helper").VALUE == 1


@pytest.mark.parametrize(
    ("code", "line", "text"),
    [
        ("x = 1\ny = nothing\n", ":2", "NameError"),
        ("x = (\n\ny = 1\n", ":1", "SyntaxError"),
        ("\nimport no_such_library\n", ":2", "ModuleNotFoundError"),
        ("from .missing import x\n", ":1", "missing"),
        ("def f():\n    return 1 / 0\n\n\nf()\n", ":2", "ZeroDivisionError"),
        ("import sys\nsys.exit(0)\n", ":2", "SystemExit"),
    ],
)
def test_an_import_that_fails_names_file_and_line(folder: Path, code: str, line: str, text: str) -> None:
    (folder / "model.py").write_text(code)
    for _ in range(2):
        with pytest.raises(SpecError) as e:
            bundle.load_module(folder, "delays", "model")
        assert str(e.value).startswith(f"{folder}/model.py{line}: ")
        assert text in str(e.value)
    with pytest.raises(SpecError, match="there is no such file"):
        bundle.load_module(folder, "delays", "nothing")


# -- fingerprints ------------------------------------------------------------------------------------

VERBS = {"validate": "orrery.data.validate", "train": "orrery.training.train", "gate": "orrery.evaluation.gate"}
PRINTS = f"""
from orrery import fingerprint
print(*[fingerprint.code(module) for module in {list(VERBS.values())}])
"""


def prints(include: Path) -> dict[str, str]:
    """Return each verb's digest of code, by a process that imports the copy."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, text=True, cwd=include, check=True,
        env={**os.environ, "PYTHONPATH": str(include)},
    )  # fmt: skip
    return dict(zip(VERBS, done.stdout.split(), strict=True))


def test_code_counts_when_a_verb_imports_it_and_machinery_does_not(tmp_path: Path) -> None:
    include = tmp_path / "include"
    shutil.copytree(ROOT / "include" / "orrery", include / "orrery", ignore=shutil.ignore_patterns("__pycache__"))
    before = prints(include)

    def touched(name: str) -> set[str]:
        path = include / "orrery" / name
        text = path.read_text()
        path.write_text(text + "\n# changed\n")
        after = prints(include)
        path.write_text(text)
        return {verb for verb in VERBS if after[verb] != before[verb]}

    assert touched("data/tables.py") >= {"validate", "train"}
    assert touched("training/__init__.py") == {"train"}
    assert touched("evaluation/gate.py") == {"gate"}
    assert touched("store.py") == set()
    assert touched("monitoring.py" if (include / "orrery/monitoring.py").exists() else "runner.py") == set()


def test_the_closure_holds_parents_and_itself_and_nothing_twice() -> None:
    for module in VERBS.values():
        found = fingerprint.closure(module)
        assert module in found
        assert module.rpartition(".")[0] in found
        assert list(found) == sorted(set(found))
        assert not set(found) & fingerprint.MACHINERY


def test_canonical_text() -> None:
    assert fingerprint.canonical({"b": 1, "a": [1.5, None, "ä"]}) == '{"a":[1.5,null,"\\u00e4"],"b":1}'
    assert fingerprint.digest({"a": 1, "b": 2}) == fingerprint.digest({"b": 2, "a": 1})
    assert fingerprint.digest(["a", "b"]) != fingerprint.digest(["b", "a"])
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            fingerprint.canonical({"a": value})


def test_pins(tmp_path: Path) -> None:
    file = tmp_path / "docker" / "ml" / "requirements.txt"
    with pytest.raises(UserError, match=r"requirements\.txt: No such file.*\n.*'ml'"):
        fingerprint.pins(tmp_path, "ml")
    file.parent.mkdir(parents=True)
    file.write_text("numpy==1\n")
    one = fingerprint.pins(tmp_path, "ml")
    file.write_text("numpy==2\n")
    os.utime(file, (5, 5))
    assert fingerprint.pins(tmp_path, "ml") != one
