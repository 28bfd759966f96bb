"""Precision, recall and F1 of each class, from a confusion matrix."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradfast.monitor.page import new_figure, png


def class_scores(counts: Tensor, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """What is known of each class.

    precision = right / predicted as it, recall = right / being it, F1 = their harmonic mean = 2 right / (both sums).
    nan where there is nothing to divide by.

    Args:
        counts: [K, K] of (true class, predicted class).

    Returns:
        Class -> `images`, `predicted` (how often it was the answer), `precision`, `recall`, `f1`.
    """
    right, true, predicted = (row.tolist() for row in (counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)))
    return {
        name: {
            "images": true[index],
            "predicted": predicted[index],
            "precision": _ratio(right[index], predicted[index]),
            "recall": _ratio(right[index], true[index]),
            "f1": _ratio(2 * right[index], true[index] + predicted[index]),
        }
        for index, name in enumerate(classes)
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def confusion_csv(counts: Tensor, classes: Sequence[str]) -> str:
    """A row per true class, a column per predicted one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true \\ predicted", *classes])
    writer.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
    return text.getvalue()


MOST_NUMBERED = 20  # classes whose counts are written into the picture
MOST_NAMED = 60  # classes whose names are


def confusion_png(counts: Tensor, classes: Sequence[str], title: str) -> bytes:
    """The matrix as shares of each true class, its counts written in where there is room."""
    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(12.0, 3.5 + 0.45 * len(classes))
    figure = new_figure(side + 0.8, side)
    axes: Any = figure.subplots()
    image = axes.imshow(shares.tolist(), cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if len(classes) <= MOST_NAMED:
        size = 9 if len(classes) <= MOST_NUMBERED else 6
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=size)
        axes.set_yticks(range(len(classes)), classes, fontsize=size)
    if len(classes) <= MOST_NUMBERED:
        for row, line in enumerate(counts.tolist()):
            for column, count in enumerate(line):
                colour = "black" if shares[row, column] > 0.6 else "white"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    return png(figure)
