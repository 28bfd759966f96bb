"""Predictions drawn over the truth: a grid of scenes in one PNG.

Truth and prediction are told apart by colour and without it: the truth has dashed outlines, on top, with its name in
the box's lower left corner; a prediction has solid ones with name and score above its upper left corner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gradfast.extras import require
from gradfast.files import atomic_write

# Blue and orange of the Okabe-Ito palette, which most colour-blind readers tell apart.
TRUTH, PREDICTION = "#56b4e9", "#e69f00"
SIDE = 4.0  # inches of a scene's longer side in the grid
RESOLUTION = 100  # dots an inch


def draw_predictions(
    path: Path,
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    threshold: float = 0.5,
    limit: int = 9,
) -> None:
    """Write a grid of scenes.

    Args:
        path: the PNG, which is replaced as a whole.
        images: [3, height, width] uint8 each.
        targets: `boxes` [n, 4] (left, top, right, bottom, pixels) and `labels` [n] of each; {} where unknown.
        predictions: the same and `scores` [n]; {} for the truth alone.
        classes: class names; ``classes[i]`` has label i + 1.
        threshold: predictions below this score are left out.
        limit: at most so many scenes, the first ones.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    require("matplotlib", "train", "pictures of predictions")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(limit, len(images))
    columns = max(1, math.ceil(math.sqrt(shown)))
    rows = max(1, math.ceil(shown / columns))
    figure = Figure(figsize=(SIDE * columns, SIDE * rows + 0.6), layout="constrained", dpi=RESOLUTION)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, target, prediction in zip(grid.flat, images[:shown], targets, predictions, strict=False):
        draw_scene(axes, image, target, prediction, classes, threshold)
    figure.legend(handles=legend_entries(threshold), loc="outside upper center", ncols=min(2, columns), frameon=False)
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def draw_scene(
    axes: Any,
    image: Tensor,
    target: Mapping[str, Any],
    prediction: Mapping[str, Any],
    classes: Sequence[str],
    threshold: float,
) -> None:
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set_autoscale_on(False)
    found = zip(rows_of(prediction, "boxes"), rows_of(prediction, "labels"), rows_of(prediction, "scores"), strict=True)
    for edges, label, score in sorted(found, key=lambda one: one[2]):  # the surest on top
        if score >= threshold and all(math.isfinite(edge) for edge in edges):
            draw_box(axes, edges, PREDICTION, dashed=False)
            text = f"{classes[int(label) - 1]} {score:.2f}"
            write_name(axes, edges[0], edges[1], text, PREDICTION, above=edges[1] > 0.05 * image.shape[-2])
    for edges, label in zip(rows_of(target, "boxes"), rows_of(target, "labels"), strict=True):
        draw_box(axes, edges, TRUTH, dashed=True)
        write_name(axes, edges[0], edges[3], classes[int(label) - 1], TRUTH, above=True)


def rows_of(entry: Mapping[str, Any], name: str) -> list[Any]:
    values = entry.get(name)
    return [] if values is None else values.detach().cpu().tolist()


def draw_box(axes: Any, edges: Sequence[float], colour: str, dashed: bool) -> None:
    """An outline over a black one, so that it is seen on any ground; dashes then alternate with black."""
    from matplotlib.patches import Rectangle

    corner = (edges[0] - 0.5, edges[1] - 0.5)  # edges lie between pixels, and matplotlib counts from a pixel's middle
    size = (edges[2] - edges[0], edges[3] - edges[1])
    under, over = (2.0, 2.0) if dashed else (3.5, 2.0)
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=under))
    style = (0, (3, 3)) if dashed else "solid"
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=over, linestyle=style))


def write_name(axes: Any, x: float, y: float, text: str, colour: str, above: bool) -> None:
    """A name on a patch of the box's colour: in black, which either colour is light enough for."""
    patch = {"facecolor": colour, "edgecolor": "none", "pad": 1.2, "alpha": 0.9}
    place = "bottom" if above else "top"
    axes.text(max(x, 0.0), y, text, fontsize=8, color="black", bbox=patch, verticalalignment=place, clip_on=True)


def legend_entries(threshold: float) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=TRUTH, linewidth=2, linestyle=(0, (4, 3)), label="truth (dashed, named below)"),
        Line2D(
            [], [], color=PREDICTION, linewidth=2, label=f"prediction of {threshold:g} or more (solid, named above)"
        ),
    ]
