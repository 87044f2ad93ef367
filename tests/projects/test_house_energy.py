"""A second project (LightGBM, regression, CSV by the day, no Feast) goes through the same contract.

The engine knows of neither project: no word of one stands in its code, and the second one adds its folder and a Dag.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from loop import DAYS, NEXT, PROJECT, ROOT, VENVS, WINDOW, Loop

from orrery.spec import Checks

pytestmark = pytest.mark.slow

PRODUCT = ("include", "dags", "plugins", "docker")
BOTH = (ROOT / "include" / "projects" / "flight_delay", ROOT / "tests" / "projects" / PROJECT)
# Columns whose names the engine has a meaning of its own for.
ORDINARY = {"origin"}


def tree() -> dict[str, str]:
    """Return the digest of every file of the product: what a second project must not need to touch."""
    files = [p for top in PRODUCT for p in (ROOT / top).rglob("*") if p.is_file()]
    kept = [p for p in files if "__pycache__" not in p.parts]
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def names_of_note(project: Path) -> set[str]:
    """Return what only this project knows: its own name, its label and the columns that it checks."""
    spec = yaml.safe_load((project / "spec.yaml").read_text())
    nested = [spec["checks"].get(source, {}) for source in spec["sources"]]
    columns = {name for checks in (spec["checks"], *nested) for name in checks}
    return {project.name, spec["label"]["column"], *columns} - {*Checks.model_fields, *spec["sources"], *ORDINARY}


def words(file: Path) -> set[str]:
    """Return every word of a module's code: names, and what its strings say; docstrings and comments are for people."""
    tree = ast.parse(file.read_text())
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documents = {
        id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, scopes) and isinstance(n.body[0], ast.Expr)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            found.update(re.findall(r"\w+", node.value))
        found.update(v for f in ("id", "attr", "arg", "name") if isinstance(v := getattr(node, f, None), str))
    return found


def test_the_engine_knows_no_project() -> None:
    """No branch, default or example in the code of a room or a plugin names a project, or a column of one."""
    noted = set().union(*map(names_of_note, BOTH))
    assert {"flight_delay", "house_energy", "late", "carrier", "scheduled_departure", "energy_kwh", "humid"} <= noted
    noted -= {"late", "distance"}  # scores are late, too: the name of an alert; vectors have a distance
    files = [*(ROOT / "include" / "orrery").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    assert len(files) > 80
    assert {str(f.relative_to(ROOT)): sorted(known) for f in files if (known := words(f) & noted)} == {}


def test_the_second_project_is_its_folder_and_one_dag_file() -> None:
    own = sorted(p.name for p in BOTH[1].iterdir() if p.name != "__pycache__")
    assert own == ["README.md", "features.py", "model.py", "spec.yaml"]
    imports, call = ast.parse((ROOT / "tests" / "projects" / "dags" / f"{PROJECT}.py").read_text()).body[1:]
    assert ast.unparse(imports) == "from orrery.orchestration import lifecycle"
    assert ast.unparse(call) == f"lifecycle('{PROJECT}', __doc__)"
    mentions = [p for p in map(ROOT.joinpath, tree()) if PROJECT.encode() in p.read_bytes()]
    assert mentions == [], "the product was adapted to it"


def scores(loop: Loop) -> dict[str, float]:
    manifest = loop.manifest("scores", NEXT)
    code = (
        "import sys, json, pyarrow.parquet as pq\n"
        "t = [pq.read_table(p) for p in sys.argv[1:]]\n"
        "print(json.dumps([[r['key'], r['prediction'], r['model_version']] for x in t for r in x.to_pylist()]))"
    )
    parts = [loop.store.full(manifest.uri(n)) for n in manifest.files if n.endswith(".parquet")]
    done = subprocess.run(
        [str(VENVS / "ml" / "bin" / "python"), "-c", code, *parts], capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)
    assert len({r[0] for r in rows}) == len(rows), "a row was scored twice"
    return {r[0]: r[1] for r in rows}


def test_the_whole_loop_without_touching_the_engine(loop: Loop) -> None:
    before = tree()
    loop.data()
    version = loop.release()
    loop.data((NEXT,))
    loop.run("score", NEXT)
    assert tree() == before
    first = scores(loop)
    assert len(first) == 24 * 120
    # Who promoted what, on which evidence.
    champion = loop.ledger.champion(PROJECT)
    assert champion is not None and champion.version == version
    promotions = list(loop.ledger.find(PROJECT, "promotion"))
    assert [e.phase for e in promotions] == ["intent", "done"]
    assert set(promotions[1].payload["evidence"]) == {"evaluation", "verdict"}
    # Scoring again gives the same rows once.
    assert "skipped, unchanged" in loop.run("score", NEXT)
    loop.run("score", NEXT, "--force")
    assert scores(loop) == first
    # The candidate is the champion now, so trained again it is not better by more than noise: kept, and green.
    assert "skipped" in loop.run("train", WINDOW)
    assert "evaluate" in loop.run("evaluate", WINDOW)
    assert "kept" in loop.run("gate", WINDOW)
    assert "kept the champion" in loop.run("register", WINDOW)


def test_feast_is_not_needed(loop: Loop) -> None:
    """The project declares no view; its materialize imports no Feast, and says so in no dependency."""
    text = (ROOT / "tests" / "projects" / PROJECT / "features.py").read_text()
    assert "@view" not in text and "feast" not in text


def test_a_version_is_retrained_to_the_same_weights(loop: Loop) -> None:
    assert "retrained to the same weights" in loop.orrery("reproduce", PROJECT, "1")


def test_an_attempt_is_repeated_from_its_config(loop: Loop) -> None:
    attempt = loop.manifest("features", DAYS[2]).attempt
    before = loop.manifest("features", DAYS[2])
    assert "done" in loop.orrery("reproduce", PROJECT, attempt)
    assert loop.manifest("features", DAYS[2]) == before


def test_a_landing_again_supersedes_and_lists_what_is_stale(loop: Loop) -> None:
    file = Path(loop.env["ORRERY_DATA"].removeprefix("file://")) / "readings" / f"{DAYS[1]}.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n")
    text = loop.run("ingest", DAYS[1])
    assert "supersedes an earlier version" in text
    for stale in (f"validate {DAYS[1]}", f"materialize {DAYS[1]}", f"train {WINDOW}"):
        assert stale in text
    # Training on the stale day is refused, and the message says what to run.
    message = loop.run("materialize", DAYS[1], code=64)
    assert f"run {PROJECT}.ingest for {DAYS[1]}" in message


def test_check_and_ledger_read_well(loop: Loop) -> None:
    assert "LightGBM" in loop.orrery("check", PROJECT) or "fit" in loop.orrery("check", PROJECT)
    text = loop.orrery("ledger", PROJECT)
    assert "– → 1" in text and "champion: version 1" in text
    assert "none" in loop.orrery("ledger", PROJECT, "--at", "2020-01-01")
    assert "no version was champion before version 1" in loop.orrery("rollback", PROJECT, code=64)
