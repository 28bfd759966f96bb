"""The gradient's history of one run in pictures, and one page that holds them all: see `gradfast plot`."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from gradfast.files import atomic_write, make_folder
from gradfast.monitor.page import embed, html_page, new_figure, png
from gradfast.monitor.record import RunRecord

# Blue, orange and green of the Okabe-Ito palette, and a grey for guides.
BEFORE, AFTER, THIRD, GUIDE = "#0072b2", "#d55e00", "#009e73", "#888888"
MOST_POINTS = 4000  # of a curve: more are not to be seen


def draw_run(run: RunRecord, folder: Path) -> list[Path]:
    """Draw a run into a folder; returns the files written."""
    figures = {"norms.png": norm_history(run), "distribution.png": distribution(run)}
    if run.layers():
        figures |= {"layers.png": heat_map(run), "updates.png": update_ratios(run)}
    pictures = {name: png(figure) for name, figure in figures.items()}
    make_folder(folder)
    for name, picture in pictures.items():
        with atomic_write(folder / name) as file:
            file.write(picture)
    order = ("norms.png", "layers.png", "updates.png", "distribution.png")
    parts = [_facts(run), *(embed(pictures[name], name) for name in order if name in pictures), _event_table(run)]
    with atomic_write(folder / "report.html") as file:
        file.write(html_page(f"gradients of {run.name}", parts).encode())
    return [*(folder / name for name in pictures), folder / "report.html"]


def _sound(values: dict[int, float]) -> list[tuple[int, float]]:
    """Points that a log axis can show."""
    points = [(step, value) for step, value in sorted(values.items()) if 0 < value < math.inf]
    return points[:: max(1, math.ceil(len(points) / MOST_POINTS))]


def norm_history(run: RunRecord) -> Any:
    """The global norm of every step, before and after clipping, on a log axis, with the events.

    A norm that a log axis cannot show leaves a gap.
    """
    figure = new_figure(11, 4)
    axes = figure.subplots()
    steps = sorted(run.norms)
    steps = steps[:: max(1, math.ceil(len(steps) / MOST_POINTS))]
    before = [norm if 0 < (norm := run.norms[step]) < math.inf else math.nan for step in steps]
    clip = [run.coefficients.get(step, math.nan) for step in steps]
    axes.plot(steps, before, color=BEFORE, linewidth=1, label="before clipping")
    if any(coefficient < 1 for coefficient in clip):
        after = [norm * coefficient for norm, coefficient in zip(before, clip)]
        axes.plot(steps, after, color=AFTER, linewidth=1, label="after clipping")
    for rule, colour, mark in (("spike", AFTER, "v"), ("nonfinite", "black", "x")):
        steps = [event["step"] for event in run.events if event["rule"] == rule]
        if steps:
            place = axes.get_xaxis_transform()
            axes.plot(steps, [0.97] * len(steps), mark, color=colour, label=f"{rule} ({len(steps)})", transform=place)
    others = sorted({event["rule"] for event in run.events} - {"spike", "nonfinite"})
    for rule in others:
        for number, event in enumerate(event for event in run.events if event["rule"] == rule):
            label = rule if number == 0 else None
            axes.axvline(event["step"], color=GUIDE, linestyle=":", linewidth=1, label=label)
    if any(norm == norm for norm in before):
        axes.set_yscale("log")
    axes.set(title="global gradient norm", xlabel="step")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", fontsize=8)
    return figure


def heat_map(run: RunRecord) -> Any:
    """Layer by step: the logarithm of each group's gradient norm; what is not finite is left white."""
    layers = run.layers()
    steps = sorted({step for values in layers.values() for step in values})
    steps = steps[:: max(1, math.ceil(len(steps) / 600))]
    rows = [[_log(values.get(step, math.nan)) for step in steps] for values in layers.values()]
    figure = new_figure(11, 1.5 + 0.22 * len(layers))
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_yticks(range(len(layers)), list(layers), fontsize=7)
    marks = range(0, len(steps), max(1, len(steps) // 10))
    axes.set_xticks(list(marks), [str(steps[mark]) for mark in marks])
    axes.set(title="gradient norm of each layer, before clipping", xlabel="step")
    figure.colorbar(image, label="log10 norm")
    return figure


def _log(value: float) -> float:
    return math.log10(value) if 0 < value < math.inf else math.nan


def update_ratios(run: RunRecord) -> Any:
    """Each layer's update over its weights: about 1e-3 is customary."""
    figure = new_figure(11, 4)
    axes = figure.subplots()
    for values in run.layers("update_ratio/").values():
        points = _sound(values)
        if points:
            axes.plot(*zip(*points), linewidth=0.8, alpha=0.6)
            axes.set_yscale("log")
    axes.axhline(1e-3, color=GUIDE, linestyle=":")
    axes.set(title="update-to-weight ratio of each layer", xlabel="step")
    axes.grid(alpha=0.25)
    return figure


def distribution(run: RunRecord) -> Any:
    """How often which global norm, and each layer's range over the run."""
    layers = {name: [value for _, value in _sound(values)] for name, values in run.layers().items()}
    layers = {name: values for name, values in layers.items() if values}
    figure = new_figure(11, max(4.0, 1.5 + 0.2 * len(layers)))
    axes = figure.subplots(1, 2 if layers else 1, squeeze=False)[0]
    logs = [math.log10(value) for _, value in _sound(run.norms)]
    axes[0].hist(logs, bins=40, color=BEFORE)
    axes[0].set(title="global norm before clipping", xlabel="log10 norm", ylabel="steps")
    if layers:
        axes[1].boxplot([[math.log10(v) for v in values] for values in layers.values()], orientation="horizontal")
        axes[1].set_yticks(range(1, len(layers) + 1), list(layers), fontsize=7)
        axes[1].invert_yaxis()
        axes[1].set(title="of each layer", xlabel="log10 norm")
    return figure


def _facts(run: RunRecord) -> str:
    finite = [norm for norm in run.norms.values() if math.isfinite(norm)]
    clipped = [c < 1 for step, c in run.coefficients.items() if math.isfinite(run.norms[step]) and c == c]
    facts = [f"{len(run.norms)} steps", f"{len(run.norms) - len(finite)} with a non-finite norm"]
    if finite:
        facts.append(f"median norm {sorted(finite)[len(finite) // 2]:.4g}, largest {max(finite):.4g}")
    if clipped:
        facts.append(f"{sum(clipped) / len(clipped):.1%} of the steps clipped")
    return f"<p>{escape('; '.join(facts))}</p>"


def _event_table(run: RunRecord) -> str:
    if not run.events:
        return "<p>No events.</p>"
    rows = "".join(
        f"<tr><td>{event['step']}</td><td>{escape(str(event['rule']))}</td><td>{escape(str(event['message']))}</td></tr>"
        for event in run.events[:500]
    )
    return f"<h2>Events</h2><table><tr><th>step</th><th>rule</th><th>what happened</th></tr>{rows}</table>"
