"""The handbook project: its questions and documents fit each other, and what its pages name is there in the code."""

from __future__ import annotations

import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest

from orrery import platform, uri
from orrery.commands import app
from orrery.contract import VERBS
from orrery.faults import KINDS
from orrery.rag import questions, reading
from orrery.rag.chunk import Cutter
from orrery.rag.embedding.tokens import Tokens
from orrery.rag.questions import Question, normal
from orrery.rag.reading import Bounds, Reading, Source
from orrery.rag.records import Chunk, Document
from orrery.rag.spec import KnowledgeBaseSpec
from orrery.spec import ModelSpec, load_knowledge

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "include" / "projects" / "handbook"
# Pages that no question asks for: there for people who read on.
BACKGROUND: frozenset[str] = frozenset()
ENGINE = (ROOT / "include" / "orrery", ROOT / "docker", ROOT / "include" / "platform.yaml", ROOT / "Makefile")


@pytest.fixture(scope="module")
def spec() -> KnowledgeBaseSpec:
    return load_knowledge(FOLDER)


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return questions.read(FOLDER / "questions.jsonl")


@pytest.fixture(scope="module")
def pages(spec: KnowledgeBaseSpec) -> dict[Path, Reading]:
    """Every document as `collect` reads it, by its file."""
    found = {}
    for source in spec.sources.values():
        for file in sorted(p for p in (FOLDER / str(source.uri)).rglob("*") if p.is_file()):
            data = file.read_bytes()
            found[file] = reading.read(Source(data, reading.kinds.of_file(file.name, data)), Bounds())
    return found


@pytest.fixture(scope="module")
def passages(
    spec: KnowledgeBaseSpec, pages: dict[Path, Reading], tmp_path_factory: pytest.TempPathFactory
) -> list[Chunk]:
    """Every document as `chunk` cuts it."""
    cutter = Cutter(Tokens.of(spec.embedder, tmp_path_factory.mktemp("model"), FOLDER), spec.chunk)
    groups = {FOLDER / str(source.uri): (name, source.groups) for name, source in spec.sources.items()}
    found: list[Chunk] = []
    for file, page in pages.items():
        source, mine = groups[file.parent]
        data = file.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        name = file.relative_to(FOLDER).as_posix()
        document = Document(
            hashlib.sha256(name.encode()).hexdigest()[:32], source, name, page.title, "text/plain", mine, digest,
            len(data), page.sections,
        )  # fmt: skip
        found += cutter.cut(document)
    return found


def text_of(page: Reading) -> str:
    """Return all that a reader sees of a page, headings and tables included."""
    return "\n".join(" ".join((*section.heading, section.text)) for section in page.sections)


def test_the_spec_names_folders_of_the_project_and_two_groups(spec: KnowledgeBaseSpec) -> None:
    assert all((FOLDER / str(source.uri)).is_dir() for source in spec.sources.values())
    assert {group for source in spec.sources.values() for group in source.groups} == {"everyone", "oncall"}
    assert spec.questions == "questions.jsonl"
    for name in (spec.llm, spec.judge):
        assert name is None or name in platform.load(ROOT / "include" / "platform.yaml").llms


def test_every_page_is_read_whole_and_the_formats_are_all_there(pages: dict[Path, Reading]) -> None:
    assert not {file.name: page.notes for file, page in pages.items() if page.notes}
    kinds = Counter(file.suffix for file in pages)
    assert kinds[".md"] >= 25
    assert kinds[".html"] >= 3
    assert kinds[".pdf"] == 1
    assert len({file.name for file in pages}) == len(pages), "a question names a page by its file name alone"


def test_the_passages_are_as_many_and_as_long_as_the_figures_rest_on(passages: list[Chunk]) -> None:
    assert 300 <= len(passages) <= 600
    assert max(passage.tokens for passage in passages) <= 200


def test_there_are_enough_questions_of_both_kinds_each_asked_once(asked: list[Question]) -> None:
    answerable = sum(question.answerable for question in asked)
    assert answerable >= 120
    assert len(asked) - answerable >= 40
    twice = [text for text, count in Counter(normal(q.question) for q in asked).items() if count > 1]
    assert not twice


def test_every_passage_that_answers_a_question_is_found_by_who_asks_it(
    asked: list[Question], passages: list[Chunk]
) -> None:
    assert not questions.label(asked, passages).lost


def test_every_quote_stands_in_its_page_and_is_neither_a_word_nor_a_chapter(
    asked: list[Question], pages: dict[Path, Reading]
) -> None:
    by_name = {file.name: normal(text_of(page)) for file, page in pages.items()}
    every = [(q.id, p) for q in asked for p in q.passages]
    assert not [(id_, p.uri) for id_, p in every if p.uri not in by_name]
    assert not [(id_, p.quote) for id_, p in every if normal(p.quote) not in by_name[p.uri]]
    assert not [(id_, p.quote) for id_, p in every if not 4 <= len(p.quote.split()) <= 25]


def test_questions_of_the_oncall_folder_are_asked_as_its_readers_and_no_others(
    asked: list[Question], pages: dict[Path, Reading]
) -> None:
    folder = {file.name: file.parent.name for file in pages}
    for question in asked:
        oncall = any(folder[passage.uri] == "oncall" for passage in question.passages)
        assert question.groups == (("oncall",) if oncall else None), question.id


def test_every_page_is_asked_for_or_background(asked: list[Question], pages: dict[Path, Reading]) -> None:
    wanted = {passage.uri for question in asked for passage in question.passages}
    assert {file.name for file in pages} - wanted == BACKGROUND


# -- what is in the pages ------------------------------------------------------------------------------


def files() -> Iterator[Path]:
    """Yield what a person wrote of the project."""
    return (p for p in sorted(FOLDER.rglob("*")) if p.suffix in (".md", ".html", ".yaml", ".jsonl"))


@pytest.mark.parametrize("file", list(files()), ids=lambda file: file.name)
def test_no_page_holds_a_secret_a_person_or_a_place_of_some_machine(file: Path) -> None:
    text = file.read_text()
    assert not [link for link in re.findall(r"[\w+]+://[^\s`<>\"')]+", text) if uri.has_secret(link, references=True)]
    forbidden = {
        "a key": r"AKIA[0-9A-Z]{12}|-----BEGIN|\b[0-9a-f]{40,}\b|\bgh[ps]_\w{20}|xox[abp]-",
        "a password": r"password['\"]?\s*[:=]\s*['\"]?(?!…|\$)[A-Za-z0-9]{6,}",
        "a folder of some machine": r"(?<![\w.])/(home|root|Users|work|mnt)/",
        "a registry's host": r"pypi\.org|docker\.io|ghcr\.io|quay\.io|artifactory|nexus|\.internal\b|\.corp\b",
        "a telephone number": r"\+\d[\d /()-]{7,}\d",
        "an address": r"[\w.+-]+@(?!example\.)[\w-]+\.[a-z]{2,}",
        "a network": r"\b(?!127\.0\.0\.1|0\.0\.0\.0)\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b",
    }
    assert not {what: found for what, pattern in forbidden.items() if (found := re.search(pattern, text))}


def test_every_command_that_a_page_names_is_there(pages: dict[Path, Reading]) -> None:
    known = {(c.name or c.callback.__name__.rstrip("_")) for c in app.registered_commands if c.callback}
    named = {
        name
        for file in pages
        if file.suffix != ".pdf"
        for name in re.findall(
            r"(?:^|`|<code>|exec deploy/airflow-scheduler -- )orrery ([a-z]+)\b", file.read_text(), re.M
        )
    }
    assert named >= {"ledger", "rollback", "reproduce", "cost", "check", "run", "faults", "housekeeping", "serve"}
    assert named <= known


def test_every_variable_that_a_page_names_is_read_somewhere(pages: dict[Path, Reading]) -> None:
    named = {v for page in pages.values() for v in re.findall(r"\bORRERY_[A-Z_]*[A-Z]\b", text_of(page))}
    sources = [p for root in ENGINE for p in ([root] if root.is_file() else sorted(root.rglob("*"))) if p.is_file()]
    known = "\n".join(p.read_text(errors="ignore") for p in sources if p.stat().st_size < 1_000_000)
    assert "ORRERY_STORE" in named
    assert not {v for v in named if not re.search(rf"\b{v}\b", known)} - {"ORRERY_SOURCE"}


def test_every_field_that_a_page_names_can_be_declared(pages: dict[Path, Reading]) -> None:
    known = {*paths(ModelSpec), *paths(KnowledgeBaseSpec), *paths(platform.Platform)}
    begins = "train|tune|split|monitor|alerts|retrain|features|label|kubernetes|retention|answers"
    named = {
        name
        for file in pages
        if file.suffix == ".md"
        for name in re.findall(rf"`((?:{begins})\.[a-z_.]+[a-z])\b", file.read_text())
        if not name.endswith((".py", ".yaml", ".md"))
    }
    assert {"train.spot.max_interruptions", "monitor.effect", "retention.logs", "answers.timeout"} <= named
    assert named - known == set()


def paths(model: type[pydantic.BaseModel], above: str = "") -> Iterator[str]:
    """Yield the fields of a model and of what lies in it, as `train.spot.deadline`."""
    for name, field in model.model_fields.items():
        yield f"{above}{name}"
        for inner in _models(field.annotation):
            yield from paths(inner, f"{above}{name}.")


def _models(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
        return
    for inner in get_args(annotation):
        yield from _models(inner)


def test_the_page_of_verbs_has_each_step_of_a_model() -> None:
    text = (FOLDER / "documents/guides/verbs.md").read_text()
    assert {verb for verb in VERBS if not re.search(rf"^## .*\b{verb}\b", text, re.M)} == set()


def test_the_page_of_faults_has_each_kind() -> None:
    text = (FOLDER / "documents/guides/rehearsing-faults.md").read_text()
    assert {kind for kind in KINDS if f"| `{kind}` |" not in text} == set()


def test_the_card_was_printed_from_its_source(pages: dict[Path, Reading]) -> None:
    """Words alone are compared: where lines and pages end is the printer's."""
    source = re.sub(r"(?s)<head>.*</head>|<[^>]+>", " ", (FOLDER / "on-call-card.html").read_text())
    printed = next(page for file, page in pages.items() if file.suffix == ".pdf")
    assert 3 <= len({section.page for section in printed.sections}) <= 5
    texts = (html.unescape(source), " ".join(section.text for section in printed.sections))
    written, shown = (Counter(re.findall(r"[a-z]+", normal(text))) for text in texts)
    assert written == shown
