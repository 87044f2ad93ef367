"""The Dockerfiles: alike, pinned as the local environments are, nobody's root, nothing of the building left in them.

And what docker/images.py hands to a build, asked with an engine that only writes down how it was called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from orrery import platform

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
ENVIRONMENTS = sorted(p.parent.name for p in DOCKER.glob("*/requirements.txt"))
OWN = re.compile(r"# --- this environment's own ---\n(.*)# --- end of this environment's own ---\n", re.DOTALL)
COMPILERS = (
    "gcc",
    "g++",
    "build-essential",
    "clang",
    "cmake",
    "python3-dev",
    "python3.11-dev",
    "binutils",
    "pip",
    "venv",
)
# Where a build's secrets are mounted; a COPY or an ENV of them would bake them in.
SECRETS = {"apt", "pip", "ca"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Return name and arguments of each instruction."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def stages(text: str) -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage; what stands before the first FROM is left out."""
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions(text):
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest))
    return found


def dockerfile(environment: str) -> str:
    return (DOCKER / environment / "Dockerfile").read_text()


def shipped(environment: str) -> list[tuple[str, str]]:
    """Return the instructions whose outcome ships: those of the last stage and of the one it starts from."""
    *_, python, _, last = stages(dockerfile(environment))
    assert python[0][1].endswith("AS python")
    assert last[0] == ("FROM", "python")
    return python + last


def test_every_environment_has_a_dockerfile_and_no_other_has() -> None:
    assert sorted(p.parent.name for p in DOCKER.glob("*/Dockerfile")) == ENVIRONMENTS
    assert sorted(platform.load().environments) == ENVIRONMENTS


def test_they_are_alike_but_for_what_is_an_environments_own() -> None:
    texts = {e: OWN.sub("", dockerfile(e)) for e in ENVIRONMENTS}
    for environment, text in texts.items():
        assert OWN.search(dockerfile(environment)), environment
        assert text.count(f"ENVIRONMENT={environment}\n") == 2
    alike = {re.sub(rf"`{e}`|ENVIRONMENT={e}\n", "", text) for e, text in texts.items()}
    assert len(alike) == 1


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_pins_are_those_of_the_local_environment_installed_in_the_same_way(environment: str) -> None:
    build = stages(dockerfile(environment))[-2]
    assert ("COPY", "docker/${ENVIRONMENT}/requirements.txt docker/${ENVIRONMENT}/") in build
    assert any("docker/venv.py ${ENVIRONMENT}" in rest for name, rest in build if name == "RUN")
    assert not re.search(r"pip3? install|uv pip", dockerfile(environment))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_nothing_that_moves_is_built_on(environment: str) -> None:
    text = dockerfile(environment)
    base = re.search(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert base is not None
    assert platform.pinned(base[1]) == base[1]
    assert ":latest" not in text
    sources = [rest.split()[0] for name, rest in instructions(text) if name == "FROM"]
    assert set(sources) == {"scratch", "${BASE}", "python"}
    assert not re.search(r"\b(curl|wget|git clone|ADD)\b", text)  # what comes from a network comes through pins


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_it_is_nobodys_root_and_ends_as_a_pod_expects(environment: str) -> None:
    last = dict(stages(dockerfile(environment))[-1])
    user = re.fullmatch(r"(\d+):0", last["USER"])  # a number: `runAsNonRoot` cannot judge a name; group 0: OpenShift
    assert user is not None
    assert int(user[1]) >= 10_000
    names = [name for name, _ in stages(dockerfile(environment))[-1]]
    assert "RUN" not in names[names.index("USER") :]
    assert json.loads(last["ENTRYPOINT"])[:2] == ["/usr/bin/tini", "--"]
    assert json.loads(last["CMD"])[0] == "orrery"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_what_ships_has_no_tools_of_the_build(environment: str) -> None:
    for name, rest in shipped(environment):
        if name != "RUN":
            continue
        for tool in COMPILERS:
            assert not re.search(rf"(^|[\s/]){re.escape(tool)}(\s|$)", rest), rest
        # packages.sh is what leaves no lists and caches behind.
        assert "apt-get" not in rest, rest


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_secrets_are_mounted_and_only_mounted(environment: str) -> None:
    text = dockerfile(environment)
    assert set(re.findall(r"type=secret,id=(\w+)", text)) == SECRETS
    for name, rest in instructions(text):
        if name in ("ARG", "ENV", "LABEL"):
            assert not re.search(r"index|proxy|token|password|secret", rest, re.IGNORECASE), rest
        if name == "COPY":
            assert not re.search(r"pip\.conf|\.pem|sources", rest), rest


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_labels_tell_version_and_revision(environment: str) -> None:
    labels = " ".join(rest for name, rest in stages(dockerfile(environment))[-1] if name == "LABEL")
    for label in ("title", "version", "revision", "licenses", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels
    last = [name for name, _ in stages(dockerfile(environment))[-1]]
    # A new revision must not build what stands above its label anew.
    assert "RUN" not in last[last.index("LABEL") :]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_whatever_is_copied_is_there_and_not_ignored(environment: str) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name, rest in instructions(dockerfile(environment)):
        if name != "COPY" or rest.startswith("--from"):
            continue
        for source in rest.replace("${ENVIRONMENT}", environment).split()[:-1]:
            assert (ROOT / source).exists(), source
            below = any(
                Path(source).match(a) or a.startswith(f"{source}/") or source.startswith(f"{a}/") for a in allowed
            )
            assert below, f"{source} is not in .dockerignore"


def test_scripts_of_images_may_be_run() -> None:
    scripts = [*DOCKER.glob("image/*"), *DOCKER.glob("*/entrypoint")]
    for script in (s for s in scripts if s.is_file() and s.read_bytes().startswith(b"#!")):
        assert script.stat().st_mode & stat.S_IXOTH, script
        subprocess.run(["bash", "-n", str(script)], check=True)


ENGINE = """#!{python}
import json, os, pathlib, sys
secrets = [w.split("src=")[1] for w in sys.argv if w.startswith("--secret")]
seen = {{"argv": sys.argv[1:], "secrets": {{s: pathlib.Path(s).read_text() for s in secrets}}}}
with open(os.environ["SEEN"], "a") as f:
    f.write(json.dumps(seen) + "\\n")
if "inspect" in sys.argv:
    print('[{{"Size": 123000000}}]')
if "version" in sys.argv and os.environ.get("SILENT"):
    sys.exit(1)
if "build" in sys.argv:
    print("STEP 1/1: FROM x")
sys.exit(int(os.environ.get("FAILS", "0")) if "build" in sys.argv else 0)
"""


class House:
    """A folder with an engine of our own on PATH, and pip configured as a company would."""

    def __init__(self, folder: Path) -> None:
        self.seen, self.path = folder / "seen", folder / "bin"
        self.path.mkdir()
        self.engine("podman")
        (folder / "ca.pem").write_text("CA")
        self.ca = folder / "ca.pem"
        self.env = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
        git = shutil.which("git")
        assert git is not None
        (self.path / "git").symlink_to(git)
        # Nothing else is on PATH: an engine of this machine must not build.
        self.env |= {"ORRERY_HOME": str(folder), "ORRERY_PLATFORM": str(ROOT / "include" / "platform.yaml")}
        self.env |= {"PATH": str(self.path), "SEEN": str(self.seen), "PIP_CONFIG_FILE": os.devnull}
        for name in [n for n in self.env if n.startswith("PIP_") and n != "PIP_CONFIG_FILE"]:
            del self.env[name]
        self.env |= {"PIP_INDEX_URL": "https://u:geheim@index.example.org/wheels", "PIP_CERT": str(self.ca)}

    def engine(self, name: str) -> None:
        file = self.path / name
        file.write_text(ENGINE.format(python=sys.executable))
        file.chmod(0o755)

    def build(self, *words: str, code: int = 0, **env: str) -> str:
        argv = [sys.executable, str(DOCKER / "images.py"), *words]
        done = subprocess.run(argv, env={**self.env, **env}, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def builds(self) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.seen.read_text().splitlines()]
        return [line for line in lines if "build" in line["argv"]]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_build_gets_names_from_platform_and_secrets_by_file(house: House) -> None:
    said = house.build("cloud", HTTPS_PROXY="http://p:geheim@proxy", ORRERY_ENGINE_FLAGS="--runtime runc")
    (one,) = house.builds
    argv = one["argv"]
    assert isinstance(argv, list)
    image = platform.load().environments["cloud"].image
    assert argv[:3] == ["--runtime", "runc", "build"]
    assert f"--tag={image}" in argv
    assert "--build-arg=HTTPS_PROXY" in argv  # by name: the engine takes the value from its environment
    assert "geheim" not in " ".join(argv)
    assert any("REVISION=" in w for w in argv)
    assert isinstance(one["secrets"], dict)
    pip = next(text for text in one["secrets"].values() if text.startswith("[global]"))
    assert "index-url = https://u:geheim@index.example.org/wheels\n" in pip
    assert "cert = /run/secrets/ca.pem\n" in pip
    assert not any(Path(f).exists() for f in one["secrets"] if Path(f).name == "pip.conf")
    assert "123 MB" in said
    assert "geheim" not in said


def test_cpu_and_gpu_take_their_own_torch(house: House, tmp_path: Path) -> None:
    house.build("ml")
    house.build("ml", "--gpu")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    house.build("ml", PIP_FIND_LINKS=str(wheels))
    cpu, gpu, local = house.builds
    told = [next(t for t in dict(b["secrets"]).values() if t.startswith("[global]")) for b in (cpu, gpu, local)]  # type: ignore[call-overload]
    assert "--build-arg=UV_TORCH_BACKEND=cpu" in cpu["argv"]  # type: ignore[operator]
    assert not any("UV_TORCH_BACKEND" in a for build in (gpu, local) for a in build["argv"])  # type: ignore[attr-defined]
    assert not any("extra-index-url" in text for text in told)
    assert "find-links = /wheels\n" in told[2]
    assert "extra-index-url" not in told[2]
    assert "--build-arg=TORCH=cpu" in cpu["argv"]  # type: ignore[operator]
    assert {"--build-arg=TORCH=cuda", f"--tag={platform.load().environments['ml'].image}-gpu"} <= set(gpu["argv"])  # type: ignore[call-overload]
    assert f"--build-context=wheels={wheels}" in local["argv"]  # type: ignore[operator]


def test_pushing_goes_under_the_prefix(house: House) -> None:
    house.build("cloud", "--push", "registry.example.org/team/")
    name = f"registry.example.org/team/{platform.load().environments['cloud'].image}"
    assert f'"push", "{name}"' in house.seen.read_text()


def test_what_cannot_be_built_is_said(house: House, tmp_path: Path) -> None:
    assert "did you mean 'cloud'?" in house.build("clout", code=1)
    assert "has no torch" in house.build("cloud", "--gpu", code=1)
    said = house.build("cloud", code=1, FAILS="3")
    assert "podman could not build" in said
    assert "STEP 1/1" in said
    assert "var/log/images/cloud.log" in said
    assert "looked for buildah" in house.build("--engine", "buildah", "cloud", code=1)
    (house.path / "podman").unlink()
    assert "apt install podman" in house.build("cloud", code=1)


def test_the_first_engine_that_answers_builds(house: House) -> None:
    house.engine("docker")
    assert "docker could not build" in house.build("cloud", code=1, FAILS="1")
    said = house.build("cloud", code=1, FAILS="1", SILENT="docker")  # its client without its daemon
    assert "podman could not build" in said
    (house.path / "podman").unlink()
    assert "its daemon does not answer" in house.build("cloud", code=1, SILENT="docker")


def test_a_tests_folder_goes_unless_something_imports_it(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("a/tests/test_a.py", "b/tests/__init__.py", "c/d/tests/__init__.py", "c/d/e.py", "torch/include/x.h"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("import c.tests\n" if name.startswith("a") else "")
    (site / "b" / "__init__.py").write_text("def f():\n    from b.tests import helper\n")
    (site / "c" / "d" / "e.py").write_text("from . import tests\n")
    (site / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    slim = [sys.executable, str(DOCKER / "image" / "slim.py"), str(tmp_path), "--torch"]
    wrong = subprocess.run([*slim, "cuda"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "torch is a cpu build" in wrong.stderr
    subprocess.run([*slim, "cpu"], check=True, capture_output=True)
    left = {str(p.relative_to(site)) for p in site.rglob("*") if p.is_dir()}
    assert left == {"a", "b", "b/tests", "c", "c/d", "c/d/tests", "torch"}


def test_what_an_environment_does_not_use_goes_and_what_it_needs_is_imported(tmp_path: Path) -> None:
    def slim(**extra: str) -> tuple[int, str]:
        site = tmp_path / "llm" / "lib" / "python3.11" / "site-packages"
        files = {
            *("botocore/data/s3/a.json", "botocore/data/ec2/a.json", "botocore/data/endpoints.json", "psycopg/a.py"),
            *("psycopg_binary-3.dist-info/RECORD", "sqlalchemy/testing/a.py", "sqlalchemy/dialects/mysql/a.py"),
            *("sqlalchemy/dialects/oracle/a.py", "sqlalchemy/dialects/sqlite/a.py", "a/a.pyi", "pygments/lexers/x.py"),
            *("pygments/lexers/python.py", "pygments/lexers/__pycache__/x.cpython-311.pyc"),
        } - {extra.get("without", "")}
        shutil.rmtree(tmp_path / "llm", ignore_errors=True)
        for name in files:
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).touch()
        python = tmp_path / "llm" / "bin" / "python"
        python.parent.mkdir()
        python.write_text(f"#!/bin/sh\necho $3 >&2\nexit {extra.get('code', '0')}\n")
        python.chmod(0o755)
        argv = [sys.executable, str(DOCKER / "image" / "slim.py"), str(tmp_path / "llm")]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        left = sorted(str(p.relative_to(site)) for p in site.rglob("*") if p.is_file())
        return done.returncode, done.stderr or " ".join(left)

    assert slim() == (
        0,
        "botocore/data/endpoints.json botocore/data/s3/a.json pygments/lexers/python.py sqlalchemy/dialects/sqlite/a.py",
    )
    # An upgrade that moved something is told, instead of a list that is true no more.
    code, said = slim(without="sqlalchemy/testing/a.py")
    assert code == 1 and "sqlalchemy/testing" in said and "matches nothing" in said
    code, said = slim(code="1")
    assert code == 1 and "import s3fs" in said
