"""Which champion a rollback goes back to, checked against ledger and store; for the Dag and the command line."""

from __future__ import annotations

from typing import Any

from orrery.errors import RequestError, UserError, nearest
from orrery.ledger import Entry
from orrery.planner import BasePlanner, Request, safe_name


def rollback_request(
    planner: BasePlanner, to: str | None, *, run: str, attempt: int = 1, actor: str, reason: str
) -> Request:
    """Return the request that makes version `to` the champion again (the champion before, when None).

    Raises `UserError` when there is nothing to go back to, `RequestError` for a version that was never champion.
    """
    project = planner.project
    versions, now = planner.ledger.versions(project), planner.champion()
    if now is None:
        what = "champion" if planner.kind == "model" else "live generation"
        raise UserError(f"{project} has no {what}, so there is nothing to roll back")
    if to == now.version:
        raise RequestError(f"version {to} is the champion of {project} already", hint=f"orrery ledger {project}")
    target = to or _before(planner, now.version)
    others = [v for v in versions if v != now.version]
    if target not in others:
        raise RequestError(f"cannot roll back to version {target!r}", hint=nearest(str(target), others))
    model = planner.store.manifest(versions[target])
    if model is None:
        raise UserError(f"the model of version {target} ({versions[target]}) is gone from {planner.store.uri}")
    options: dict[str, Any] = {"version": target, "model": versions[target], "previous": now.version}
    return Request(
        project,
        "rollback",
        planner.keys_of(model),
        run,
        "rollback",
        attempt=attempt,
        actor=actor,
        reason=reason,
        options=options,
        kind=planner.kind,
    )


def rolled_back(planner: BasePlanner, run: str) -> Entry | None:
    """Return the rollback that this run has done: tried again or cleared, it must not go one further back."""
    project = planner.project
    done = planner.ledger.get(project, "rollback", safe_name(run), "done")
    if done is not None:
        return done
    attempts = planner.ledger.find(project, "run", prefix=f"{project}/runs/{safe_name(run)}/")
    ended = [e for e in attempts if e.payload["verb"] == "rollback" and e.payload["status"] == "done"]
    return ended[-1] if ended else None


def _before(planner: BasePlanner, version: str) -> str:
    """Return the champion below the present one. Raises `UserError` when there is none."""
    stack = planner.ledger.champions(planner.project)
    if len(stack) < 2:
        model = planner.kind == "model"
        better = "train a better one" if model else "mend the sources, then reindex"
        raise UserError(
            f"no version was {'champion' if model else 'live'} before version {version}",
            hint=f"{better}, or name another one: orrery rollback {planner.project} --to VERSION",
        )
    return stack[-2]
