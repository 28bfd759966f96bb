"""A diagnosis as one self-contained HTML page: findings, plots of the signal and the gradient, every layer."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradfast.files import atomic_write
from gradfast.monitor.doctor.terminal import row
from gradfast.monitor.page import embed, html_page, new_figure

if TYPE_CHECKING:
    from gradfast.monitor.doctor.diagnosis import Diagnosis

_FORWARD, _BACKWARD, _WEIGHTS = "#0072b2", "#d55e00", "#009e73"


def save_html(diagnosis: Diagnosis, path: Path) -> None:
    parts = [f"<p>{escape(diagnosis.summary())}</p>"]
    for finding in diagnosis.findings:
        parts.append(
            f'<div class="{finding.severity}"><h3>{finding.severity}: {escape(finding.title)}</h3>'
            f"<p>{escape(finding.evidence)}</p><pre>{escape(finding.mend)}</pre></div>"
        )
    if diagnosis.ok:
        parts.append("<p><b>Nothing found.</b></p>")
    parts.append(embed(_draw(diagnosis), "signal, gradient and weights of each layer"))
    heads = ("layer", "rms in", "rms out", "largest out", "gradient norm", "gain back", "weight gain", "note")
    rows = [row(p) for p in diagnosis.measurement.passages if p.kind != "other"]
    table = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
    parts.append(f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{table}</table>")
    with atomic_write(path) as file:
        file.write(html_page(f"gradfast doctor: {diagnosis.model}", parts).encode())


def _draw(diagnosis: Diagnosis) -> Any:
    layers = diagnosis.measurement.of_kind("layer")
    figure = new_figure(11, 7)
    axes = figure.subplots(3, 1, sharex=True)
    series: tuple[tuple[str, list[Any], str], ...] = (
        ("rms of the outputs", [p.out_rms for p in layers], _FORWARD),
        ("norm of d loss / d output", [p.grad_norm for p in layers], _BACKWARD),
        ("weight gain, rms(W) sqrt(fan in)", [p.weight_gain for p in layers], _WEIGHTS),
    )
    for axis, (title, values, colour) in zip(axes, series):
        sound = [(number, value) for number, value in enumerate(values) if value and 0 < value < math.inf]
        axis.plot([x for x, _ in sound], [y for _, y in sound], "o-", color=colour, markersize=3)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if sound:
            low, high = min(y for _, y in sound), max(y for _, y in sound)
            middle = max(10.0, high / low) ** 0.5 * 1.2  # a decade at least, lest noise look like a trend
            axis.set(yscale="log", ylim=((low * high) ** 0.5 / middle, (low * high) ** 0.5 * middle))
    blamed = {name for finding in diagnosis.findings for name in finding.layers}
    for number, passage in enumerate(layers):
        if passage.name in blamed:
            for axis in axes:
                axis.axvspan(number - 0.5, number + 0.5, color="red", alpha=0.08, linewidth=0)
    every = max(1, len(layers) // 30)
    axes[-1].set_xticks(range(0, len(layers), every), [p.name for p in layers[::every]], rotation=90, fontsize=7)
    return figure
