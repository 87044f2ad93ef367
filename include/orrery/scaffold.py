"""`orrery new`: the files of a new project, its checks drafted from data."""

from __future__ import annotations

import json
import keyword
import re
import subprocess
from pathlib import Path
from string import Template
from typing import Any

import yaml

from orrery import platform
from orrery.errors import RequestError, UserError, nearest
from orrery.local import interpreter
from orrery.spec import KINDS, NAME, PRIMARY
from orrery.store import trouble

TAKEN = ("rows", "derive", "view", "calendar", "pa", "pc")
# What ingest reads (`data.files`, which needs pyarrow), the longest first.
ENDINGS = (".parquet", ".csv.gz", ".csv", ".pq")
TEMPLATES = Path(__file__).resolve().parent / "templates"


def create(project: str, kind: str, data: dict[str, str], task: str, owner: str) -> list[Path]:
    """Write a new project's files and return their paths. Raises `RequestError`; an existing file is never touched."""
    if not re.fullmatch(NAME, project, flags=re.ASCII):
        raise RequestError(f"{project!r} is not a project name", hint="a letter, then small letters, digits and _")
    if kind not in KINDS:
        raise RequestError(f"unknown kind {kind!r}", hint=nearest(kind, KINDS))
    if task not in PRIMARY:
        raise RequestError(f"unknown task {task!r}", hint=nearest(task, PRIMARY))
    for name in data:
        # The source's name is a function's in features.py, beside the decorators and modules that it imports.
        if not re.fullmatch(NAME, name, flags=re.ASCII) or keyword.iskeyword(name) or name in TAKEN:
            raise RequestError(
                f"{name!r} is not a source name", hint="a letter, then small letters, digits and _; no word of Python"
            )
    # It goes into YAML, Markdown and a docstring of the Dag's file.
    if not re.fullmatch(r"[\w .,@/&()+-]{1,100}", owner):
        raise RequestError(f"{owner[:100]!r} is not an owner", hint="letters, digits, spaces and .,@/&()+- only")
    if kind != "model" and data:
        raise RequestError("--data drafts the checks of a model", hint=f"a {kind} has documents: leave --data out")
    files = _model(project, data, task, owner) if kind == "model" else _knowledge_base(project, owner)
    there = [path for path in files if path.exists()]
    if there:
        raise RequestError(f"{there[0]} exists already", hint="choose another name, or remove it yourself")
    for path, text in files.items():
        with trouble(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return list(files)


def _fill(template: str, **values: str) -> str:
    return Template((TEMPLATES / f"{template}.txt").read_text()).substitute(values)


def _knowledge_base(project: str, owner: str) -> dict[Path, str]:
    folder = platform.projects_folder() / project
    return {
        folder / "spec.yaml": _fill(
            "knowledge_base.yaml", project=project, owner=json.dumps(owner, ensure_ascii=False)
        ),
        folder / "README.md": _fill("knowledge_README.md", project=project, owner=owner),
        folder / "documents" / "welcome.md": _fill("document.md", project=project),
        platform.home() / "dags" / f"{project}.py": _fill("knowledge_dag.py", project=project, owner=owner),
    }


def _model(project: str, data: dict[str, str], task: str, owner: str) -> dict[Path, str]:
    folder = platform.projects_folder() / project
    sources = data or {"records": ""}
    first = next(iter(sources))
    drafted: dict[str, Any] = _draft(data) if data else {"checks": {"min_rows": 1}, "columns": {}}
    guess = _guess(drafted["checks"], drafted["columns"].get(first, {}))
    # Column names come from a data file and go into Python literals.
    literals = {name: json.dumps(text, ensure_ascii=False)[1:-1] for name, text in guess.items()}
    values = {"project": project, "owner": owner, "source": first, **literals}
    return {
        folder / "spec.yaml": _spec(sources, task, owner, guess["label"], drafted),
        folder / "features.py": _fill("features.py", **values),
        folder / "model.py": _fill("model.py", **values),
        folder / "README.md": _fill("README.md", project=project, owner=owner),
        platform.home() / "dags" / f"{project}.py": _fill("dag.py", project=project, owner=owner),
    }


def _spec(sources: dict[str, str], task: str, owner: str, label: str, drafted: dict[str, Any]) -> str:
    document = {
        "version": 1,
        "kind": "model",
        "owner": owner,
        "description": "",
        "task": task,
        "label": {"column": _name(label), "delay": "1d"},
        "sources": {
            n: {"uri": f"${{data}}/{n}/{{partition}}{_ending(uri)}", "partition": "month"} for n, uri in sources.items()
        },
        "checks": drafted["checks"],
        "train": {"window": 3, "compute": "cpu-small"},
        "retrain": {"on": ["quarterly"]},
    }
    head = "# The fields and what they mean: `orrery check --schema`."
    head += " Bounds were drafted from data: read them.\n" if drafted["columns"] else "\n"
    for source, columns in drafted.get("left_out", {}).items():
        # As JSON in ASCII: a column's name may hold a line break, and would go on as YAML.
        names = ", ".join(map(json.dumps, columns))
        head += f"# Left out of the checks and of `unique`, these columns of {source}: {names}.\n"
        head += "# A spec names columns of letters, digits, _ and . only: rename them in the data to check them.\n"
    return head + str(yaml.safe_dump(document, sort_keys=False, width=110, default_flow_style=None))


def _ending(uri: str) -> str:
    """Return how the files of a source end, in the sample's own spelling."""
    known = next((e for e in ENDINGS if uri.lower().endswith(e)), "")
    return uri[-len(known) :] if known else ".parquet"


def _name(column: str) -> str:
    return re.sub(r"[^a-z0-9_]", "_", column.lower()).lstrip("_0123456789")[:63] or "label"


def _guess(checks: dict[str, Any], columns: dict[str, str]) -> dict[str, str]:
    """Guess key, time and label from what the data look like; the file says that they are to be edited."""
    unique = checks.get("unique") or "id"
    times = [c for c, kind in columns.items() if kind == "timestamp"]
    labels = [c for c in columns if c.lower() in ("label", "target", "y")] or list(columns)[-1:]
    return {
        "key": unique if isinstance(unique, str) else unique[0],
        "time": times[0] if times else "event_time",
        "label": labels[0] if labels else "target",
    }


def _draft(data: dict[str, str]) -> dict[str, Any]:
    """Draft checks where pyarrow is: in the `ml` environment, as a process of its own."""
    argv = [str(interpreter("ml")), "-m", "orrery.data.draft", json.dumps(data)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode == UserError.exit_code:
        raise UserError(done.stderr.strip())
    if done.returncode or not done.stdout.strip():
        raise UserError(f"checks could not be drafted from {', '.join(data.values())}", hint=done.stderr.strip()[-400:])
    return dict(json.loads(done.stdout.splitlines()[-1]))
