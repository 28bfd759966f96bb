"""One picture with a line per run: training loss, held-out metric, gradient norm with its limit, learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradfast.errors import UserError
from gradfast.monitor.page import new_figure
from gradfast.monitor.record import RunRecord, read_run
from gradfast.runs.folder import BEST_COLUMNS, RunFolder, read_run_folder
from gradfast.train.results.history import STEPS, read_csv

# Okabe and Ito's palette without its yellow, which a white page swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLES = ("-", "--", ":")  # of runs beyond the number of colours
GUIDE = "#888888"
MOST_POINTS = 4000  # of a line: more are not to be seen
SMOOTHED = 50  # the bold loss is a mean over the last 1/50 of the run


@dataclass
class Curves:
    """What is drawn of a run; whatever was not recorded is empty.

    Attributes:
        record: its gradient norms.
        steps: the rows of its steps.csv, with loss and lr.
    """

    label: str
    folder: RunFolder
    record: RunRecord
    steps: list[dict[str, Any]]

    @property
    def limit(self) -> float | None:
        """The norm that gradients were clipped to, where the run says so."""
        limit = self.folder.settings.get("clip_grad")
        return float(limit) if isinstance(limit, (int, float)) and limit > 0 else None


def read_curves(paths: Sequence[Path]) -> list[Curves]:
    """Read runs, from train's folders or a monitor's files.

    Raises:
        UserError: one is not there, or is damaged; it is named.
    """
    curves = []
    for path, label in zip(paths, make_labels(paths), strict=True):
        folder = read_run_folder(path) if path.is_dir() else RunFolder(path)
        steps = read_csv(path / STEPS) if path.is_dir() else []
        try:
            record = read_run(path)
        except UserError:
            if not folder.summary:
                raise
            record = RunRecord(label)  # its first step is still to come, or steps.csv is lost: the epochs are there
        curves.append(Curves(label, folder, record, steps))
    return curves


def make_labels(paths: Sequence[Path]) -> list[str]:
    """The folders' names; with as many of the folders above as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return ["/".join(part[-2:]) for part in parts]  # the same run twice


def draw_overlay(runs: Sequence[Curves]) -> Any:
    """A figure of four panels; the colour of a run is the same in all of them."""
    figure = new_figure(13, 8.5)
    (loss, metric), (norm, rate) = figure.subplots(2, 2)
    styles = itertools.cycle(itertools.product(STYLES, COLOURS))
    lines = [{"linestyle": style, "color": colour} for (style, colour), _ in zip(styles, runs)]
    for run, line in zip(runs, lines):
        draw_loss(loss, run, line)
        draw_metric(metric, run, line)
        norm.plot(*thin(sorted(run.record.norms.items())), linewidth=0.9, alpha=0.8, **line)
        rate.plot(*thin([(row["step"], row["lr"]) for row in run.steps]), linewidth=1.3, **line)
    draw_limits(norm, runs, lines)
    names = dict.fromkeys(BEST_COLUMNS[column] for run in runs if (column := run.folder.best_column))
    loss.set(title="training loss (thin: each step; bold: running mean)", xlabel="step")
    metric.set(title=f"held-out {' and '.join(names) or 'metric'} (dot: best)", xlabel="epoch")
    norm.set(title="global gradient norm before clipping (dotted: limit)", xlabel="step")
    rate.set(title="learning rate", xlabel="step")
    metric.xaxis.get_major_locator().set_params(integer=True)
    if any(value > 0 for run in runs for value in run.record.norms.values() if math.isfinite(value)):
        norm.set_yscale("log")
    for axes in (loss, metric, norm, rate):
        axes.grid(alpha=0.25)
        if not axes.lines:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GUIDE)
    handles = [_handle(line) for line in lines]
    figure.legend(handles, [run.label for run in runs], loc="outside lower center", ncols=min(4, len(runs)))
    return figure


def _handle(line: dict[str, str]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linewidth=2, **line)  # type: ignore[arg-type]


def draw_loss(axes: Any, run: Curves, line: dict[str, str]) -> None:
    points = [(row["step"], row["loss"]) for row in run.steps if math.isfinite(row.get("loss", math.nan))]
    if points:
        axes.plot(*thin(points), linewidth=0.6, alpha=0.35, **line)
        axes.plot(*thin(running_mean(points, max(1, len(points) // SMOOTHED))), linewidth=1.6, **line)


def draw_metric(axes: Any, run: Curves, line: dict[str, str]) -> None:
    best, rows = run.folder.best, run.folder.summary
    if best is not None:
        axes.plot([row["epoch"] for row in rows], [row[best.column] for row in rows], linewidth=1.3, **line)
        axes.plot([best.epoch], [best.value], "o", color=line["color"], markersize=6)


def draw_limits(axes: Any, runs: Sequence[Curves], lines: Sequence[dict[str, str]]) -> None:
    """Each limit as a dotted line, in the colour of the run it belongs to where the runs have several."""
    limits = {run.limit for run in runs if run.record.norms} - {None}
    for run, line in zip(runs, lines):
        if run.limit in limits:
            colour = line["color"] if len(limits) > 1 else GUIDE
            axes.axhline(run.limit, color=colour, linestyle=":", linewidth=1.5)
            limits -= set() if len(limits) > 1 else {run.limit}


def running_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Each point's mean with up to `window` - 1 points before it."""
    means = []
    total = 0.0
    for index, (step, value) in enumerate(points):
        total += value
        if index >= window:
            total -= points[index - window][1]
        means.append((step, total / min(index + 1, window)))
    return means


def thin(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """(abscissae, ordinates) of at most `MOST_POINTS` points; what is not finite is a gap."""
    points = points[:: max(1, math.ceil(len(points) / MOST_POINTS))]
    return [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points]
