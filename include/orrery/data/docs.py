"""Data Docs: Great Expectations' own account of a validation as static pages that need nothing from elsewhere.

Its stock pages load styles and scripts from six content networks, which a browser behind a company's
firewall does not reach and a strict content policy refuses. The blocks here are its own; the frame is ours.
"""

from __future__ import annotations

import copy
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orrery.step import Work

# To the page of the suite in Great Expectations' own site, which is not made: the checks are in the spec.
DEAD_LINK = re.compile(r'<a href="(?:\.\./)+expectations/[^"]*"\s*>(.*?)</a>', flags=re.DOTALL)
# Nothing of a page runs or loads, whatever values the data hold.
POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
TEMPLATES = Path(__file__).parent / "templates"


def publish(work: Work, sources: Sequence[tuple[str, Any, dict[str, Any]]]) -> str:
    """Render one page per source and an index; return the index's store path. A source: name, results, report."""
    folder = work.scratch / "data_docs"
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{work.config.project} {work.config.key}"
    for name, whole, report in sources:
        (folder / f"{name}.html").write_text(page(title, name, whole, report), encoding="utf-8")
    reports = {name: report for name, _, report in sources}
    (folder / "index.html").write_text(index(title, reports), encoding="utf-8")
    return f"{work.evidence_folder('data_docs', folder)}/index.html"


def page(title: str, source: str, whole: Any, report: dict[str, Any]) -> str:
    """Return the page of one source: our table of checks, then Great Expectations' blocks."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    document = ValidationResultsPageRenderer(run_info_at_end=True).render(escaped(whole))
    view = DefaultJinjaPageView(custom_views_directory=str(TEMPLATES))
    text = view.render(
        document, template="data_docs.j2", heading=f"{title}: {source}", overview=overview(report), policy=POLICY
    )
    return DEAD_LINK.sub(r"\1", str(text))


def escaped(whole: Any) -> Any:
    """Return a copy of the results whose values are safe in HTML: Great Expectations puts them into tables as they are.

    Where it does escape them, they show twice escaped; better so than a script out of the data.
    """
    safe = copy.deepcopy(whole)
    for result in safe.results:
        result.result = _escape(result.result)
    return safe


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _escape(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_escape(v) for v in value]
    return html.escape(value) if isinstance(value, str) else value


def index(title: str, reports: dict[str, dict[str, Any]]) -> str:
    """Return the first page: every source with its counts and checks."""
    parts = [
        f'<h2><a href="{html.escape(name)}.html">{html.escape(name)}</a></h2>{overview(report)}'
        for name, report in reports.items()
    ]
    style = (TEMPLATES / "data_docs.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{POLICY}'
        f"<title>{html.escape(title)}: checks</title>"
        f"<style>{style}</style></head>\n<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def overview(report: dict[str, Any]) -> str:
    """Return the counts and the table of checks of one source as HTML."""
    clean, aside = report["rows_clean"], report["rows_quarantined"]
    counts = f"<p>{report['rows_in']:,} rows = {clean:,} clean + {aside:,} quarantined</p>"
    head = "".join(f"<th>{h}</th>" for h in ("", "Column", "Check", "Allowed", "Found", "Severity"))
    rows = "".join(_row(check) for check in report["checks"])
    return f"{counts}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(check: dict[str, Any]) -> str:
    state = "pass" if check["passed"] else ("fail" if check["severity"] == "error" else "warn")
    cells = (check["column"] or "", check["check"], check["allowed"], check["found"], check["severity"])
    mark = f'<td class="{state}">{state}</td>'
    return f"<tr>{mark}{''.join(f'<td>{html.escape(str(c))}</td>' for c in cells)}</tr>"
