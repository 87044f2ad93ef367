"""Prove the images that are there: each runs `orrery check` and a step as on a cluster. Not part of `make test`.

    .venvs/airflow/bin/python tests/prove_images.py            all environments of platform.yaml
    .venvs/airflow/bin/python tests/prove_images.py ml spark   those

As on a cluster means: `command: [orrery]`, a read-only root of which only /tmp may be written, a user number that
/etc/passwd does not know, no capabilities, no network. The environments that have verbs carry the loop of
tests/projects/house_energy through them (register and promote, which talk to MLflow, run on this machine); the
others run its gate, which is pure Python. Engine and flags are those of docker/images.py; ORRERY_RUN_FLAGS are
given to `run`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loop import DAYS, NEXT, PROJECT, ROOT, WINDOW, Loop, registered
from mlflow_house import mlflow_server

from orrery import platform
from orrery.contract import VERBS
from orrery.plan import Plan, Planner, Request
from orrery.runner import run

sys.path.insert(0, str(ROOT / "docker"))
from images import ENGINES, find_engine, wanted

USERS = ("10001:0", "1234567:0")  # the image's own, and one that a cluster gives
STOPPED = 143


@dataclass
class Images:
    """The images of this machine and the program that runs them."""

    engine: list[str]
    images: dict[str, str]
    mounts: tuple[str, ...] = ()

    def argv(self, environment: str, *words: str, user: str = USERS[0]) -> list[str]:
        """Return the command that runs `orrery WORDS` as a pod does."""
        flags = [f"--user={user}", "--read-only", "--network=none", "--cap-drop=all", "--rm"]
        flags += ["--security-opt=no-new-privileges", "--tmpfs=/tmp:rw,exec,nosuid,size=4g,mode=1777"]
        if self.engine[0] == "podman":  # it would write the user into /etc/passwd, and make more folders writable
            flags += ["--passwd=false", "--read-only-tmpfs=false"]
        flags += [f"--volume={m}" for m in self.mounts]
        flags += shlex.split(os.environ.get("ORRERY_RUN_FLAGS", ""))
        return [*self.engine, "run", *flags, "--entrypoint=orrery", self.images[environment], *words]

    def launcher(self, environment: str, user: str) -> Callable[[Plan], int]:
        """Return what `runner.run` starts a planned step with."""

        def launch(plan: Plan) -> int:
            folder = f"{plan.config.store}/{plan.config.folder}"
            words = ("step", "--config", f"{folder}/config.json", "--result", f"{folder}/result.json")
            return subprocess.run(self.argv(environment, *words, user=user), check=False).returncode

        return launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="ENV")
    parser.add_argument("--engine", choices=ENGINES[:2])
    args = parser.parse_args()
    engine = find_engine(args.engine)
    images = wanted(args.environments, gpu=False)
    made = Images([engine.name, *engine.flags], {**wanted([], gpu=False), **images})
    os.umask(0)  # a container's user writes beside what this process has written
    for environment in images:
        for user in USERS:
            check(made, environment, user)
    home = Path(tempfile.mkdtemp(prefix="orrery-images-"))
    try:
        with mlflow_server(home / "mlflow") as address:
            loop = Loop(home, address)
            os.environ.update(loop.env)
            made.mounts = (f"{home}/store:{home}/store", f"{home}/data:{home}/data:ro")
            (home / "store").mkdir()
            steps(made, loop, list(images))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0


def check(made: Images, environment: str, user: str) -> None:
    """Run `orrery check`, and tell a container to stop before it has begun: the exit code must say so."""
    began = time.monotonic()
    done = subprocess.run(made.argv(environment, "check", user=user), capture_output=True, text=True, check=False)
    tell(environment, f"orrery check as {user}", done.returncode == 0, began, done.stdout + done.stderr)


def steps(made: Images, loop: Loop, environments: list[str]) -> None:
    """Carry the loop through the images; an environment that was not asked for is this machine's own."""
    turn = 0

    def step(verb: str, key: str, environment: str = "", *, force: bool = False) -> None:
        nonlocal turn
        place = environment or VERBS[verb].environment
        if place not in environments:
            loop.run(verb, key)
            return
        turn += 1
        planner, began, user = Planner(PROJECT), time.monotonic(), USERS[turn % 2]
        keys = planner.partitions_of(None, key) if ".." in key else (key,)
        name = f"image--{turn}"
        request = Request(PROJECT, verb, tuple(keys), run=name, task=verb, actor="image", reason="", force=force)
        result = run(planner, request, made.launcher(place, user))
        tell(place, f"{verb} {key} as {user}", result.status == "done" and not result.skipped, began, str(result))

    for verb in ("ingest", "validate", "materialize"):
        step(verb, DAYS[0])
        loop.run(verb, f"{DAYS[1]}..{NEXT}")
    for verb in ("train", "evaluate", "gate"):
        step(verb, WINDOW)
    version = registered(loop.run("register", WINDOW))
    loop.run("promote", WINDOW, "--version", version)
    step("score", NEXT)
    for environment in environments:
        if environment not in {v.environment for v in VERBS.values()}:
            step("gate", WINDOW, environment, force=True)


def tell(environment: str, what: str, passed: bool, began: float, output: str) -> None:
    """Print one line; end with the output when it did not pass."""
    print(f"{'✓' if passed else '✗'} {environment:<8} {what} ({time.monotonic() - began:.1f} s)", flush=True)
    if not passed:
        raise SystemExit(output)


if __name__ == "__main__":
    assert platform.home() == ROOT, "run it in the repository's own airflow environment"
    raise SystemExit(main())
