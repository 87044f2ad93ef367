"""The curves of an evaluation as PNG: what a person looks at before they trust a number.

Matplotlib's object interface, without pyplot: no global state, and half the import.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orrery.evaluation import metrics
from orrery.evaluation.metrics import Array

# Colours that stay apart for colour-blind readers (Okabe & Ito 2008), and line styles that do in print.
STYLES: dict[str, dict[str, Any]] = {
    "candidate": {"color": "#0072B2", "linewidth": 2.2, "linestyle": "-"},
    "champion": {"color": "#D55E00", "linewidth": 1.8, "linestyle": "--"},
    "baseline": {"color": "#7F7F7F", "linewidth": 1.5, "linestyle": ":"},
}
MAX_BARS = 15
MAX_CLASSES = 20
MAX_POINTS = 5_000


def draw(
    title: str, label: str, y: npt.NDArray[Any], predictions: dict[str, Array], report: dict[str, Any]
) -> dict[str, bytes]:
    """Return the PNGs of an evaluation by name. What is not defined on these rows is left out."""
    out: dict[str, bytes] = {}
    models = {n: predictions[n] for n in STYLES if n in predictions}
    if report["task"] == "binary" and 0 < y.sum() < len(y):
        out["ROC"] = _binary(_roc, title, y, models, report)
        out["Precision-recall"] = _binary(_precision_recall, title, y, models, report)
        out["Calibration"] = _binary(_calibration, title, y, models, report)
    elif report["task"] == "regression":
        out["Predicted-actual"] = _predicted_actual(title, label, y, models)
    elif report["task"] == "multiclass" and len(report["rows"]["classes"]) <= MAX_CLASSES:
        out["Confusion"] = _confusion(title, y, models["candidate"], report["rows"]["classes"])
    if report["slices"]:
        out["Slices"] = _slices(title, report)
    return out


def page(title: str, drawn: dict[str, bytes]) -> bytes:
    """Return one HTML page that holds all the PNGs, so that it can be shown where nothing else may be loaded."""
    encoded = {html.escape(name): base64.b64encode(data).decode() for name, data in drawn.items()}
    images = "".join(
        f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>' for name, data in encoded.items()
    )
    style = "body{font:15px system-ui;margin:1rem} figure{display:inline-block;margin:.5rem} img{max-width:100%}"
    title = html.escape(title)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return f"{head}<h1>{title}</h1>{images}</html>".encode()


def _binary(
    plot: Callable[[Axes, Array, dict[str, Array], dict[str, Any]], None],
    title: str,
    y: Array,
    models: dict[str, Array],
    report: dict[str, Any],
) -> bytes:
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    plot(axes, y, models, report)
    axes.set_title(f"{title}\n{len(y):,} holdout rows", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def _roc(axes: Axes, y: Array, models: dict[str, Array], report: dict[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color="#CCCCCC", linewidth=1)
    for name, p in models.items():
        axes.plot(*metrics.roc(y, p), label=f"{name}, AUC {report['metrics'][name]['auc']:.3f}", **STYLES[name])
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))


def _precision_recall(axes: Axes, y: Array, models: dict[str, Array], report: dict[str, Any]) -> None:
    share = float(y.mean())
    axes.axhline(share, color="#CCCCCC", linewidth=1, label=f"by chance, {share:.3f}")
    for name, p in models.items():
        precision, recall = metrics.precision_recall(y, p)
        shown = recall >= min(0.01, recall.max())  # the first few rows jump between 0 and 1 and say nothing
        area = report["metrics"][name]["average_precision"]
        axes.plot(recall[shown], precision[shown], label=f"{name}, average precision {area:.3f}", **STYLES[name])
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))


def _calibration(axes: Axes, y: Array, models: dict[str, Array], report: dict[str, Any]) -> None:
    top = 0.0
    for name, p in models.items():
        _, predicted, observed = metrics.calibration(y, p)
        top = max(top, float(predicted.max()), float(observed.max()))
        error = report["metrics"][name]["calibration_error"]
        axes.plot(predicted, observed, marker="o", markersize=3.5, label=f"{name}, error {error:.3f}", **STYLES[name])
    top = min(1.0, top * 1.05 + 0.01)
    axes.plot([0, top], [0, top], color="#CCCCCC", linewidth=1, zorder=0)
    axes.set(xlabel="predicted probability", ylabel="observed share", xlim=(0, top), ylim=(0, top))


def _predicted_actual(title: str, label: str, y: Array, models: dict[str, Array]) -> bytes:
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    step = max(1, len(y) // MAX_POINTS)
    axes.scatter(y[::step], models["candidate"][::step], s=4, alpha=0.25, color="#9CC4E4", linewidths=0)
    for name, p in models.items():
        _, predicted, observed = metrics.calibration(y, p)
        axes.plot(observed, predicted, marker="o", markersize=3.5, label=f"{name}, means of equal bins", **STYLES[name])
    low, high = float(min(y.min(), models["candidate"].min())), float(max(y.max(), models["candidate"].max()))
    axes.plot([low, high], [low, high], color="#CCCCCC", linewidth=1, zorder=0)
    axes.set(xlabel=f"actual {label}", ylabel=f"predicted {label}")
    axes.set_title(f"{title}\n{len(y):,} holdout rows", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def _confusion(title: str, y: npt.NDArray[Any], p: Array, classes: list[str]) -> bytes:
    size = len(classes)
    counts = np.bincount(y * size + p.argmax(axis=1), minlength=size * size).reshape(size, size)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(2.5 + 0.5 * size, 2.2 + 0.45 * size), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(size, size):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(size), classes, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(size), classes, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{title}\n{len(y):,} holdout rows, shares of the true class", fontsize=10)
    return _png(figure)


def _slices(title: str, report: dict[str, Any]) -> bytes:
    """One panel per feature: the primary metric of its largest slices, and the line of all rows."""
    primary, panels = report["primary"], {}
    for name, entries in report["slices"].items():
        defined = [e for e in entries if e[primary] is not None]
        panels[name] = sorted(defined, key=lambda e: -e["rows"])[:MAX_BARS]
    panels = {n: sorted(e, key=lambda e: -e[primary]) for n, e in panels.items() if e}
    heights = [0.9 + 0.24 * len(e) for e in panels.values()] or [1.0]
    figure = Figure(figsize=(7, sum(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(max(1, len(panels)), 1, height_ratios=heights)
    for place, (name, entries) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[place])
        _dots(axes, entries, primary, report["metrics"])
        axes.set_title(f"by {name} (rows)", fontsize=9, loc="left")
    if figure.axes:
        handles, texts = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, texts, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=10)
    return _png(figure)


def _dots(axes: Axes, entries: list[dict[str, Any]], primary: str, models: dict[str, dict[str, Any]]) -> None:
    overall = models["candidate"][primary]
    values = [e[primary] for e in entries]
    axes.hlines(range(len(entries)), overall, values, color="#9CC4E4", linewidth=2)
    axes.scatter(values, range(len(entries)), color=STYLES["candidate"]["color"], s=28, zorder=3)
    for name, style in STYLES.items():
        if name in models and models[name][primary] is not None:
            axes.axvline(models[name][primary], label=f"{name}, all rows, {models[name][primary]:.3f}", **style)
    axes.set_yticks(range(len(entries)), [f"{e['value']}  ({e['rows']:,})" for e in entries], fontsize=8)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.set_xlabel(f"{primary} of the candidate", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.25)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
