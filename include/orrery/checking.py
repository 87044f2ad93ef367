"""`orrery check`: is a project sound? Spec, platform, code in its environment, and what changed in its features."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape

from orrery import platform, spec, yamlfile
from orrery.contract import VERBS, refuse_uneven
from orrery.errors import OrreryError, RequestError, SpecError, TryAgain, nearest
from orrery.local import LocalProcess, interpreter, venvs
from orrery.plan import Planner, Request
from orrery.runner import run
from orrery.spec import METRICS, Bound, Checks, Disparity, KnowledgeBaseSpec, ModelSpec, Spec


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of spec.yaml, for editors."""
    schema: dict[str, Any] = TypeAdapter(Spec).json_schema()
    parts = {model: model.model_json_schema(ref_template="#/$defs/{model}") for model in (Checks, Bound, Disparity)}
    for model, part in parts.items():
        schema["$defs"] |= part.pop("$defs", {}) | {model.__name__: part}
    fields = schema["$defs"]["ModelSpec"]["properties"]
    # What the short forms mean is code; an editor is told the keys that have a name, and what others may be.
    checks = {k: v for k, v in parts[Checks]["properties"].items() if k != "unique"}
    unique = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    column, named = {"$ref": "#/$defs/ColumnCheck"}, {**checks, "unique": unique}
    schema["$defs"]["SourceChecks"] = {"type": "object", "properties": named, "additionalProperties": column}
    either = {"anyOf": [column, {"$ref": "#/$defs/SourceChecks"}]}
    fields["checks"] |= {"properties": named, "additionalProperties": either}
    bounds = {metric: {"$ref": "#/$defs/Bound"} for metric in METRICS}
    fields["gate"] |= {
        "properties": bounds | {"disparity": {"$ref": "#/$defs/Disparity"}},
        "additionalProperties": False,
    }
    return schema


def report(project: str, console: Console) -> bool:
    """Print what is found about one project; return whether it is sound."""
    try:
        folder = platform.project_folder(project)
        declared = spec.load(folder)
        if isinstance(declared, KnowledgeBaseSpec):
            from orrery.rag.checking import describe

            lines = describe(folder, declared)
            console.print(f"[green]✓[/] {project}: knowledge base, {', '.join(declared.sources)}; {declared.schedule}")
            for line in lines:
                console.print(f"    {escape(line)}")
            return True
        sound = f"[green]✓[/] {project}: {declared.task}, {declared.train.window} {declared.grain}s on "
        sound += declared.train.compute
        doubts = _doubts(folder / "spec.yaml", declared)
        if image := elsewhere():
            _platform_has(folder / "spec.yaml", declared)
            console.print(sound)
            _warn(console, doubts)
            why = f"features.py and model.py were not imported: this is the image of {image}, that of ml imports them"
            console.print(f"    [yellow]{why}[/]")
            return True
        found = inspect(project, declared)
        changes = _changes(project)  # before anything is printed: a project is sound or it is not, on one line
        console.print(sound)
        for line in _describe(found):
            console.print(f"    {escape(line)}")
        _warn(console, [*doubts, *changes])
        return True
    except OrreryError as e:
        console.print(f"[red]✗[/] {escape(project)}")
        for line in str(e).splitlines():
            console.print(f"    {escape(line)}")
        return False


def _warn(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(f"    [yellow]{escape(line)}[/]")


def elsewhere() -> str:
    """Return the environment of the image that this runs in (`ORRERY_IMAGE`) when it is not that of projects' code."""
    image = os.environ.get("ORRERY_IMAGE", "")
    return image if image and not (venvs() / "ml" / "bin" / "python").exists() else ""


def _changes(project: str) -> list[str]:
    """Return how the features differ, or why that cannot be told: that is no fault of the project's."""
    try:
        return feature_changes(project)
    except OrreryError as e:
        if "config" in e.details and not isinstance(e, TryAgain):
            raise  # the step itself has failed: on real rows, the project's code does not do
        why = e.message
    except OSError as e:  # the store has lost a file that a manifest names, or does not let it be read
        why = f"{platform.load().store}: {e}"
    return [f"what has changed in the features cannot be told: {why}"]


def inspect(project: str, declared: ModelSpec) -> dict[str, Any]:
    """Import features.py and model.py in the `ml` environment; return what they declare, and Params as they will be.

    Raises `SpecError`.
    """
    folder = platform.project_folder(project)
    file = folder / "spec.yaml"
    lines = _platform_has(file, declared)
    argv = [str(interpreter("ml")), "-m", "orrery.inspection", str(folder), project, json.dumps(declared.train.params)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise SpecError(f"{folder}: its code could not be imported\n{done.stderr[-2000:]}") from None
    if "error" in answer:
        named = re.match(r"train\.params\.([^.:]+)", answer["error"])
        at = f"{file}:{lines.get(('train', 'params', named[1]), 1)}: " if named else ""
        raise SpecError(f"{at}{answer['error']}", hint=answer.get("hint", ""))
    return dict(answer)


def _platform_has(file: Path, declared: ModelSpec) -> yamlfile.Lines:
    """Check what a spec takes from platform.yaml; return the spec's line numbers. Raises `SpecError`."""
    _, lines = yamlfile.read(file)
    where = platform.load()
    if declared.train.compute not in where.compute:
        at = f"{file}:{lines.get(('train', 'compute'), 1)}: train.compute"
        raise SpecError(
            f"{at}: {declared.train.compute!r} is not in platform.yaml; "
            + nearest(declared.train.compute, where.compute)
        )
    try:
        refuse_uneven(declared.train.processes, where.compute[declared.train.compute].pods, declared.train.compute)
    except RequestError as e:
        raise SpecError(f"{file}:{lines.get(('train', 'processes'), 1)}: {e.message}", hint=e.hint) from None
    tried = (declared.tune.compute or declared.train.compute) if declared.tune else None
    if tried in where.compute and where.compute[tried].pods > 1:
        raise SpecError(
            f"{file}:{lines.get(('tune',), 1)}: tune.compute: {tried!r} has {where.compute[tried].pods} pods, "
            "and a trial runs in one",
            hint="tune.compute: a class without `pods`",
        )
    for name, source in declared.sources.items():
        at = f"{file}:{lines.get(('sources', name), 1)}: sources.{name}.uri"
        platform.substitute(source.uri or "", {"root": "", "data": ""}, at)
    return lines


def _doubts(file: Path, declared: ModelSpec) -> list[str]:
    """Return what would go wrong in pods. Raises `SpecError` where pods are what steps run in."""
    where, pods = platform.load(), platform.profile() == "kubernetes"
    doubts = []
    for compute in _training_classes(declared):
        if not (why := _without_cuda(where, compute)):
            continue
        if pods:
            _, lines = yamlfile.read(file)
            raise SpecError(f"{file}:{lines.get(('train',), 1)}: {why}")
        doubts.append(f"in a pod, {why}")
    if pods and where.store.startswith("file:"):
        # A cluster may mount it into each pod, which cannot be seen from here.
        doubts.append(
            f"store {where.store} is a folder, which pods see only where the cluster mounts it into each of them: "
            "s3://bucket/prefix is what all can reach (`store` in platform.yaml, or ORRERY_STORE)"
        )
    return doubts


def _training_classes(declared: ModelSpec) -> list[str]:
    """Return the compute classes that this project's trainings may run on."""
    train = declared.train
    wanted = [train.compute, train.spot.fallback, declared.tune.compute if declared.tune else None]
    return list(dict.fromkeys(name for name in wanted if name is not None))


def _without_cuda(where: platform.Platform, name: str) -> str:
    """Return why a training on this class would not find its GPU; "" when nothing speaks against it.

    An image that the class names itself is believed, but for the environment's own tag; a digest does not tell.
    """
    own = where.environments.get(VERBS["train"].environment)
    compute = where.compute.get(name)
    if compute is None or own is None or not compute.gpu or own.image.endswith("-gpu"):
        return ""
    if compute.image is not None and (compute.image != own.image or "@" in own.image):
        return ""
    built = "" if "@" in own.image else f" {own.image}-gpu,"
    return (
        f"compute class {name!r} has a GPU and the image {own.image}, whose torch is built for CPUs; `image` of the "
        f"class in platform.yaml:{built} one that has CUDA (make images FLAGS=--gpu)"
    )


def _describe(found: dict[str, Any]) -> list[str]:
    features, model = found["features"], found["model"]
    views = (
        ", ".join(f"{v['name']} (on {'+'.join(v['on'])}, ttl {v['ttl']})" for v in features["views"])
        or "none: no Feast"
    )
    params = ", ".join(f"{name} {p['value']}" for name, p in model["params"].items())
    return [f"rows {features['rows']}; views {views}", f"model.py: {model['kind']}; {params or 'no parameters'}"]


def feature_changes(project: str) -> list[str]:
    """Return how the feature list differs from the last committed one, on a hundredth of its rows."""
    planner = Planner(project)
    keys = planner.store.keys(project, "features")
    committed = planner.store.latest_manifest(project, "features", keys[-1]) if keys else None
    if committed is None:
        return []
    # A run of its own: two checks at a time must not take each other's lease, or read each other's result.
    name = f"check-{secrets.token_hex(4)}"
    request = Request(project, "materialize", (keys[-1],), run=name, task="materialize", sample=0.01, actor="check")
    result = run(planner, request, LocalProcess(on_line=lambda _: None))
    assert result.output is not None
    now = planner.store.manifest(result.output)
    assert now is not None
    old_schema: dict[str, str] = planner.store.read_json(committed.uri("schema.json"))
    new_schema: dict[str, str] = planner.store.read_json(now.uri("schema.json"))
    from orrery.features.diff import diff

    return [f"features since {keys[-1]} was materialized: {line}" for line in diff(old_schema, new_schema)]
