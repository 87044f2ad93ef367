"""The client of language models against a real server that streams, hangs, resets, refuses and talks nonsense."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from talker import WORDS, Handler, Talker, completion, talking, until

from orrery.errors import OrreryError, TryAgain, UserError
from orrery.llm import client
from orrery.llm.client import Model, ModelAway, PromptRefused
from orrery.platform import LanguageModel

ASK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is the secret of the seven seas?"}]
VENVS = Path(os.environ.get("ORRERY_VENVS") or Path(__file__).resolve().parents[2] / ".venvs")
KEY = "sk-very-secret-4711"


@pytest.fixture
def talker() -> Iterator[Talker]:
    with talking() as found:
        yield found


def model(talker: Talker, **fields: Any) -> Model:
    return Model(LanguageModel(**{"url": talker.url, "model": "small", "timeout": 5.0, **fields}))


def complete(of: Model, **options: Any) -> str:
    async def go() -> str:
        try:
            return await of.complete(ASK, **{"max_tokens": 20, **options})
        finally:
            await of.close()

    return asyncio.run(go())


def streamed(of: Model, **options: Any) -> tuple[list[str], OrreryError | None]:
    """Return the pieces, and the error that ended them."""

    async def go() -> tuple[list[str], OrreryError | None]:
        pieces: list[str] = []
        try:
            async with aclosing(of.stream(ASK, **{"max_tokens": 20, **options})) as stream:
                async for piece in stream:
                    pieces.append(piece)
        except OrreryError as e:
            return pieces, e
        finally:
            await of.close()
        return pieces, None

    return asyncio.run(go())


def ready(of: Model, *times: float) -> None:
    async def go() -> None:
        try:
            await of.ready(*times)
        finally:
            await of.close()

    asyncio.run(go())


def fails(of: Model, **options: Any) -> OrreryError:
    with pytest.raises(OrreryError) as caught:
        complete(of, **options)
    return caught.value


# what goes well


def test_an_answer_whole_and_in_pieces(talker: Talker) -> None:
    assert complete(model(talker)) == "".join(WORDS)
    assert streamed(model(talker)) == (WORDS, None)
    for heard in talker.heard:
        assert heard["model"] == "small" and heard["messages"] == ASK
        assert heard["max_tokens"] == 20 and heard["temperature"] == 0


def test_the_key_comes_from_its_variable_and_a_server_without_one_gets_none(
    talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "somebody-elses")
    monkeypatch.setenv("OPENAI_ORG_ID", "somebody")
    complete(model(talker))
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    complete(model(talker, key_env="MY_KEY"))
    assert [h["authorization"] for h in talker.headers] == ["Bearer none", f"Bearer {KEY}"]
    assert "openai-organization" not in talker.headers[0]
    assert talker.headers[0]["accept-encoding"] == "identity"


def test_ready_knows_whether_the_model_is_there(talker: Talker) -> None:
    ready(model(talker))
    with pytest.raises(UserError, match="has no model 'smal'") as caught:
        ready(model(talker, model="smal"))
    assert "did you mean 'small'" in caught.value.hint

    def tagged(handler: Handler, _: dict[str, Any]) -> bool:
        handler.say(200, {"object": "list", "data": [{"id": "small:3b", "object": "model"}]})
        return True

    talker.behave = tagged  # as Ollama names them
    ready(model(talker))
    ready(model(talker, model="small:3b"))


def test_proxies_are_not_asked_for_this_machines_own_servers(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert complete(model(talker))


def test_several_answers_at_a_time(talker: Talker) -> None:
    async def go() -> list[str]:
        of = model(talker)
        try:
            return await asyncio.gather(*(of.complete(ASK, max_tokens=20) for _ in range(20)))
        finally:
            await of.close()

    assert asyncio.run(go()) == ["".join(WORDS)] * 20


def test_a_reasoning_hosted_model_gets_the_fields_that_it_wants(talker: Talker) -> None:
    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        for field, said in (
            ("max_tokens", "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
            ("temperature", "'temperature' does not support 0 with this model."),
        ):
            if field in body:
                handler.say(400, {"error": {"message": f"Unsupported: {said}", "type": "invalid_request_error"}})
                return True
        return False

    talker.behave = behave

    async def go() -> None:
        of = model(talker)
        await of.complete(ASK, max_tokens=20)
        await of.complete(ASK, max_tokens=20)
        await of.close()

    asyncio.run(go())
    assert len(talker.heard) == 4, "learned once"
    assert talker.heard[-1]["max_completion_tokens"] == 20 and "temperature" not in talker.heard[-1]


@pytest.mark.slow
def test_the_laptops_own_model_answers() -> None:
    """No stand-in: llama.cpp with real weights, in its own environment."""
    python = VENVS / "llm" / "bin" / "python"
    if not python.exists():
        pytest.skip("the environment llm is not made: make test-environments")
    argv = [str(python), "-m", "orrery.llm.server", "--port", "0", "--context", "512"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"address=(\S+)", process.stdout.readline())
            assert found
            of = Model(LanguageModel(url=found[1], model="smollm2", timeout=120, context=512))

            async def go() -> None:
                await of.ready(60)
                whole = await of.complete(ASK, max_tokens=12)
                assert whole
                assert "".join([piece async for piece in of.stream(ASK, max_tokens=12)]) == whole
                with pytest.raises(PromptRefused, match="exceeds the available context size"):
                    await of.complete([{"role": "user", "content": "seven seas " * 500}], max_tokens=12)
                with pytest.raises(ModelAway, match=r"within 0\.05 s"):
                    await of.complete(ASK, max_tokens=400, timeout=0.05)
                await of.close()

            asyncio.run(go())
        finally:
            process.terminate()


# servers that are away


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    away = fails(Model(LanguageModel(url=f"http://127.0.0.1:{port}/v1", model="small")))
    assert isinstance(away, ModelAway) and isinstance(away, TryAgain)
    assert str(away).startswith(f"the language model at http://127.0.0.1:{port}/v1 does not answer: Connection refused")
    assert "orrery up --llm" in away.hint
    nowhere = fails(Model(LanguageModel(url="http://nobody.invalid/v1", model="small")))
    assert isinstance(nowhere, ModelAway) and "nobody.invalid" in nowhere.message


def hangs(handler: Handler, body: dict[str, Any]) -> bool:
    handler.hang()
    return True


def test_a_server_that_hangs_is_given_up_in_time(talker: Talker) -> None:
    talker.behave = hangs
    away = fails(model(talker), timeout=0.3)
    assert isinstance(away, ModelAway)
    assert away.message == f"the language model at {talker.url} did not answer within 0.3 s"
    assert isinstance(streamed(model(talker), timeout=0.3)[1], ModelAway)
    with pytest.raises(ModelAway, match=r"within 0\.2 s"):
        ready(model(talker), 0.2)


def test_a_stream_that_dries_up_is_given_up_in_time(talker: Talker) -> None:
    """Also one that drips: the time is for the whole answer."""

    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        handler.begin()
        handler.piece("Well, ")
        for _ in range(200):
            if talker.closing.wait(0.05):
                break
            handler.raw(": still there\n\n")
        return True

    talker.behave = behave
    pieces, error = streamed(model(talker), timeout=0.4)
    assert pieces == ["Well, "]
    assert isinstance(error, ModelAway) and "within 0.4 s" in error.message
    assert until(talker.broken_off.is_set), "the server is told to stop"


def test_a_connection_that_breaks_in_the_middle_is_no_answer(talker: Talker) -> None:
    def reset(handler: Handler, body: dict[str, Any]) -> bool:
        handler.begin()
        handler.piece("Half ")
        handler.reset()
        return True

    def ends(handler: Handler, body: dict[str, Any]) -> bool:
        handler.begin()
        handler.piece("Half ")
        handler.end()
        return True

    def torn(handler: Handler, body: dict[str, Any]) -> bool:
        handler.begin()
        handler.piece("Half ")
        handler.close_connection = True
        return True

    def tells(handler: Handler, body: dict[str, Any]) -> bool:
        handler.begin()
        handler.piece("Half ")
        handler.raw('data: {"error": {"message": "the engine died", "code": 500}}\n\n')
        handler.done()
        return True

    for behave in (reset, ends, torn, tells):
        talker.behave = behave
        pieces, error = streamed(model(talker))
        assert isinstance(error, ModelAway), behave.__name__
        assert pieces in (["Half "], []), behave.__name__
    assert error.message.endswith("broke off: the engine died")


def test_an_answer_that_has_ended_is_not_waited_for(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some leave the stream open, or never say [DONE]."""
    monkeypatch.setattr(client, "REST_S", 0.1)

    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        handler.begin()
        handler.piece("Whole.", finish="stop")
        handler.hang()
        return True

    talker.behave = behave
    assert streamed(model(talker)) == (["Whole."], None)


def test_who_stops_listening_ends_the_generation(talker: Talker) -> None:
    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        handler.begin()
        while not talker.closing.wait(0.01):
            handler.piece("on and on ")
        return True

    talker.behave = behave

    async def first(stream: AsyncIterator[str]) -> str:
        return await anext(stream)

    async def stops() -> None:
        of = model(talker)
        async with aclosing(of.stream(ASK, max_tokens=2000, timeout=30)) as stream:
            assert await first(stream) == "on and on "
        assert await asyncio.to_thread(until, talker.broken_off.is_set)
        talker.broken_off.clear()
        task = asyncio.create_task(_all(of.stream(ASK, max_tokens=2000, timeout=30)))
        assert await asyncio.to_thread(until, lambda: len(talker.heard) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(until, talker.broken_off.is_set)
        await of.close()

    asyncio.run(stops())


async def _all(stream: AsyncIterator[str]) -> None:
    async for _ in stream:
        pass


# servers that talk too much, or something else


def test_a_server_that_does_not_keep_to_max_tokens_is_cut_off(talker: Talker) -> None:
    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        if not body["stream"]:
            handler.say(200, completion("x" * 100_000))
            return True
        handler.begin()
        while not talker.closing.is_set():
            handler.piece("x" * 100)
        return True

    talker.behave = behave
    assert complete(model(talker)) == "x" * 240
    pieces, error = streamed(model(talker))
    assert "".join(pieces) == "x" * 240 and error is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_body_without_end_does_not_fill_the_memory(
    talker: Talker, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(client, "MOST_BYTES", 1 << 20)
    sent = [0]

    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        handler.begin()
        handler.raw("data: ")
        while not talker.closing.is_set():
            handler.raw("x" * 65_536)
            sent[0] += 65_536
        return True

    talker.behave = behave
    error = streamed(model(talker))[1] if streaming else fails(model(talker))
    assert isinstance(error, ModelAway) and "more than" in error.message
    assert until(talker.broken_off.is_set)


def test_compressed_data_that_nobody_asked_for_is_refused(talker: Talker) -> None:
    def behave(handler: Handler, body: dict[str, Any]) -> bool:
        handler.say(200, gzip.compress(b"0" * 50_000_000), Content_Encoding="gzip")
        return True

    talker.behave = behave
    error = fails(model(talker))
    assert isinstance(error, ModelAway) and "compressed" in error.message


GARBAGE = [
    b"<html>Welcome to nginx</html>",
    b"",
    b"[]",
    b"null",
    b"7",
    b"{}",
    b'{"choices": []}',
    b'{"choices": [{}]}',
    b'{"choices": [{"message": {"content": ["a"]}}]}',
    b'{"choices": "abc"}',
    b"\xff\xfe\x00",
]


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_garbage_is_told_from_an_answer(talker: Talker, body: bytes, kind: str) -> None:
    def behave(handler: Handler, _: dict[str, Any]) -> bool:
        handler.say(200, body, Content_Type=kind)
        return True

    talker.behave = behave
    error = fails(model(talker))
    assert isinstance(error, ModelAway) and "not in OpenAI's protocol" in error.message
    assert isinstance(streamed(model(talker))[1], ModelAway)


@pytest.mark.parametrize(
    "event", ["data: nonsense", 'data: {"choices": 7}', "data: [1]", "data: null", "event: x", "data: 7"]
)
def test_garbage_in_the_middle_of_a_stream(talker: Talker, event: str) -> None:
    def behave(handler: Handler, _: dict[str, Any]) -> bool:
        handler.begin()
        handler.piece("Half ")
        handler.raw(f"{event}\n\n")
        handler.done()
        return True

    talker.behave = behave
    pieces, error = streamed(model(talker))
    assert pieces == ["Half "]
    assert isinstance(error, ModelAway)


# servers that refuse


def refuses(talker: Talker, status: int, body: object, **headers: str) -> None:
    def behave(handler: Handler, _: dict[str, Any]) -> bool:
        handler.say(status, body, **headers)
        return True

    talker.behave = behave


def test_a_wrong_key_is_the_users_and_is_never_shown(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    for status in (401, 403):
        refuses(talker, status, {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}})
        error = fails(model(talker, key_env="MY_KEY"))
        assert isinstance(error, UserError) and "MY_KEY" in error.hint
        assert KEY not in str(error)
    assert "key_env" in fails(model(talker)).hint
    refuses(talker, 500, {"error": f"cannot check {KEY}"})
    error = fails(model(talker, key_env="MY_KEY"))
    assert "cannot check ***" in error.message
    assert KEY not in repr(model(talker, key_env="MY_KEY"))
    assert error.__cause__ is None and error.__suppress_context__, "a traceback would show the request"


@pytest.mark.parametrize("value", ["", "  ", "a b", "schlüssel", "a\nb"])
def test_a_key_that_cannot_be_is_named_by_its_variable(
    talker: Talker, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(UserError, match="MY_KEY") as caught:
        model(talker, key_env="MY_KEY")
    assert not value.strip() or value not in str(caught.value)


def test_an_unknown_model_is_the_users(talker: Talker) -> None:
    refuses(
        talker, 404, {"error": {"message": "The model `small` does not exist.", "type": "NotFoundError", "code": 404}}
    )
    error = fails(model(talker))
    assert isinstance(error, UserError) and not isinstance(error, PromptRefused)
    assert "does not know 'small' (404): The model `small` does not exist." in error.message
    assert "platform.yaml" in error.hint


def test_too_many_requests_say_how_long_to_wait(talker: Talker) -> None:
    refuses(talker, 429, {"error": {"message": "slow down"}}, Retry_After="7")
    error = fails(model(talker))
    assert isinstance(error, ModelAway) and error.retry_after == 7
    for odd in ("Wed, 21 Oct 2065 07:28:00 GMT", "-1", "nan", "1e99"):
        refuses(talker, 429, {}, Retry_After=odd)
        error = fails(model(talker))
        assert isinstance(error, ModelAway) and error.retry_after is None, odd
    assert len(talker.heard) == 5, "asked once each: the service has no time for more"
    refuses(talker, 429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}})
    assert isinstance(fails(model(talker)), UserError)


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_a_server_in_trouble_is_worth_another_attempt(talker: Talker, status: int) -> None:
    refuses(talker, status, b"<html>oops</html>", Content_Type="text/html")
    error = fails(model(talker))
    assert isinstance(error, ModelAway) and f"answers {status}" in error.message


def test_a_prompt_that_is_too_long_is_told_from_a_server_that_is_away(talker: Talker) -> None:
    refuses(talker, 400, {"error": {"message": "This model's maximum context length is 2048 tokens.", "code": 400}})
    error = fails(model(talker))
    assert isinstance(error, PromptRefused) and "maximum context length is 2048" in error.message


def test_no_error_repeats_the_prompt(talker: Talker) -> None:
    for status in (400, 404, 422, 500):
        said = [{"loc": ["body"], "msg": "bad", "input": ASK[1]["content"]}]
        refuses(talker, status, {"detail": said})
        error = fails(model(talker))
        assert "seven seas" not in str(error) and "left out" in error.message
    assert "seven seas" not in str(error.__cause__) + str(error.details)


def test_a_server_that_sends_elsewhere_is_not_followed_with_the_key(
    talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with talking() as other:
        refuses(talker, 307, {}, Location=f"{other.url}/chat/completions")
        error = fails(model(talker, key_env="MY_KEY"))
        assert isinstance(error, UserError) and "sends elsewhere (307)" in error.message
        assert other.heard == []
