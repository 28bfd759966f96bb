"""curves.png: loss, accuracy, and the gradient norm before and after clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradfast.extras import require
from gradfast.files import atomic_write
from gradfast.train.history import STEPS, read_csv

CURVES = "curves.png"

# Blue and orange of the Okabe-Ito palette, which most colour-blind readers tell apart, and a grey for guides.
FIRST, SECOND, GUIDE = "#0072b2", "#d55e00", "#888888"
MOST_POINTS = 4000  # of a norm curve: more are not to be seen in a picture of this size


def draw_curves(folder: Path, summary: Sequence[Mapping[str, Any]], max_norm: float | None, title: str) -> None:
    """Draw the run in `folder`.

    Args:
        summary: the rows of its summary.csv.
        max_norm: the clip limit, drawn as a line; None where nothing was clipped.
    """
    require("matplotlib", "train", "curves.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, norm = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in summary]
    mark = "o" if len(epochs) < 60 else None

    for column, label, colour in (("train_loss", "training", FIRST), ("eval_loss", "held out", SECOND)):
        loss.plot(epochs, [row[column] for row in summary], label=label, color=colour, marker=mark, markersize=4)
    loss.set(title="loss", xlabel="epoch")
    for column, label, colour in (
        ("eval_acc1", "accuracy", FIRST),
        ("eval_balanced_acc", "balanced accuracy", SECOND),
    ):
        accuracy.plot(epochs, [row[column] for row in summary], label=label, color=colour, marker=mark, markersize=4)
    accuracy.set(title="accuracy on held-out images", xlabel="epoch")
    draw_norms(norm, read_csv(folder / STEPS), max_norm)
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, accuracy, norm):
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
