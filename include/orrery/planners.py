"""The planner of a project, whatever its kind is. Light."""

from __future__ import annotations

from orrery import platform
from orrery.ledger import Ledger
from orrery.plan import Planner
from orrery.planner import BasePlanner
from orrery.rag.planning import KnowledgePlanner
from orrery.spec import KnowledgeBaseSpec, load


def planner_of(project: str, *, ledger: Ledger | None = None) -> BasePlanner:
    """Return the planner of a project. Raises `SpecError` as `spec.load` does."""
    knowledge = isinstance(load(platform.project_folder(project)), KnowledgeBaseSpec)
    return KnowledgePlanner(project, ledger=ledger) if knowledge else Planner(project, ledger=ledger)
