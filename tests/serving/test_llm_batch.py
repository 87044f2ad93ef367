"""A file of prompts, answered by a real server that is away, refuses, or is never done; killed, and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from talker import Handler, Talker, completion, talking, until

from orrery.llm import batch, many


@pytest.fixture
def talker() -> Iterator[Talker]:
    with talking() as found:
        yield found


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "FIRST_S", 0.01)


def echo(handler: Handler, body: dict[str, Any]) -> bool:
    """Answer with what was asked, so that an answer in the wrong place is seen."""
    handler.say(200, completion(f"re: {body['messages'][-1]['content']}"))
    return True


def write(folder: Path, count: int) -> None:
    lines = [json.dumps({"id": f"q{i}", "prompt": f"question {i}"}) for i in range(count)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def arguments(folder: Path, talker: Talker, *more: str) -> list[str]:
    files = ["--prompts", str(folder / "prompts.jsonl"), "--answers", f"file://{folder}/answers.jsonl"]
    return [*files, "--url", talker.url, "--model", "small", "--block", "4", *more]


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_answers_come_in_the_prompts_order_and_are_asked_once(tmp_path: Path, talker: Talker) -> None:
    talker.behave = echo
    write(tmp_path, 10)
    assert batch.main(arguments(tmp_path, talker, "--parallel", "3")) == 0
    assert answers(tmp_path) == [{"id": f"q{i}", "answer": f"re: question {i}"} for i in range(10)]
    before = (tmp_path / "answers.jsonl").read_bytes()
    assert batch.main(arguments(tmp_path, talker)) == 0
    assert len(talker.heard) == 10, "nothing is asked twice"
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    # Other bounds are other answers; an added prompt asks its own block alone.
    write(tmp_path, 11)
    assert batch.main(arguments(tmp_path, talker)) == 0
    assert len(talker.heard) == 13 and len(answers(tmp_path)) == 11
    assert batch.main(arguments(tmp_path, talker, "--max-tokens", "5")) == 0
    assert len(talker.heard) == 24


def test_no_prompts_are_no_answers(tmp_path: Path, talker: Talker) -> None:
    write(tmp_path, 0)
    assert batch.main(arguments(tmp_path, talker)) == 0
    assert answers(tmp_path) == [] and talker.heard == []


def test_no_more_than_parallel_at_a_time(tmp_path: Path, talker: Talker) -> None:
    lock, now, most = threading.Lock(), [0], [0]
    full = threading.Event()

    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == 3:
                full.set()
        full.wait(10)
        with lock:
            now[0] -= 1
        return echo(handler, body)

    talker.behave = behave
    write(tmp_path, 12)
    assert batch.main(arguments(tmp_path, talker, "--parallel", "3")) == 0
    assert most[0] == 3


def test_a_server_that_comes_back_is_asked_again(tmp_path: Path, talker: Talker) -> None:
    failures = iter([503, 429, 500])

    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        status = next(failures, None)
        if status is None:
            return echo(handler, body)
        handler.say(status, {"error": {"message": "not now"}}, **({"Retry_After": "0"} if status == 429 else {}))
        return True

    talker.behave = behave
    write(tmp_path, 5)
    assert batch.main(arguments(tmp_path, talker, "--parallel", "1")) == 0
    assert [a["answer"] for a in answers(tmp_path)] == [f"re: question {i}" for i in range(5)]
    assert len(talker.heard) == 8


def test_what_was_answered_is_kept_when_patience_ends(
    tmp_path: Path, talker: Talker, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        if body["messages"][-1]["content"] == "question 6":
            handler.say(503, {"error": {"message": "out of order"}})
            return True
        return echo(handler, body)

    talker.behave = behave
    write(tmp_path, 8)
    assert batch.main(arguments(tmp_path, talker, "--patience", "0.2")) == 75
    assert "out of order" in capsys.readouterr().out
    assert not (tmp_path / "answers.jsonl").exists(), "half of the answers are none"
    talker.behave, before = echo, len(talker.heard)
    assert batch.main(arguments(tmp_path, talker)) == 0
    assert len(talker.heard) == before + 4, "the first block was there"
    assert len(answers(tmp_path)) == 8


def test_a_prompt_that_is_refused_does_not_stop_the_others(tmp_path: Path, talker: Talker) -> None:
    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        if body["messages"][-1]["content"] == "question 1":
            handler.say(400, {"error": {"message": "too long for its context"}})
            return True
        return echo(handler, body)

    talker.behave = behave
    write(tmp_path, 3)
    assert batch.main(arguments(tmp_path, talker)) == 0
    first, second, third = answers(tmp_path)
    assert first["answer"] and third["answer"] and second["answer"] is None
    assert "too long for its context" in second["error"]


def test_a_wrong_key_or_model_ends_it_at_once(
    tmp_path: Path, talker: Talker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 4)
    for status in (401, 404):

        def behave(handler: Handler, body: dict[str, Any], status: int = status) -> bool:
            handler.say(status, {"error": {"message": "no"}})
            return True

        talker.behave = behave
        assert batch.main(arguments(tmp_path, talker)) == 64
    assert batch.main(arguments(tmp_path, talker, "--key-env", "NOT_SET_ANYWHERE")) == 64
    assert "NOT_SET_ANYWHERE is not set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "prompts.jsonl:1: "),
        ("[]", "expected {"),
        ('{"id": 7, "prompt": "x"}', "expected {"),
        ('{"id": "a"}', "neither `messages` nor `prompt`"),
        ('{"id": "a", "prompt": 7}', "a message is not as it must be"),
        ('{"id": "a", "messages": [{"role": "robot", "content": "x"}]}', "system, user, assistant"),
        ('{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}', "prompts.jsonl:3: the id 'a' is given twice"),
    ],
)
def test_wrong_prompts_are_named_by_their_line(
    tmp_path: Path, talker: Talker, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    assert batch.main(arguments(tmp_path, talker)) == 64
    assert said in capsys.readouterr().out
    assert talker.heard == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--parallel", "0"], "--parallel is 0"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--url", "ftp://x"], "--url: "),
        (["--prompts", "none.jsonl"], "no such file"),
        (["--answers", "s3://me:hush@bucket/a"], "a password must not stand"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, talker: Talker, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    write(tmp_path, 1)
    assert batch.main(arguments(tmp_path, talker, *more)) == 64
    out = capsys.readouterr().out
    assert said in out and "hush" not in out


def test_told_to_stop_it_keeps_its_blocks_and_goes_on_from_there(tmp_path: Path, talker: Talker) -> None:
    stuck = threading.Event()

    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        if int(body["messages"][-1]["content"].split()[1]) < 8:
            return echo(handler, body)
        stuck.set()
        handler.hang()
        return True

    talker.behave = behave
    write(tmp_path, 10)
    argv = [sys.executable, "-m", "orrery.llm.batch", *arguments(tmp_path, talker)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert until(stuck.is_set, 60)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143, said
    assert "told to stop" in said
    talker.behave, before = echo, len(talker.heard)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout
    assert len(talker.heard) == before + 2
    assert [a["answer"] for a in answers(tmp_path)] == [f"re: question {i}" for i in range(10)]
