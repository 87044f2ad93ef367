"""What the service takes and gives over HTTP: the one description that its code, its page and openapi.json share.

`GET /health/live`, `/health/ready` and `/metrics` are for machines and need no token; everything else does, unless the
service runs without tokens on loopback. Errors are JSON: {"detail": what is wrong, "request_id": …}.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from orrery.errors import nearest

MAX_BODY = 16 * 1024
MAX_QUESTION = 2_000
MAX_TOP_K = 50
# What a question may be narrowed by. Groups are not among these: they follow from the token alone.
FILTERS = ("document", "source", "uri")
MAX_FILTER_VALUES = 20

FilterValue = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Filter = Annotated[list[FilterValue], Field(min_length=1, max_length=MAX_FILTER_VALUES)]


class _Asked(BaseModel):
    """Base of what is received: nothing that we do not know, and no guessing of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Query(_Asked):
    """`POST /query`. With `stream`, or `Accept: text/event-stream`, the answer comes as server-sent events.

    Events: `sources` {query_id, generation, sources}, then `token` {text} as the model writes, then `done` with the
    whole `Answer`, its citations checked: it replaces what the tokens said. `error` {detail, request_id} ends a stream
    instead.
    """

    question: str = Field(min_length=1, max_length=MAX_QUESTION)
    top_k: int | None = Field(None, ge=1, le=MAX_TOP_K, description="Passages at most; none: the project's `top_k`.")
    filters: dict[str, Filter] | None = Field(
        None, description=f"Only passages whose field has one of these values; fields: {', '.join(FILTERS)}."
    )
    stream: bool = False

    @field_validator("question")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the question is empty")
        return value

    @field_validator("filters")
    @classmethod
    def _known(cls, value: dict[str, Filter] | None) -> dict[str, Filter] | None:
        unknown = sorted(set(value or ()) - set(FILTERS))
        if unknown:
            raise ValueError(f"no filter {unknown[0][:40]!r}; {nearest(unknown[0][:40], FILTERS)}")
        return value


class Source(BaseModel):
    """One passage that was found. The citation [n] in an answer means the n-th of `sources`."""

    id: str
    title: str
    uri: str
    heading: str = Field(description="Headings above the passage, such as `Alerts › Deadlines`; may be empty.")
    page: int | None = Field(None, description="Page of a PDF.")
    score: float = Field(description="Comparable within one answer only.")
    excerpt: str
    highlights: list[tuple[int, int]] = Field(
        description="Spans [start, end) of `excerpt` to mark, in Unicode characters (code points), in order, apart."
    )


class Answer(BaseModel):
    """What `POST /query` gives."""

    query_id: str = Field(description="What `POST /feedback` calls this question.")
    answer: str = Field(description="Plain text with citations such as [1]; never HTML.")
    sources: list[Source]
    abstained: bool = Field(description="The passages do not answer the question well enough; no model was asked.")
    latency_ms: float
    generation: str = Field(description="The generation that answered, whole: an answer never mixes two.")
    model: str = Field(description="Who wrote `answer`.")
    degraded: str | None = Field(
        None, description="Why there is no answer of the language model, when there should be."
    )


class Passage(BaseModel):
    """`GET /sources/{id}`: a whole passage. One that the token's groups may not read is not found."""

    id: str
    document: str
    source: str
    title: str
    uri: str
    heading: str
    page: int | None
    text: str
    generation: str


class Feedback(_Asked):
    """`POST /feedback`: a thumb for an answer of the last hour.

    Only this writes the question's text down, as a candidate for labelling; who presses no thumb leaves none.
    """

    query_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    thumb: Literal["up", "down"]
    comment: str = Field("", max_length=500)


class Noted(BaseModel):
    """What `POST /feedback` gives."""

    noted: bool = True


class Info(BaseModel):
    """`GET /info`: what this service answers from."""

    project: str
    description: str
    owner: str
    generation: str | None
    version: str | None = Field(description="The live version, as the ledger counts them.")
    proven: bool | None = Field(description="Whether labelled questions vouch for the generation.")
    model: str
    embedder: str | None
    counts: dict[str, int]
    filters: list[str]
    top_k: int
    name: str = Field(description="Whose token this is.")
    groups: list[str]
    logs_questions: bool
    feedback: str = Field(description="What a thumb stores, to be told before it is pressed.")


class Health(BaseModel):
    """`GET /health/live` and `/health/ready`."""

    status: Literal["ok", "degraded", "starting", "stopping"]
    generation: str | None = None
    version: str | None = None
    problems: list[str] = Field(default_factory=list)
