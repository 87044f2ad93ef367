"""Build the images of the environments, with docker, podman or buildah: what `make images` calls.

    docker/images.py                         all of them, named and tagged as platform.yaml has it
    docker/images.py ml spark                those
    docker/images.py --gpu                   the CUDA variant of those that have torch, tagged …-gpu
    docker/images.py --push registry.example.org/team      and push them there

What pip is configured to on this machine (index, find-links, certificate) and proxies are handed to the build as
secrets and predefined arguments: no layer, label or history holds them. ORRERY_ENGINE_FLAGS are given to the engine,
ORRERY_BUILD_FLAGS to its `build`, such as `--network=host`.
"""

# ruff: noqa: T201  what it prints is for the terminal

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orrery import platform
from orrery.errors import OrreryError, UserError, nearest

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("docker", "podman", "buildah")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
SHOWN = re.compile(r"^(STEP \d+/\d+: .*|#\d+ \[.*|\[\d+/\d+\] STEP .*|environment \S+: .*|\.venvs/\S+: .*)$")
FROM_PIP = re.compile(r"^global\.([\w-]+)=('.*'|\".*\")$", re.MULTILINE)
TAIL = 40


@dataclass(frozen=True)
class Engine:
    """A program that builds images, and the flags that it always gets."""

    name: str
    flags: tuple[str, ...] = ()

    def argv(self, *words: str) -> list[str]:
        """Return a command of this engine."""
        return [self.name, *self.flags, *words]

    def size(self, image: str) -> int | None:
        """Return an image's bytes, as far as the engine tells."""
        ask = ("images", "--json", image) if self.name == "buildah" else ("image", "inspect", image)
        got = subprocess.run(self.argv(*ask), capture_output=True, text=True, check=False)
        try:
            found = json.loads(got.stdout)[0]
        except (ValueError, IndexError):
            return None
        return in_bytes(found.get("size") if self.name == "buildah" else found.get("Size"))


@dataclass
class Inputs:
    """What a build is given from this machine: files for secrets, and a folder of wheels."""

    secrets: dict[str, Path] = field(default_factory=dict)
    wheels: Path | None = None
    torch: str = ""  # uv's backend to take torch from; none: what the indexes have

    def flags(self) -> list[str]:
        """Return the flags of `build` that hand them over."""
        given = [f"--secret=id={name},src={file}" for name, file in self.secrets.items()]
        if self.wheels:
            given.append(f"--build-context=wheels={self.wheels}")
        if self.torch:
            given.append(f"--build-arg=UV_TORCH_BACKEND={self.torch}")
        return given + [f"--build-arg={name}" for name in PROXIES if os.environ.get(name)]


def main() -> int:
    args = arguments()
    engine = find_engine(args.engine)
    images = wanted(args.environments, args.gpu)
    rows = []
    with inputs(args) as given:
        for number, (environment, image) in enumerate(images.items(), 1):
            began = time.monotonic()
            print(f"[{number}/{len(images)}] {image}", flush=True)
            build(engine, environment, image, args, given)
            pushed = push(engine, image, args.push) if args.push is not None else ""
            rows.append((image, engine.size(image), time.monotonic() - began, pushed))
    print(table(rows))
    return 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="ENV", help="all when none is given")
    parser.add_argument("--engine", choices=ENGINES, help="the first of these that is installed when not given")
    parser.add_argument("--gpu", action="store_true", help="build with torch for CUDA")
    parser.add_argument("--base", help="the image to build on: Debian with Python 3.11, best by digest (name@sha256:…)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels that no index has, such as torch's")
    parser.add_argument(
        "--torch-index", metavar="URL", help="where torch comes from; on CPUs its own index when not given"
    )
    parser.add_argument("--apt", type=Path, metavar="FILE", help="a debian.sources to use while building")
    parser.add_argument("--push", nargs="?", const="", metavar="PREFIX", help="push, under this registry and path")
    parser.add_argument("--verbose", action="store_true", help="show all that the engine prints")
    return parser.parse_args()


def find_engine(name: str | None) -> Engine:
    """Return the engine that was asked for, or the first that is installed and answers. Raises `UserError`."""
    flags = tuple(shlex.split(os.environ.get("ORRERY_ENGINE_FLAGS", "")))
    there = [Engine(e, flags) for e in ((name,) if name else ENGINES) if shutil.which(e)]
    if not there:
        what = name or ", ".join(ENGINES)
        raise UserError(f"no program to build images with: looked for {what}", hint="on Debian, apt install podman")
    for engine in there:
        if engine.name != "docker" or answers(engine):
            return engine
    raise UserError("docker is installed, but its daemon does not answer", hint="start it, or apt install podman")


def answers(docker: Engine) -> bool:
    """Tell whether docker's daemon is there: its client alone builds nothing."""
    asked = docker.argv("version", "--format", "{{.Server.Version}}")
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def wanted(environments: list[str], gpu: bool) -> dict[str, str]:
    """Return environment and image of what is to be built. Raises `UserError` for what has no Dockerfile."""
    known = {e: i.image for e, i in platform.load().environments.items()}
    for name in environments:
        if name not in known:
            raise UserError(f"environment {name!r} is not in platform.yaml", hint=nearest(name, known))
        if gpu and not has_torch(name):
            raise UserError(f"environment {name!r} has no torch, so it has no --gpu variant")
    chosen = environments or [e for e in known if not gpu or has_torch(e)]
    for name in chosen:
        if not (ROOT / "docker" / name / "Dockerfile").is_file():
            raise UserError(f"docker/{name}/Dockerfile is not there", hint="docker/README.md tells how to add one")
        if "@" in known[name]:
            raise UserError(
                f"{known[name]} names a digest, and what is built now has a new one",
                hint="build under a tag, push it, then write the new digest into platform.yaml",
            )
    return {name: known[name] + ("-gpu" if gpu else "") for name in chosen}


def has_torch(environment: str) -> bool:
    """Tell whether an environment's pins hold torch."""
    file = ROOT / "docker" / environment / "requirements.txt"
    return file.is_file() and re.search(r"^torch==", file.read_text(), re.MULTILINE) is not None


@contextlib.contextmanager
def inputs(args: argparse.Namespace) -> Iterator[Inputs]:
    """Collect what the build is given from this machine; files of our own are gone afterwards."""
    given = Inputs()
    links = pip_setting("find-links").split()
    local = [Path(unquote(urlsplit(s).path)) for s in links if urlsplit(s).scheme in ("", "file")]
    # pip's find-links hold the CPU build of torch, if they hold it: a CUDA build is asked for by --wheels alone.
    given.wheels = args.wheels or next((p for p in local if p.is_dir() and not args.gpu), None)
    if args.wheels and not args.wheels.is_dir():
        raise UserError(f"--wheels {args.wheels}: there is no such folder")
    if args.apt:
        if not args.apt.is_file():
            raise UserError(f"--apt {args.apt}: there is no such file")
        given.secrets["apt"] = args.apt.resolve()
    certificate = Path(pip_setting("cert"))
    if certificate.is_file():
        given.secrets["ca"] = certificate
    with tempfile.TemporaryDirectory(prefix="orrery-images-") as folder:
        file = Path(folder) / "pip.conf"
        file.touch(mode=0o600)  # an index URL may hold a password
        file.write_text(pip_configuration(args, given))
        given.secrets["pip"] = file
        yield given


def pip_configuration(args: argparse.Namespace, given: Inputs) -> str:
    """Return this machine's pip configuration as the build can use it; folders of this machine are not there."""
    remote = [u for u in pip_setting("find-links").split() if urlsplit(u).scheme.startswith("http")]
    extra = [u for u in pip_setting("extra-index-url").split() if urlsplit(u).scheme.startswith("http")]
    if args.torch_index:
        extra.append(args.torch_index)
    elif not (args.gpu or given.wheels or remote or extra):
        given.torch = "cpu"  # a package index has CUDA builds alone
    settings = {
        "index-url": pip_setting("index-url"),
        "extra-index-url": " ".join(extra),
        "find-links": " ".join([*(["/wheels"] if given.wheels else []), *([] if args.gpu else remote)]),
        "trusted-host": pip_setting("trusted-host"),
        "timeout": pip_setting("timeout") or pip_setting("default-timeout"),
        "cert": "/run/secrets/ca.pem" if "ca" in given.secrets else "",
    }
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items() if value)


def pip_setting(name: str) -> str:
    """Return pip's own setting `name` on this machine (the environment wins over the files), or an empty string."""
    from_env = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if from_env:
        return from_env
    return pip_files().get(name, "")


@lru_cache(maxsize=1)
def pip_files() -> dict[str, str]:
    """Return what pip's files on this machine say for all its commands; nothing when there is no pip."""
    pip = shutil.which("pip3") or shutil.which("pip")
    if pip is None:
        return {}
    # Not `config get`: that of Debian's pip (23.0) reads the user's file alone.
    got = subprocess.run([pip, "config", "list"], capture_output=True, text=True, check=False)
    return {name: str(ast.literal_eval(value)) for name, value in FROM_PIP.findall(got.stdout)}


def build(engine: Engine, environment: str, image: str, args: argparse.Namespace, given: Inputs) -> None:
    """Build one image; its whole log goes to var/log/images. Raises `UserError` with the log's end."""
    options = [
        f"--file=docker/{environment}/Dockerfile",
        f"--tag={image}",
        f"--build-arg=VERSION={version()}",
        f"--build-arg=REVISION={revision()}",
        f"--build-arg=TORCH={'cuda' if args.gpu else 'cpu'}",
        *([f"--build-arg=BASE={args.base}"] if args.base else []),
        *(["--progress=plain"] if engine.name == "docker" else []),
        *given.flags(),
        *shlex.split(os.environ.get("ORRERY_BUILD_FLAGS", "")),
    ]
    argv = engine.argv("build", *options, ".")
    log, last = platform.home() / "var" / "log" / "images" / f"{environment}.log", [""] * TAIL
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    env = {**os.environ, "DOCKER_BUILDKIT": "1"}
    with log.open("w") as kept, subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            last = [*last[1:], line]
            if args.verbose:
                print(line, end="", flush=True)
            elif SHOWN.match(line):
                print(f"  {time.monotonic() - began:5.0f} s  {line.strip()[:150]}", flush=True)
    if process.returncode:
        raise UserError(
            f"{engine.name} could not build {image} (it ended with {process.returncode}):\n{''.join(last).strip()}",
            hint=f"all of it is in {log}; docker/README.md tells of engines, bases and mirrors",
        )


def push(engine: Engine, image: str, prefix: str) -> str:
    """Push an image, under `prefix` when there is one; return the name that it has there. Raises `UserError`."""
    name = f"{prefix.rstrip('/')}/{image}" if prefix else image
    if prefix:
        command(engine, "tag", image, name)
    command(engine, "push", name)
    return name


def command(engine: Engine, *words: str) -> None:
    """Run one of the engine's short commands. Raises `UserError`."""
    got = subprocess.run(engine.argv(*words), capture_output=True, text=True, check=False)
    if got.returncode:
        raise UserError(f"{engine.name} {' '.join(words)}: {got.stderr.strip()[-1000:]}")


def version() -> str:
    """Return Orrery's version."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def revision() -> str:
    """Return the commit that is built, with -dirty when the work tree differs; `unknown` outside of git."""
    if not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    got = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if got.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return got.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def in_bytes(size: object) -> int | None:
    """Return a size that an engine told, as a number or as text such as `1.2 GB`."""
    if isinstance(size, int):
        return size
    parts = re.fullmatch(r"([\d.]+) ?([kMG]?)B", str(size))
    return int(float(parts[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[parts[2]]) if parts else None


def table(rows: list[tuple[str, int | None, float, str]]) -> str:
    """Return image, size and time of each as text."""
    lines = [("image", "size", "took", "pushed as")]
    for image, size, took, pushed in rows:
        lines.append((image, "not told" if size is None else f"{size / 1e6:,.0f} MB", f"{took:,.0f} s", pushed))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except OrreryError as e:
        raise SystemExit(f"error: {e.message}" + (f"\n  → {e.hint}" if e.hint else "")) from None
