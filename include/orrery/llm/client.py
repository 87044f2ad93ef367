"""The one client of language models, for whatever speaks OpenAI's protocol: vLLM, TGI, Ollama, llama.cpp, hosted ones.

An answer comes in time and whole, or an error says why not. No error repeats the prompt or the key: what a question
says is nobody's business, and errors are logged.

    ModelAway       75   refused, slow, busy, broken off in the middle, or not OpenAI's protocol: worth another attempt
    PromptRefused   64   this prompt cannot be answered, such as one that is too long; others can
    UserError       64   wrong key, unknown model, wrong address
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2  # openai's own HTTP library
import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from orrery.errors import OrreryError, RequestError, TryAgain, UserError, nearest
from orrery.platform import LanguageModel

__all__ = ["Message", "Model", "ModelAway", "PromptRefused"]

Message = Mapping[str, str]
T = TypeVar("T")
CONNECT_S = 5.0
# From the last piece of an answer to the end of its stream, which brings nothing more.
REST_S = 1.0
# A server that does not keep to `max_tokens` is cut off: so many characters a token.
CHARACTERS = 12
# No answer of ours is that large; a server that sends without end would fill the memory.
MOST_BYTES = 32 << 20
SHOWN = 200
# Waiting helps; other 4xx are the same each time.
PASSING = (408, 409, 425, 429)
REFUSED = (400, 413, 422)
# What openai's library and its HTTP library raise; ValueError is what is no JSON.
TROUBLE = (openai.OpenAIError, httpx2.HTTPError, httpx2.StreamError, ValueError, AttributeError, TypeError)


class ModelAway(TryAgain):
    """The language model gave no answer, or not in time. `retry_after`: the seconds that it asked to be left alone."""

    def __init__(self, message: str, *, hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class PromptRefused(RequestError):
    """The server takes no such prompt; the next one may be fine."""


class Model:
    """A language model behind a URL. One event loop at a time may use it; `close` gives its connections back."""

    def __init__(self, endpoint: LanguageModel, *, temperature: float = 0.0) -> None:
        """Make the client; nothing is asked yet. Raises `UserError` when the variable that holds the key is not set."""
        self.endpoint = endpoint
        self.address = endpoint.url.rstrip("/")
        self._key = _key(endpoint)
        self._limit = "max_tokens"
        self._temperature: float | None = temperature
        http = httpx2.AsyncClient(
            # Proxies are for what is outside; this machine's own servers are asked directly.
            trust_env=not _loopback(self.address),
            # Reading all certificates takes longer than an answer of a small model; http needs none.
            verify=self.address.startswith("https:"),
            # A key goes to the address that the platform names, and nowhere else.
            follow_redirects=False,
            # Servers close idle connections after five seconds and more: none is reused that late.
            limits=httpx2.Limits(max_connections=256, max_keepalive_connections=32, keepalive_expiry=2.0),
            # Told to stop is told by closing the connection, which in HTTP/2 would be that of others too.
            http2=False,
            event_hooks={"response": [_bound]},
        )
        self._client = openai.AsyncOpenAI(
            base_url=self.address,
            api_key=self._key or "none",
            http_client=http,
            # The service would rather show passages, and `many` counts its attempts itself.
            max_retries=0,
            default_headers={"Accept-Encoding": "identity"},
        )
        if endpoint.key_env is None:  # whose account this is concerns nobody but who gave the key
            self._client.organization = self._client.project = None

    def __repr__(self) -> str:
        return f"Model({self.endpoint.model!r} at {self.address})"

    async def complete(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, timeout: float | None = None
    ) -> str:
        """Return the whole answer, at most `max_tokens` long, within `timeout` seconds (the platform's by default).

        Raises `ModelAway`, `PromptRefused` or `UserError`.
        """
        limit = timeout or self.endpoint.timeout
        most = max_tokens or self.endpoint.context // 4
        asked = [dict(m) for m in messages]
        try:
            async with asyncio.timeout(limit):
                answer = await self._create(asked, most, limit, stream=False)
            if not isinstance(answer, ChatCompletion):
                raise ValueError("not a chat completion")
            text = answer.choices[0].message.content
            if text is not None and not isinstance(text, str):
                raise ValueError("an answer that is no text")
        except (TimeoutError, IndexError, *TROUBLE) as e:
            raise self._explained(e, messages, limit) from None
        return (text or "")[: most * CHARACTERS]

    async def stream(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, timeout: float | None = None
    ) -> AsyncGenerator[str, None]:
        """Give the answer piece by piece; `timeout` is for all of it. Who stops listening ends the generation.

        Raises `ModelAway`, `PromptRefused` or `UserError`, also in the middle: what came until then is not an answer.
        """
        limit = timeout or self.endpoint.timeout
        most = max_tokens or self.endpoint.context // 4
        deadline = time.monotonic() + limit
        left, ended, chunks = most * CHARACTERS, False, None
        asked = [dict(m) for m in messages]
        try:
            try:
                chunks = await _within(self._create(asked, most, limit, stream=True), limit)
                while left > 0:
                    rest = deadline - time.monotonic()
                    try:
                        chunk = await _within(anext(chunks, None), min(rest, REST_S) if ended else rest)
                    except TimeoutError:
                        if ended:
                            return
                        raise
                    if chunk is None:
                        break
                    piece, done = _piece(chunk)
                    ended = ended or done
                    if piece:
                        yield piece[:left]
                        left -= len(piece)
            except (TimeoutError, *TROUBLE) as e:
                raise self._explained(e, messages, limit) from None
            if not ended and left > 0:
                raise ModelAway(f"{self._who()} broke off in the middle of its answer")
        finally:
            if chunks is not None:
                with suppress(*TROUBLE):
                    await chunks.close()

    async def ready(self, timeout: float = CONNECT_S) -> None:
        """Ask whether the server answers and has the model. Raises `ModelAway` or `UserError`."""
        try:
            async with asyncio.timeout(timeout):
                listed = await self._client.models.list(timeout=_times(timeout))
            known = sorted({str(m.id) for m in listed.data})
            # Ollama's names have a tag, which may be left out.
            untagged = {name.partition(":")[0] for name in known}
        except (TimeoutError, *TROUBLE) as e:
            raise self._explained(e, (), timeout) from None
        name = self.endpoint.model
        if known and name not in known and name not in untagged:
            raise UserError(f"{self.address} has no model {name!r}", hint=nearest(name, known))

    async def close(self) -> None:
        """Give the connections back."""
        await self._client.close()

    async def _create(self, messages: list[dict[str, str]], most: int, limit: float, *, stream: bool) -> Any:
        """Ask. Hosted models that reason want other fields than everyone else, and say so: then they get those."""
        while True:
            fields: dict[str, Any] = {self._limit: most}
            if self._temperature is not None:
                fields["temperature"] = self._temperature
            try:
                return await self._client.chat.completions.create(
                    model=self.endpoint.model,
                    messages=messages,
                    stream=stream,
                    timeout=_times(limit),
                    **fields,
                )
            except openai.BadRequestError as e:
                if not self._learn(_words(e).lower()):
                    raise

    def _learn(self, said: str) -> bool:
        """Change a field that the server does not take; return whether there is something new to try."""
        if self._limit == "max_tokens" and "max_completion_tokens" in said:
            self._limit = "max_completion_tokens"
        elif self._temperature is not None and "temperature" in said and "support" in said:
            self._temperature = None
        else:
            return False
        return True

    def _who(self) -> str:
        return f"the language model at {self.address}"

    def _explained(self, error: Exception, messages: Sequence[Message], limit: float) -> OrreryError:
        """Return what befell a request, in words of ours."""
        if isinstance(error, TimeoutError | openai.APITimeoutError | httpx2.TimeoutException):
            return ModelAway(f"{self._who()} did not answer within {limit:g} s")
        if isinstance(error, openai.APIStatusError):
            return self._status(error, messages)
        if isinstance(error, openai.APIResponseValidationError):
            return self._strange()
        if isinstance(error, openai.APIConnectionError | httpx2.TransportError | httpx2.StreamError):
            return ModelAway(f"{self._who()} does not answer: {_cause(error)}", hint=_start(self.address))
        if isinstance(error, openai.APIError):  # a stream that tells of an error in its middle
            return ModelAway(f"{self._who()} broke off: {self._quoted(error, messages)}")
        return self._strange()

    def _strange(self) -> ModelAway:
        return ModelAway(
            f"{self._who()} answers, but not in OpenAI's protocol",
            hint="the base URL of most servers ends with /v1; is something else there?",
        )

    def _status(self, error: openai.APIStatusError, messages: Sequence[Message]) -> OrreryError:
        """Return what an HTTP status means: who must act, or that waiting helps."""
        code, said = error.status_code, self._quoted(error, messages)
        variable = self.endpoint.key_env
        if code in (401, 403):
            hint = f"it is read from {variable}" if variable else "name the variable that holds it: `key_env` in llms"
            return UserError(
                f"{self._who()} refuses {'its' if variable else 'to work without a'} key ({code})", hint=hint
            )
        if code == 404:
            hint = "`model` and `url` of this entry in platform.yaml (llms); the URL of most servers ends with /v1"
            return UserError(f"{self._who()} does not know {self.endpoint.model!r} ({code}): {said}", hint=hint)
        if code == 429 and getattr(error, "code", None) == "insufficient_quota":
            return UserError(f"{self._who()}: the account's quota is used up", hint="see to the account")
        if code in PASSING or code >= 500:
            return ModelAway(f"{self._who()} answers {code}: {said}", retry_after=_retry_after(error.response))
        if 300 <= code < 400:
            return UserError(
                f"{self._who()} sends elsewhere ({code})", hint="give the address that it sends to, as `url`"
            )
        if code in REFUSED:
            return PromptRefused(f"{self._who()} refuses the prompt ({code}): {said}")
        return UserError(f"{self._who()} answers {code}: {said}")

    def _quoted(self, error: openai.APIError, messages: Sequence[Message]) -> str:
        """Return the server's own words, on one line, unless they repeat the prompt; the key is struck out."""
        said = " ".join(_words(error).split())[:SHOWN]
        if self._key:
            said = said.replace(self._key, "***")
        prompt = " ".join(" ".join(m.get("content", "") for m in messages).split())
        width = 24
        if any(said[i : i + width] in prompt for i in range(max(0, len(said) - width + 1))):
            return "(its words repeat the prompt, so they are left out)"
        return said or "(without a word)"


class _Counted(httpx2.AsyncByteStream):
    """A response's bytes, up to `MOST_BYTES`."""

    def __init__(self, inner: httpx2.AsyncByteStream) -> None:
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        count = 0
        async for part in self._inner:
            count += len(part)
            if count > MOST_BYTES:
                raise httpx2.RemoteProtocolError(f"it sends more than {MOST_BYTES >> 20} MB")
            yield part

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _bound(response: httpx2.Response) -> None:
    """Bound what a response may hold. A compressed one could hold anything, and we asked for none."""
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        await response.aclose()
        raise httpx2.RemoteProtocolError("it sends compressed data that nobody asked for")
    if isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = _Counted(response.stream)


async def _within(awaited: Awaitable[T], limit: float) -> T:
    async with asyncio.timeout(max(limit, 0.0)):
        return await awaited


def _piece(chunk: object) -> tuple[str, bool]:
    """Return a chunk's text, and whether the answer ends with it. Raises `ValueError` for what is no chunk."""
    if not isinstance(chunk, ChatCompletionChunk):
        raise ValueError("not a chunk of a chat completion")
    if not chunk.choices:  # such as the one that tells of the usage
        return "", False
    first = chunk.choices[0]
    text = first.delta.content if first.delta else None
    if text is not None and not isinstance(text, str):
        raise ValueError("a piece that is no text")
    return text or "", first.finish_reason is not None


def _times(limit: float) -> httpx2.Timeout:
    return httpx2.Timeout(limit, connect=min(limit, CONNECT_S))


def _key(endpoint: LanguageModel) -> str | None:
    """Return the key. Raises `UserError` when its variable is empty, or holds what no header can carry."""
    if endpoint.key_env is None:
        return None
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        raise UserError(
            f"the language model at {endpoint.url} wants a key, and {endpoint.key_env} is not set",
            hint="set it, or take `key_env` out of its entry in platform.yaml (llms)",
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{endpoint.key_env} holds what cannot be a key: a space, or no plain character")
    return key


def _words(error: openai.APIError) -> str:
    """Return what a server says of an error: the message of OpenAI's, TGI's and FastAPI's forms, else what is there."""
    body: Any = error.body
    for field in ("error", "message", "detail"):
        if isinstance(body, dict) and field in body:
            body = body[field]
    if isinstance(body, str):
        return body
    if body is None:
        return "" if isinstance(error, openai.APIStatusError) else str(error.message)
    return json.dumps(body, default=str)[: 10 * SHOWN]


def _cause(error: BaseException) -> str:
    """Return the innermost reason of a failed connection: `Connection refused`, `Name or service not known`."""
    seen, reason = 0, ""
    at: BaseException | None = error
    while at is not None and seen < 20:
        if isinstance(at, BaseExceptionGroup):
            at = at.exceptions[0]
        if isinstance(at, OSError) and at.strerror:  # asyncio's own words for it hold the address again
            reason = os.strerror(at.errno) if at.errno and at.errno > 0 else at.strerror
        elif not reason and str(at) and not isinstance(at, openai.APIError):
            reason = str(at)
        at, seen = at.__cause__ or at.__context__, seen + 1
    return reason or type(error).__name__


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds of a Retry-After header; a date is not read."""
    try:
        wanted = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return wanted if 0 <= wanted < 86_400 else None


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _start(address: str) -> str:
    return "is it started? The laptop's own: `orrery up --llm`" if _loopback(address) else ""
