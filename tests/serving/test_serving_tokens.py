from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml

from orrery.errors import SpecError, UserError
from orrery.serving.tokens import Tokens, add

PAST, FUTURE = date(2020, 1, 1), date(2999, 1, 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_token_is_printed_once_and_only_its_digest_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "tokens.yaml"
    argv = [sys.executable, "-m", "orrery.serving", "token"]
    env = {**os.environ, "ORRERY_SERVE_TOKENS": str(file)}
    done = subprocess.run([*argv, "wiki", "--groups", "ops, hr"], env=env, capture_output=True, text=True, check=True)
    token = done.stdout.strip()
    assert len(token) >= 43
    assert token not in done.stderr
    assert token not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    entry = yaml.safe_load(file.read_text())["tokens"][0]
    assert entry == {"name": "wiki", "sha256": hashlib.sha256(token.encode()).hexdigest(), "groups": ["ops", "hr"]}
    caller = Tokens(file).caller(token)
    assert caller is not None
    assert (caller.name, caller.groups) == ("wiki", {"ops", "hr", "everyone"})
    again = subprocess.run([*argv, "wiki"], env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 64
    assert "already" in again.stderr
    bad = subprocess.run([*argv, "x", "--groups", "Ops!"], env=env, capture_output=True, text=True, check=False)
    assert bad.returncode == 64
    assert "Traceback" not in bad.stderr
    for day, said in (("yesterday", "is no day"), ("2020-01-01", "is over")):
        late = subprocess.run([*argv, "x", "--expires", day], env=env, capture_output=True, text=True, check=False)
        assert (late.returncode, said in late.stderr) == (64, True)
    none = subprocess.run(
        [*argv, "x"], env={**env, "ORRERY_SERVE_TOKENS": ""}, capture_output=True, text=True, check=False
    )
    assert (none.returncode, "ORRERY_SERVE_TOKENS" in none.stderr) == (64, True)


def test_unknown_expired_and_malformed_tokens_are_nobody(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    old, good = add(file, "old", [], PAST), add(file, "good", ["ops"], FUTURE)
    tokens = Tokens(file)
    assert len(tokens) == 2
    assert tokens.caller(good) is not None
    for wrong in (old, "", "x", good + "x", good[:-1], hashlib.sha256(good.encode()).hexdigest(), "\ud800", "é" * 9999):
        assert tokens.caller(wrong) is None


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file, clock = tmp_path / "tokens.yaml", Clock()
    first = add(file, "first", [])
    tokens = Tokens(file, clock)
    second = add(file, "second", [])
    assert tokens.caller(second) is None
    clock.now = 1
    assert tokens.caller(second) is not None
    # Broken: those before stay in force, and the service says so.
    file.write_text("tokens: [{name: x}]")
    clock.now = 2
    assert tokens.caller(first) is not None
    assert tokens.problem is not None
    file.unlink()
    clock.now = 3
    assert tokens.caller(first) is not None
    assert tokens.problem is not None
    file.write_text("tokens: []")
    clock.now = 4
    assert tokens.caller(first) is None
    assert tokens.problem is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokens: [{name: a, sha256: abc, groups: []}]", "tokens.0.sha256"),
        ("tokens: [{name: a, token: secret}]", "no such field"),
        ("- name: a", "key: value"),
        (f"tokens: [{{name: a, sha256: {'a' * 64}}}, {{name: a, sha256: {'b' * 64}}}]", "two tokens have the name"),
        (f"tokens: [{{name: a, sha256: {'a' * 64}, expires: soon}}]", "expires"),
        ("{", "not YAML"),
    ],
)
def test_a_broken_file_is_refused_by_line_and_field(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=r"tokens.yaml:[12]: "):
        Tokens(file)
    with pytest.raises(UserError) as error:
        Tokens(file)
    assert said in str(error.value)


def test_a_file_that_others_can_read_is_said_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens.yaml"
    token = add(file, "a", [])
    file.chmod(0o644)
    assert Tokens(file).caller(token) is not None
    assert "chmod 600" in capsys.readouterr().out
