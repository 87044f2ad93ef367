"""Prove the images that are there: each runs `orrery check` and a step as on a cluster. Not part of `make test`.

    .venvs/airflow/bin/python tests/prove_images.py            all environments of platform.yaml
    .venvs/airflow/bin/python tests/prove_images.py ml spark   those

As on a cluster means: `command: [orrery]`, a read-only root of which only /tmp may be written, a user number that
/etc/passwd does not know, no capabilities, no network. The environments of models carry the loop of
tests/projects/house_energy through them (register and promote, which talk to MLflow, run on this machine), or its
gate, which is pure Python. `rag` carries Orrery's handbook from its documents to a live generation, `serve` answers a
question from it, `llm` writes a sentence. Engine and flags are those of docker/images.py; ORRERY_RUN_FLAGS are given
to `run`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop import DAYS, NEXT, ORRERY, PROJECT, ROOT, WINDOW, Loop, registered
from mlflow_house import mlflow_server

from orrery import platform
from orrery.contract import VERBS
from orrery.plan import Plan, Planner, Request
from orrery.planners import planner_of
from orrery.runner import run

sys.path.insert(0, str(ROOT / "docker"))
from images import ENGINES, find_engine, wanted

USERS = ("10001:0", "1234567:0")  # the image's own, and one that a cluster gives
STOPPED = 143
# Knowledge bases have a chain of their own: documents to a live generation, answers, a language model.
KNOWLEDGE = ("rag", "serve", "llm")
HANDBOOK, DAY = "handbook", "2026-01-05"
CHAIN = ("collect", "chunk", "embed", "index", "evaluate", "gate", "promote")
ASKED = "Which exit code means that the user has to act?"
# Run in a container with its own Python: the network is the container's alone.
ASK = """
import json, sys, urllib.request
url, token, body = sys.argv[1:]
headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
data = body.encode() or None
with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
    sys.stdout.write(answer.read().decode())
"""


@dataclass
class Images:
    """The images of this machine and the program that runs them."""

    engine: list[str]
    images: dict[str, str]
    mounts: tuple[str, ...] = ()

    def argv(
        self,
        environment: str,
        *words: str,
        user: str = USERS[0],
        program: str = "orrery",
        flags_too: Sequence[str] = (),
    ) -> list[str]:
        """Return the command that runs `orrery WORDS` as a pod does."""
        flags = [f"--user={user}", "--read-only", "--network=none", "--cap-drop=all", "--rm"]
        flags += ["--security-opt=no-new-privileges", "--tmpfs=/tmp:rw,exec,nosuid,size=4g,mode=1777"]
        if self.engine[0] == "podman":  # it would write the user into /etc/passwd, and make more folders writable
            flags += ["--passwd=false", "--read-only-tmpfs=false"]
        flags += [f"--volume={m}" for m in self.mounts]
        flags += shlex.split(os.environ.get("ORRERY_RUN_FLAGS", ""))
        flags += flags_too
        return [*self.engine, "run", *flags, f"--entrypoint={program}", self.images[environment], *words]

    @contextmanager
    def running(self, environment: str, *words: str, **options: Any) -> Iterator[Callable[..., str]]:
        """Run what goes on until it is told to stop; yield what asks an address in the container. It must end by itself."""
        name = f"orrery-prove-{environment}-{os.getpid()}"
        flags = [f"--name={name}", *options.pop("flags_too", ())]
        argv = self.argv(environment, *words, **options, flags_too=flags)
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        def ask(url: str, token: str = "", body: object = None) -> str:
            words = ("python", "-c", ASK, url, token, "" if body is None else json.dumps(body))
            done = subprocess.run([*self.engine, "exec", name, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(done.stderr.strip()[-500:])
            return done.stdout

        try:
            yield ask
        finally:
            subprocess.run([*self.engine, "stop", "--time=20", name], capture_output=True, check=False)
            said, _ = process.communicate(timeout=60)
            if process.returncode not in (0, STOPPED):
                raise SystemExit(f"{environment} ended with {process.returncode}:\n{said[-3000:]}")

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
    home.chmod(0o755)
    try:
        if models := [e for e in images if e not in KNOWLEDGE]:
            with mlflow_server(home / "mlflow") as address:
                loop = Loop(home, address)
                os.environ.update(loop.env)
                made.mounts = (f"{home}/store:{home}/store", f"{home}/data:{home}/data:ro")
                (home / "store").mkdir()
                steps(made, loop, models)
        if "rag" in images or "serve" in images:
            knowledge(made, home / "knowledge", "rag" in images, "serve" in images)
        if "llm" in images:
            writes(made)
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


def knowledge(made: Images, home: Path, rag: bool, serve: bool) -> None:
    """Carry the handbook to a live generation, in the image of `rag` or on this machine; have `serve` answer from it."""
    store = home / "store"
    store.mkdir(parents=True)
    made.mounts = (f"{store}:{store}",)
    os.environ |= {"ORRERY_STORE": f"file://{store}", "ORRERY_LEDGER": f"sqlite:///{home}/ledger.db"}
    os.environ |= {"ORRERY_PROJECTS": str(ROOT / "include" / "projects"), "ORRERY_PROFILE": "local"}
    for turn, verb in enumerate(CHAIN):
        if not rag:
            subprocess.run([ORRERY, "run", HANDBOOK, verb, "--partition", DAY], check=True, capture_output=True)
            continue
        user, began = USERS[turn % 2], time.monotonic()
        request = Request(
            HANDBOOK, verb, (DAY,), "image--1", verb, actor="image", reason="proof", kind="knowledge_base"
        )
        result = run(planner_of(HANDBOOK), request, made.launcher("rag", user))
        tell("rag", f"{verb} {DAY} as {user}", result.status == "done" and not result.skipped, began, str(result))
    if serve:
        for user in USERS:
            answers(made, home, user)


def answers(made: Images, home: Path, user: str) -> None:
    """Make a token in the image, serve with it as on a cluster, and ask."""
    began, folder = time.monotonic(), home / f"tokens-{user.partition(':')[0]}"
    folder.mkdir()
    made.mounts = (f"{home}/store:{home}/store", f"{folder}:/tokens")
    words = ("token", "ada", "--groups=oncall", "--tokens=/tokens/tokens.yaml")
    token = subprocess.run(made.argv("serve", *words, user=user), capture_output=True, text=True, check=False)
    tell("serve", f"a token as {user}", token.returncode == 0, began, token.stderr)
    began, address = time.monotonic(), "http://127.0.0.1:8070"
    environment = [f"--env=ORRERY_STORE=file://{home}/store", "--env=ORRERY_SERVE_TOKENS=/tokens/tokens.yaml"]
    serve = ("serve", HANDBOOK, "--host=0.0.0.0", "--port=8070")
    with made.running("serve", *serve, user=user, flags_too=environment) as ask:
        until(lambda: ask(f"{address}/health/ready"), 60)
        tell("serve", f"ready as {user}", True, began, "")
        began = time.monotonic()
        found = json.loads(ask(f"{address}/query", token.stdout.strip(), {"question": ASKED}))
        good = bool(found["sources"]) and not found["abstained"] and "app.js" in ask(f"{address}/")
        tell("serve", f"an answer: {' '.join(found['answer'].split())[:80]} …", good, began, str(found))


def writes(made: Images) -> None:
    """Have the language model write, without a network."""
    began, address, made.mounts = time.monotonic(), "http://127.0.0.1:8090", ()
    with made.running("llm", "-m", "orrery.llm.server", "--port=8090", program="python") as ask:
        until(lambda: ask(f"{address}/v1/models"), 60)
        model = json.loads(ask(f"{address}/v1/models"))["data"][0]["id"]
        body = {"model": model, "max_tokens": 16, "messages": [{"role": "user", "content": "What is a telescope?"}]}
        said = json.loads(ask(f"{address}/v1/chat/completions", "", body))["choices"][0]["message"]["content"]
        tell("llm", f"{model} writes: {' '.join(said.split())[:60]} …", bool(said.strip()), began, said)


def until(done: Callable[[], object], seconds: float) -> None:
    """Try until it does not fail. Raises what it raises in the end."""
    end = time.monotonic() + seconds
    while True:
        try:
            done()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def tell(environment: str, what: str, passed: bool, began: float, output: str) -> None:
    """Print one line; end with the output when it did not pass."""
    print(f"{'✓' if passed else '✗'} {environment:<8} {what} ({time.monotonic() - began:.1f} s)", flush=True)
    if not passed:
        raise SystemExit(output)


if __name__ == "__main__":
    assert platform.home() == ROOT, "run it in the repository's own airflow environment"
    raise SystemExit(main())
