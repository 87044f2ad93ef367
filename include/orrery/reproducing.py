"""Doing it again: a failed attempt from its recorded config, a registered version from its manifests."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from pydantic import ValidationError

from orrery import bundle, fingerprint, platform
from orrery.catalogue import CATALOGUE, verb_of
from orrery.contract import Result, StepConfig
from orrery.errors import RequestError, UserError, nearest
from orrery.local import LocalProcess
from orrery.planner import BasePlanner, Plan
from orrery.runner import prepare, raise_for, read_result
from orrery.store import Manifest


def _again(planner: BasePlanner, recorded: StepConfig, say: Callable[[str], None]) -> Result:
    """Run a recorded config in a folder and at an address of its own: what is committed stays as it is."""
    for line in differences(recorded):
        say(line)
    mark = f"reproduce-{secrets.token_hex(4)}"
    address = fingerprint.digest({**recorded.fingerprint, "again": mark})[:32] if recorded.address else None
    config = recorded.model_copy(
        update={
            "run": mark,
            "attempt": 1,
            "address": address,
            "folder": f"{recorded.project}/runs/{mark}/{recorded.task}/1",
            "store": planner.store.uri,
            # A repeat must not become the partition that counts.
            "publish": False,
        }
    )
    if not planner.store.exists(bundle.path_of(config.bundle)):
        raise UserError(f"the project's code of that time ({config.bundle[:12]}) is gone from {planner.store.uri}")
    verb = verb_of(config)
    plan = Plan(config, verb, planner._secrets(verb), outlive=planner.outlives(verb.name))
    prepare(plan, planner.store)
    result = read_result(planner.store, config, LocalProcess()(plan))
    raise_for(plan, result)
    return result


def differences(recorded: StepConfig) -> list[str]:
    """Return what is not as it was: the project's code travels with the attempt, the engine's and the pins do not."""
    verb, was = verb_of(recorded), recorded.fingerprint
    now = {
        "code": (fingerprint.code(verb.module), f"the code of {verb.name}"),
        "environment": (fingerprint.pins(platform.home(), verb.environment), f"environment {verb.environment}"),
    }
    return [
        f"{name} has changed since ({was[part][:12]} then, {value[:12]} now): the outcome may differ"
        for part, (value, name) in now.items()
        if part in was and was[part] != value
    ]


def attempt(planner: BasePlanner, folder: str, say: Callable[[str], None]) -> Result:
    """Repeat the attempt whose config lies in `folder` of the store. Raises what the step raises.

    `say` is told what is not as it was.
    """
    config = _recorded(planner, f"{folder.strip('/').removesuffix('/config.json')}/config.json")
    if config.project != planner.project:
        raise RequestError(f"that attempt is of project {config.project!r}, not {planner.project!r}")
    if verb_of(config).effect:
        raise RequestError(f"{config.verb} changes the registry: run it again, do not reproduce it")
    return _again(planner, config, say)


def _recorded(planner: BasePlanner, path: str) -> StepConfig:
    try:
        config = StepConfig.model_validate_json(planner.store.read(path))
    except FileNotFoundError:
        raise RequestError(
            f"{planner.store.uri}/{path}: there is no such attempt",
            hint="orrery ledger PROJECT --all --json lists them",
        ) from None
    except ValidationError:
        raise RequestError(f"{planner.store.uri}/{path} is not the config of an attempt") from None
    if config.verb not in CATALOGUE[config.kind]:
        known = nearest(config.verb, CATALOGUE[config.kind])
        raise RequestError(f"that attempt is of a step that is no more: {config.verb}", hint=known)
    return config


def version(planner: BasePlanner, number: str, say: Callable[[str], None]) -> tuple[str, str]:
    """Retrain a registered version; return the weights digests recorded and found now (64 hex digits each)."""
    versions = planner.ledger.registered(planner.project)
    if number not in versions:
        raise RequestError(f"{planner.project} has no version {number!r}", hint=nearest(number, versions))
    manifest: Manifest | None = planner.store.manifest(versions[number])
    if manifest is None:
        raise UserError(f"the model of version {number} is gone from {planner.store.uri}")
    config = _recorded(planner, f"{manifest.attempt}/config.json")
    result = _again(planner, config, say)
    return str(manifest.facts["weights_digest"]), str(result.facts["weights_digest"])
