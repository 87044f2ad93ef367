"""`rollback`: a generation that was live before is looked at like a new one, and is live again."""

from __future__ import annotations

from orrery.contract import Result
from orrery.rag.contract import PublishParams
from orrery.rag.promote import publish
from orrery.step import Work


def run(work: Work, params: PublishParams) -> Result:
    """Make an earlier generation the live one. Raises `UserError` when it is damaged or gone."""
    given = work.inputs("evaluation")
    evaluation = given[0] if given else None
    proven = evaluation is not None and bool(evaluation.facts.get("proven"))
    return publish(work, params, work.input("model"), evaluation, proven=proven, how="live again")
