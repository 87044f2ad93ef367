"""What `orrery check` says of a knowledge base, without reading its documents. Light."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orrery import platform, uri, yamlfile
from orrery.errors import SpecError, nearest
from orrery.rag import questions
from orrery.rag.planning import inside
from orrery.rag.spec import PACKAGED, DocumentSource, KnowledgeBaseSpec


def describe(folder: Path, spec: KnowledgeBaseSpec) -> list[str]:
    """Check a spec against platform.yaml and the project folder; return what is worth telling. Raises `SpecError`."""
    file = folder / "spec.yaml"
    _, lines = yamlfile.read(file)
    where = platform.load()
    values = {"root": str(platform.home()), "data": where.data}
    said = []
    for name, source in spec.sources.items():
        at = f"{file}:{lines.get(('sources', name), 1)}: sources.{name}"
        for field in ("uri", "notion"):
            text = getattr(source, field)
            if text and inside(text) and not (folder / text).is_dir():
                raise SpecError(f"{at}.{field}: there is no folder {text!r} in {folder}", hint="such as documents")
            where_to = platform.substitute(text or "", values, f"{at}.{field}")
            if where_to.startswith(("/", "file://")) and not Path(where_to.removeprefix("file://")).is_dir():
                said.append(f"{name}: there is no folder {where_to} on this machine")
        said.append(f"{name}: {_origin(source)}, for {', '.join(source.groups)}")
        said += _plain_http(name, source)
    if spec.embedder.compute not in where.compute:
        at = f"{file}:{lines.get(('embedder', 'compute'), 1)}: embedder.compute"
        raise SpecError(
            f"{at}: {spec.embedder.compute!r} is not in platform.yaml; " + nearest(spec.embedder.compute, where.compute)
        )
    models = {("embedder", "model"): spec.embedder.model, ("retrieval", "reranker"): spec.retrieval.reranker}
    for key, model in models.items():
        if model and model != PACKAGED:
            said += _model(folder, f"{file}:{lines.get(key, 1)}", ".".join(key), model)
    for field in ("llm", "judge"):
        name = getattr(spec, field)
        if name is not None and name not in where.llms:
            at = f"{file}:{lines.get((field,), 1)}: {field}"
            raise SpecError(f"{at}: {name!r} is not among `llms` of platform.yaml", hint=nearest(name, where.llms))
    said.append(_questions(folder, spec))
    said.append(f"answers: {f'by {spec.llm}' if spec.llm else 'the best passages, no language model'}")
    return said


def _model(folder: Path, at: str, field: str, model: str) -> list[str]:
    """Return a remark about a model's folder that is another machine's. Raises `SpecError` for one of the project's."""
    if "://" in model and not model.startswith("file://"):
        return []  # a bucket's: read when it is used
    path = Path(model.removeprefix("file://")).expanduser()
    if (folder / path).is_dir():
        return []
    if not path.is_absolute():
        raise SpecError(
            f"{at}: {field}: there is no folder {model!r} in {folder}", hint="an absolute path, or a bucket's URI"
        )
    return [f"{field}: there is no folder {path} on this machine"]


def _plain_http(name: str, source: DocumentSource) -> list[str]:
    """Return a warning when pages are fetched without TLS: the network policy of steps lets only 443 out."""
    plain = [url for url in (*source.pages, source.sitemap or "") if url.lower().startswith("http://")]
    if not plain:
        return []
    first = uri.masked(plain[0]) if uri.has_secret(plain[0]) else plain[0]
    more = f" and {len(plain) - 1:,} more" if len(plain) > 1 else ""
    return [f"{name}: on Kubernetes steps reach port 443 alone, and {first}{more} has 80: name it by https://"]


def _origin(source: Any) -> str:
    if source.pages:
        return f"{len(source.pages)} web pages"
    return str(source.uri or source.sitemap or source.notion)


def _questions(folder: Path, spec: KnowledgeBaseSpec) -> str:
    if spec.questions is None:
        return "no labelled questions: a generation is only compared with its sources, and marked unproven"
    file = folder / spec.questions
    if not file.is_file():
        raise SpecError(f"{folder / 'spec.yaml'}: questions: there is no file {file}")
    asked = questions.read(file)
    yes = sum(question.answerable for question in asked)
    told = f"questions: {yes:,} answerable, {len(asked) - yes:,} not"
    if yes < questions.LEAST_ANSWERABLE or len(asked) - yes < questions.LEAST_UNANSWERABLE:
        told += (
            f"; when to abstain is learned from {questions.LEAST_ANSWERABLE} and {questions.LEAST_UNANSWERABLE}: until "
            "then only what no passage has a word of is not answered"
        )
    return told
