"""What people look at before they trust a generation: plots as PNG, and one page with the questions that were missed.

Matplotlib's object interface, without pyplot: no global state, and half the import.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orrery.rag.gate import QUALITY, WORDS

# Colours that stay apart for colour-blind readers (Okabe & Ito 2008).
NEW, LIVE, GREY = "#0072B2", "#D55E00", "#7F7F7F"
DEPTH = 10
BINS = 20
CURVE = 5
MOST_ROWS = 200
SHARES = 10
WORST = 20
Judged = tuple[list[bool], list[float], float]  # answerable, probability out of fold, threshold


def draw(title: str, report: Mapping[str, Any], judged: Judged | None) -> dict[str, bytes]:
    """Return the PNGs of an evaluation by name; none without questions."""
    if not report["per_question"]:
        return {}
    out = {"Figures": _figures(title, report), "Ranks": _ranks(title, report)}
    if judged is not None:
        out["Abstention"] = _abstention(title, *judged)
    if (report.get("answers") or {}).get("answers"):
        out["Answers"] = _answers(title, report["answers"])
    return out


def _figures(title: str, report: Mapping[str, Any]) -> bytes:
    """nDCG, recall and MRR of the new generation against the live one, with the interval of each difference."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    live = (report["live"] or {}).get("metrics") or {}
    differences = (report["live"] or {}).get("differences") or {}
    width = 0.36 if live else 0.55
    for place, name in enumerate(QUALITY):
        own = report["metrics"][name]
        axes.bar(place - (width / 2 if live else 0), own, width, color=NEW, label="new" if place == 0 else None)
        axes.text(place - (width / 2 if live else 0), own, f"{own:.3f}", ha="center", va="bottom", fontsize=8)
        if name in live:
            axes.bar(place + width / 2, live[name], width, color=LIVE, label="live" if place == 0 else None)
            axes.text(place + width / 2, live[name], f"{live[name]:.3f}", ha="center", va="bottom", fontsize=8)
        if name in differences:  # as where the new one would lie
            low, high = (live[name] + differences[name][side] for side in ("low", "high"))
            axes.vlines(place - width / 2, low, high, color="black", linewidth=1.2)
    axes.set_xticks(range(len(QUALITY)), [WORDS[name] for name in QUALITY])
    axes.set(ylim=(0, 1.08))
    axes.set_title(f"{title}\n{report['questions']:,} answerable questions", fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    if live:
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    return _png(figure)


def _ranks(title: str, report: Mapping[str, Any]) -> bytes:
    """At which place the first passage stands that answers a question."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    asked = [q for q in report["per_question"] if q["answerable"]]
    series = [("new", "rank", NEW)]
    if (report["live"] or {}).get("differences"):
        series.append(("live", "live_rank", LIVE))
    width = 0.8 / len(series)
    for number, (name, key, colour) in enumerate(series):
        ranks = [q[key] for q in asked]
        counts = [*(ranks.count(place) for place in range(1, DEPTH + 1)), sum(r is None or r > DEPTH for r in ranks)]
        at = np.arange(DEPTH + 1) + (number - (len(series) - 1) / 2) * width
        axes.bar(at, counts, width, color=colour, label=name)
    axes.set_xticks(range(DEPTH + 1), [*map(str, range(1, DEPTH + 1)), "missed"])
    axes.set(xlabel="place of the first passage that answers", ylabel="questions")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def _abstention(title: str, answerable: list[bool], probability: list[float], threshold: float) -> bytes:
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    y, p = np.array(answerable, bool), np.array(probability)
    _histogram(left, y, p, threshold)
    _curve(right, y, p)
    figure.suptitle(f"{title}: out of fold, {int(y.sum())} answerable and {int((~y).sum())} unanswerable", fontsize=10)
    return _png(figure)


def _histogram(axes: Axes, y: np.ndarray[Any, Any], p: np.ndarray[Any, Any], threshold: float) -> None:
    edges = np.linspace(0, 1, BINS + 1)
    axes.hist(p[y], edges, color=NEW, alpha=0.65, label="answerable")
    axes.hist(p[~y], edges, color=LIVE, alpha=0.65, label="unanswerable")
    axes.axvline(threshold, color="black", linewidth=1.2, linestyle="--", label=f"abstain below {threshold:.2f}")
    axes.set(xlabel="probability of an answer", ylabel="questions", xlim=(0, 1))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.grid(alpha=0.25)


def _curve(axes: Axes, y: np.ndarray[Any, Any], p: np.ndarray[Any, Any]) -> None:
    """What is predicted against what is so, in groups of equal size."""
    order = np.array_split(np.argsort(p), min(CURVE, len(p)))
    axes.plot([0, 1], [0, 1], color="#CCCCCC", linewidth=1)
    axes.plot([p[i].mean() for i in order], [y[i].mean() for i in order], color=NEW, marker="o", markersize=4)
    axes.set(xlabel="predicted probability", ylabel="share answerable", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.25)


def _answers(title: str, told: Mapping[str, Any]) -> bytes:
    """How many answers rest on their passages how well: shares of sentences, and of citations."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    shares = [[a[key] for a in told["each"] if a[key] is not None] for key in ("supported", "precision")]
    # A bin of its own for what is wholly supported, which most are.
    edges = [*np.linspace(0, 1, SHARES + 1), 1 + 1 / SHARES]
    labels = ["sentences that are supported", "citations that hold"]
    axes.hist(shares, edges, color=[NEW, LIVE], label=labels)
    at = [*np.linspace(0, 0.8, 5), 1 + 0.5 / SHARES]
    axes.set_xticks(at, ["0 %", "20 %", "40 %", "60 %", "80 %", "all"])
    axes.set(xlabel="share of an answer", ylabel="answers", xlim=(0, 1 + 1 / SHARES))
    axes.set_title(f"{title}\n{told['answers']:.0f} answers, {by(told)}", fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return _png(figure)


def by(told: Mapping[str, Any]) -> str:
    """Return who wrote the answers."""
    return "the passages' own sentences" if told["model"] is None else f"by {told['model']}"


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


# -- the page ------------------------------------------------------------------------------------------

STYLE = (
    "body{font:15px/1.45 system-ui;margin:1rem auto;max-width:70rem;padding:0 1rem;color:#1a1a1a;background:#fff}"
    "figure{display:inline-block;margin:.5rem}img{max-width:100%}table{border-collapse:collapse;width:100%}"
    "td,th{border-bottom:1px solid #ddd;padding:.3rem .5rem;text-align:left;vertical-align:top}"
    "mark{background:#ffe2d6;color:inherit}.bad{color:#a32400;font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums}"
)


def page(title: str, report: Mapping[str, Any], metrics: Mapping[str, float], drawn: Mapping[str, bytes]) -> bytes:
    """Return one HTML page with all of it: plots, figures, what differs, and the questions that were missed."""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><h1>{html.escape(title)}</h1>',
        _reconciled(report["reconciliation"]),
    ]
    if not report["per_question"]:
        parts.append("<p>No questions were asked: what was found is unproven.</p>")
    else:
        parts += [_numbers(report, metrics), *_images(drawn), _lost(report["lost"]), _missed(report)]
        parts.append(_unsupported(report))
    return "\n".join([*parts, "</html>"]).encode()


def _reconciled(told: Mapping[str, Any]) -> str:
    if told["sound"]:
        return f"<p>Index and sources agree: {told['expected']:,} chunks.</p>"
    counts = {n: told[k] for n, k in _DIFFER if told[k]}
    words = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    shown = ", ".join(html.escape(i) for i in [*told["missing"], *told["extra"]])
    return f'<p class="bad">Index and sources differ: {words} of {told["expected"]:,} chunks. {shown}</p>'


_DIFFER = (
    ("missing", "missing_count"),
    ("extra", "extra_count"),
    ("twice there", "duplicate"),
    ("without a document", "orphan"),
)


def _numbers(report: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    live = (report["live"] or {}).get("metrics") or {}
    differences = (report["live"] or {}).get("differences") or {}
    rows = []
    for name in QUALITY:
        other = f"{live[name]:.4f}" if name in live else "–"
        between = "–"
        if name in differences:
            d = differences[name]
            between = f"{d['delta']:+.4f} ({d['low']:+.4f} … {d['high']:+.4f})"
        rows.append((WORDS[name], f"{report['metrics'][name]:.4f}", other, between))
    a = report["abstention"]
    if a is not None:
        for words, key in (("unanswerable, abstained", "abstained"), ("answerable, abstained wrongly", "wrongly")):
            rows.append((words, f"{a[key]:.1%}", "–", f"95 % interval {a[f'{key}_low']:.1%} … {a[f'{key}_high']:.1%}"))
    said = report.get("answers") or {}
    for words, key in (("sentences supported", "sentence_support"), ("citations that hold", "citation_precision")):
        if said.get(key) is not None:
            rows.append((f"answers, {words}", f"{said[key]:.1%}", "–", f"{said['answers']:.0f} answers, {by(said)}"))
    rows += [(f"retrieval, {k[:3]}", f"{metrics[k]:.1f} ms", "–", "–") for k in ("p50_ms", "p99_ms") if k in metrics]
    return _table(("", "this generation", "live", "difference, 95 % interval"), rows)


def _images(drawn: Mapping[str, bytes]) -> list[str]:
    held = {html.escape(name): base64.b64encode(data).decode() for name, data in drawn.items()}
    return [f'<figure><img alt="{n}" src="data:image/png;base64,{data}"></figure>' for n, data in held.items()]


def _lost(lost: Sequence[Mapping[str, str]]) -> str:
    if not lost:
        return ""
    rows = [(one["id"], one["why"]) for one in lost[:MOST_ROWS]]
    return "<h2>Questions that have lost their passage</h2>" + _table(("question", "why"), rows)


def _missed(report: Mapping[str, Any]) -> str:
    """The questions that are worth a look: missed or far down, worse than live, or judged wrongly."""
    rows = []
    for q in report["per_question"]:
        rank, live = q["rank"], q["live_rank"]
        notes = []
        if q["answerable"] and rank is None:
            notes.append("missed")
        if q["answerable"] and live is not None and (rank is None or rank > live):
            notes.append(f"live has it at {live}")
        if q.get("abstained") is True and q["answerable"]:
            notes.append("abstained")
        if q.get("abstained") is False and not q["answerable"]:
            notes.append("answered, though unanswerable")
        if notes:
            shown = f"{q['probability']:.2f}" if "probability" in q else "–"
            rows.append((q["id"], q["question"], str(rank or "–"), shown, ", ".join(notes), ", ".join(q["found"][:3])))
    if not rows:
        return "<p>No question was missed or judged wrongly.</p>"
    head = ("id", "question", "rank", "probability", "what", "found first")
    return f"<h2>Questions to look at ({len(rows)})</h2>" + _table(head, rows[:MOST_ROWS])


def _unsupported(report: Mapping[str, Any]) -> str:
    """The answers that rest worst on what they cite, with the sentences that do not."""
    told = report.get("answers")
    if told is None:
        return ""
    asked = {q["id"]: q["question"] for q in report["per_question"]}
    counted = f"{told['answers']:.0f} answers, {by(told)}"
    worst = sorted((a for a in told["each"] if a["unsupported"]), key=lambda a: (a["supported"], a["id"]))
    title = f"<h2>Answers, and what they rest on ({html.escape(counted)})</h2>"
    trouble = f'<p class="bad">{html.escape(told["trouble"])}</p>' if told["trouble"] else ""
    if not worst:
        return f"{title}{trouble}<p>Each sentence that was looked at is supported by what it cites.</p>"
    rows = []
    for one in worst[:WORST]:
        cells = (one["id"], asked[one["id"]], f"{one['supported']:.0%}", one["answer"])
        marked = "<br>".join(_marked(sentence) for sentence in one["unsupported"])
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + f"<td>{marked}</td>")
    head = ("id", "question", "supported", "answer", "sentences that are not")
    top = "".join(f"<th>{text}</th>" for text in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"{title}{trouble}<p>{len(worst)} have a sentence that is not.</p><table><tr>{top}</tr>{body}</table>"


def _marked(sentence: Mapping[str, Any]) -> str:
    missing = f" (not there: {', '.join(sentence['missing'])})" if sentence["missing"] else ""
    return f"<mark>{html.escape(sentence['text'])}</mark>{html.escape(missing)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"
