"""curves.png: what the task measures, and the gradient norm before and after clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradfast.extras import require
from gradfast.files import atomic_write
from gradfast.train.results.history import STEPS, read_csv
from gradfast.train.tasks.task import Panel

CURVES = "curves.png"

# Of the Okabe-Ito palette, which most colour-blind readers tell apart, and a grey for guides.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
FIRST, SECOND = COLOURS[:2]
GUIDE = "#888888"
MOST_POINTS = 4000  # of a norm curve: more are not to be seen in a picture of this size


def draw_curves(
    folder: Path, summary: Sequence[Mapping[str, Any]], panels: Sequence[Panel], max_norm: float | None, title: str
) -> None:
    """Draw the run in `folder`.

    Args:
        summary: the rows of its summary.csv.
        panels: which of its columns to draw, before the gradient norm.
        max_norm: the clip limit, drawn as a line; None where nothing was clipped.
    """
    require("matplotlib", "train", "curves.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    *drawings, norm = figure.subplots(1, len(panels) + 1)
    epochs = [row["epoch"] for row in summary]
    mark = "o" if len(epochs) < 60 else None
    for axes, panel in zip(drawings, panels, strict=True):
        for (column, label), colour in zip(panel.lines, COLOURS):
            axes.plot(epochs, [row[column] for row in summary], label=label, color=colour, marker=mark, markersize=4)
        axes.set(title=panel.title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    draw_norms(norm, read_csv(folder / STEPS), max_norm)
    for axes in (*drawings, norm):
        axes.grid(alpha=0.25)
        axes.legend(loc="best")

    with atomic_write(folder / CURVES) as file:
        FigureCanvasAgg(figure).print_png(file)


def draw_norms(axes: Any, steps: Sequence[Mapping[str, float]], max_norm: float | None) -> None:
    """The norm of every step, before and after clipping, on a log axis; skipped steps as ticks at the bottom."""
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    sound = [row for row in steps if math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0][::every]
    numbers = [row["step"] for row in sound]
    before = [row["grad_norm"] for row in sound]
    after = [row["grad_norm"] * row["clip_coef"] for row in sound]
    axes.plot(numbers, before, label="before clipping", color=FIRST, linewidth=1)
    if max_norm is not None or after != before:
        axes.plot(numbers, after, label="after clipping", color=SECOND, linewidth=1)
    if max_norm is not None:
        axes.axhline(max_norm, color=GUIDE, linestyle=":", label=f"limit {max_norm:g}")
    skipped = [row["step"] for row in steps if not math.isfinite(row["grad_norm"])]
    if skipped:
        axes.plot(
            skipped, [0.01] * len(skipped), "|", color="black", label="skipped", transform=axes.get_xaxis_transform()
        )
    if sound:
        axes.set_yscale("log")
    axes.set(title="global gradient norm", xlabel="step")
