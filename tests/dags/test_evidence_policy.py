"""What a page of evidence may do in the reader's browser: nothing; Evidently's report runs its own scripts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orrery.orchestration.evidence import evidence
from orrery.store import Store

REPORT = "demo/runs/scheduled__x/report-2013-04/2/evidence/evidently.html"


def policy(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, set[str]]:
    """Return the directives with which a page at `path` is served."""
    monkeypatch.setenv("ORRERY_STORE", f"file://{tmp_path}")
    Store(f"file://{tmp_path}").put(path, b"<script>1</script>")
    seen: Any = SimpleNamespace(project="demo")
    text = evidence(seen, path).headers["content-security-policy"]
    return {words[0]: set(words[1:]) for words in (part.split() for part in text.split(";"))}


def test_evidentlys_page_runs_its_scripts_in_an_origin_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = policy(REPORT, monkeypatch, tmp_path)
    assert found["sandbox"] == {"allow-scripts"}  # no same origin, no forms, no popups, no navigation of the top
    assert found["default-src"] == {"'none'"}
    assert found["script-src"] == {"'unsafe-inline'"}  # its own; nothing by address, no eval
    assert found.keys() == {"sandbox", "default-src", "script-src", "style-src", "img-src", "font-src"}
    assert found["img-src"] == found["font-src"] == {"data:"}


@pytest.mark.parametrize(
    "path",
    [
        "demo/runs/r/validate-2013-04/1/evidence/data_docs/index.html",
        "demo/runs/r/train-2013-01..2013-03/1/evidence/evidently.html",
        "demo/runs/r/report-2013-04/1/evidence/other/evidently.html",
        "demo/runs/r/report-2013-04/1/evidence/evidently.html.html",
        "demo/runs/r/train-2013-04/1/evidence/runs/r/report-2013-04/1/evidence/evidently.html",
    ],
)
def test_no_other_page_runs_any_script(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = policy(path, monkeypatch, tmp_path)
    assert found["sandbox"] == set()
    assert found["default-src"] == {"'none'"}
    assert "script-src" not in found
