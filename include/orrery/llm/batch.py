"""Answer a file of prompts: a pod's command, for generation in bulk or a judge's verdicts.

    python -m orrery.llm.batch --prompts s3://bucket/prompts.jsonl --answers s3://bucket/answers.jsonl \
        --url http://vllm.orrery-platform.svc.cluster.local:8000/v1 --model NAME --key-env VLLM_API_KEY

Prompts, one a line: {"id": …, "messages": [{"role", "content"}, …]} or {"id": …, "prompt": "…"}.
Answers, in that order: {"id", "answer": "…"}; of a prompt that was refused {"id", "answer": null, "error": "…"}.

Prompts are answered in blocks, and each block's answers are put into the store whole, below `<answers>.parts/`, under a
name that follows from the prompts, the model and the bounds: a run that was killed goes on behind its last block, and
one that is repeated asks nothing. The answers' file itself comes last, and whole. In an environment that has openai:
`rag` or `serve`. Exit codes as everywhere: 0 done, 64 someone must act, 75 the model or the store was away, 143 told to
stop.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orrery import log
from orrery.errors import DataError, Interrupted, OrreryError, UserError
from orrery.llm.client import Model, PromptRefused
from orrery.llm.many import Asking, ask_all
from orrery.platform import LanguageModel
from orrery.store import Store
from orrery.uri import absolute, has_secret

BLOCK = 256
MOST_BYTES = 1 << 30
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """One line of the prompts."""

    id: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Place:
    """A file in a folder or a bucket."""

    store: Store
    name: str

    @classmethod
    def at(cls, uri: str) -> Place:
        """Read a path or a URI. Raises `UserError` for one that cannot be, or holds a password."""
        if has_secret(uri):
            raise UserError(
                "a password must not stand in a URI", hint="give it in the environment: AWS_SECRET_ACCESS_KEY"
            )
        whole = absolute(uri if "://" in uri else f"file://{uri}", Path.cwd())
        folder, _, name = whole.rpartition("/")
        if not name or folder.endswith(("/", ":")):
            raise UserError(f"{uri!r} names no file", hint="such as s3://bucket/answers.jsonl")
        return cls(Store(folder), name)

    def __str__(self) -> str:
        return f"{self.store.uri}/{self.name}"


def prompts(where: Place) -> list[Prompt]:
    """Read the prompts. Raises `DataError` that names the line of what is wrong."""
    try:
        if (size := where.store.size(where.name)) > MOST_BYTES:
            raise DataError(f"{where}: {size:,} bytes; at most {MOST_BYTES:,} are allowed", hint="several files")
        text = where.store.read(where.name).decode()
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such file") from None
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text") from None
    found, seen = [], set[str]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = _prompt(json.loads(line))
        except ValueError as e:
            raise DataError(f"{where}:{number}: {e}") from None
        if prompt.id in seen:
            raise DataError(f"{where}:{number}: the id {prompt.id!r} is given twice")
        seen.add(prompt.id)
        found.append(prompt)
    return found


def _prompt(line: Any) -> Prompt:
    if not isinstance(line, dict) or not isinstance(line.get("id"), str) or not line["id"]:
        raise ValueError('expected {"id": "…", "messages": […]} or {"id": "…", "prompt": "…"}')
    if "prompt" in line:
        line = {**line, "messages": [{"role": "user", "content": line["prompt"]}]}
    messages = line.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"id {line['id']!r} has neither `messages` nor `prompt`")
    for message in messages:
        fine = isinstance(message, dict) and set(message) == {"role", "content"} and message["role"] in ROLES
        if not fine or not isinstance(message["content"], str):
            allowed = f'{{"role": one of {", ".join(ROLES)}, "content": text}} is allowed'
            raise ValueError(f"id {line['id']!r}: a message is not as it must be; {allowed}")
    return Prompt(line["id"], messages)


def run(asked: list[Prompt], answers: Place, model: Model, how: Asking, size: int = BLOCK) -> int:
    """Answer what is not answered yet, `size` prompts a block, and put the whole; return how many were asked now.

    Raises what `ask_all` raises, and `TryAgain` when the store is away; finished blocks stay.
    """
    blocks = [asked[i : i + size] for i in range(0, len(asked), size)]
    paths = [f"{answers.name}.parts/{_digest(block, model, how)}.jsonl" for block in blocks]
    there = set(answers.store.names(f"{answers.name}.parts"))
    missing = [(b, p) for b, p in zip(blocks, paths, strict=True) if p.rpartition("/")[2] not in there]
    count = sum(len(block) for block, _ in missing)
    log.get().info("prompts", all=len(asked), answered=len(asked) - count)
    with log.progress("answering", count, "prompts") as tick:
        asyncio.run(_answer(missing, answers.store, model, how, tick))
    answers.store.put(answers.name, b"".join(answers.store.read(path) for path in paths))
    log.get().info("answered", file=str(answers))
    return count


async def _answer(missing: list[tuple[list[Prompt], str]], store: Store, model: Model, how: Asking, tick: Any) -> None:
    """Ask block by block. SIGTERM gives up what is being asked. Raises `Interrupted`."""
    me = asyncio.current_task()
    assert me is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, me.cancel)
    try:
        for block, path in missing:
            said = await ask_all(model, [p.messages for p in block], how, tick)
            lines = b"".join(_line(prompt, answer) for prompt, answer in zip(block, said, strict=True))
            await asyncio.to_thread(store.put, path, lines)
    except asyncio.CancelledError:
        raise Interrupted("told to stop; the blocks that were answered are kept") from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        with suppress(Exception):
            await model.close()


def _line(prompt: Prompt, answer: str | PromptRefused) -> bytes:
    fields: dict[str, Any] = {"id": prompt.id, "answer": answer}
    if isinstance(answer, PromptRefused):
        fields = {"id": prompt.id, "answer": None, "error": answer.message}
    return json.dumps(fields, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def _digest(block: list[Prompt], model: Model, how: Asking) -> str:
    """Return the name of a block's answers: what they follow from, and not where the model is."""
    facts = [model.endpoint.model, how.max_tokens, [[p.id, p.messages] for p in block]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, answer, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m orrery.llm.batch", description="Answer a file of prompts.")
    parser.add_argument("--prompts", required=True, help="JSON lines: a path or a URI")
    parser.add_argument("--answers", required=True, help="where the answers go: a path or a URI")
    parser.add_argument("--url", required=True, help="the model's base, such as http://vllm:8000/v1")
    parser.add_argument("--model", required=True, help="what the server calls it")
    parser.add_argument("--key-env", help="the variable that holds its key")
    parser.add_argument("--parallel", type=int, default=Asking.parallel, help="prompts at a time")
    parser.add_argument("--max-tokens", type=int, default=Asking.max_tokens, help="of one answer")
    parser.add_argument("--timeout", type=float, default=Asking.timeout, help="seconds for one answer")
    parser.add_argument(
        "--patience", type=float, default=Asking.patience, help="seconds to wait for a model that is away"
    )
    parser.add_argument("--block", type=int, default=BLOCK, help="prompts whose answers are put away together")
    args = parser.parse_args(argv)
    log.configure()
    try:
        how = Asking(args.parallel, args.max_tokens, args.timeout, args.patience)
        _check(how, args.block)
        model = Model(_endpoint(args.url, args.model, args.key_env, min(args.timeout, 600.0)))
        run(prompts(Place.at(args.prompts)), Place.at(args.answers), model, how, args.block)
    except OrreryError as e:
        log.get().error(e.message, hint=e.hint)
        return e.exit_code
    return 0


def _check(how: Asking, block: int) -> None:
    for name, value, most in (*_bounds(how), ("block", block, 100_000)):
        if not 0 < value <= most:
            raise UserError(f"--{name} is {value:g}", hint=f"above 0 and at most {most:g} is allowed")


def _bounds(how: Asking) -> Iterator[tuple[str, float, float]]:
    yield "parallel", how.parallel, 1024
    yield "max-tokens", how.max_tokens, 1 << 17
    yield "timeout", how.timeout, 3600
    yield "patience", how.patience, 86_400


def _endpoint(url: str, name: str, key_env: str | None, timeout: float) -> LanguageModel:
    from pydantic import ValidationError

    try:
        return LanguageModel(url=url, model=name, key_env=key_env, timeout=timeout)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{field}: {first['msg']}") from None


if __name__ == "__main__":
    raise SystemExit(main())
