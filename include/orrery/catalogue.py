"""Every verb of every kind of project. Light."""

from __future__ import annotations

from collections.abc import Mapping

from orrery.contract import VERBS, Kind, StepConfig, Verb
from orrery.errors import RequestError, nearest
from orrery.rag.contract import KNOWLEDGE_VERBS

CATALOGUE: Mapping[Kind, Mapping[str, Verb]] = {"model": VERBS, "knowledge_base": KNOWLEDGE_VERBS}
# Names that one kind or the other has, each once.
NAMES: tuple[str, ...] = tuple(dict.fromkeys(name for verbs in CATALOGUE.values() for name in verbs))


def verb(kind: Kind, name: str) -> Verb:
    """Return a verb of a kind of project. Raises `RequestError` that lists what there is."""
    found = CATALOGUE[kind].get(name)
    if found is None:
        raise RequestError(f"unknown step {name!r}", hint=nearest(name, CATALOGUE[kind]))
    return found


def verb_of(config: StepConfig) -> Verb:
    """Return the verb that a step's config asks for."""
    return verb(config.kind, config.verb)
