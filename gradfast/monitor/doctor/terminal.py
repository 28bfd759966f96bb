"""A diagnosis as tables in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradfast.extras import require
from gradfast.monitor.doctor.finding import ERROR
from gradfast.monitor.doctor.probe import Passage
from gradfast.monitor.doctor.signal import label

if TYPE_CHECKING:
    from gradfast.monitor.doctor.diagnosis import Diagnosis

_MOST_ROWS = 24


def show(diagnosis: Diagnosis, every_layer: bool = False) -> None:
    """Print the findings, then the layers: all of them, or an even choice that holds every layer found fault with."""
    require("rich", "monitor", "the doctor's table")
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(escape(diagnosis.summary()), highlight=False, soft_wrap=True)
    for finding in diagnosis.findings:
        colour = "red" if finding.severity == ERROR else "yellow"
        console.print(
            f"\n[bold {colour}]{finding.severity}[/] {escape(finding.title)}", highlight=False, soft_wrap=True
        )
        console.print(f"  evidence  {escape(finding.evidence)}", highlight=False, soft_wrap=True)
        console.print(f"  mend      [bold]{escape(finding.mend)}[/]", highlight=False, soft_wrap=True)
    if diagnosis.ok:
        console.print("[green]Nothing found.[/]")
    blamed = {name for finding in diagnosis.findings for name in finding.layers}
    passages = [passage for passage in diagnosis.measurement.passages if passage.kind in ("layer", "activation")]
    heads = ("layer", "in", "out", "largest", "gradient", "gain back", "weight gain", "note")
    table = Table(*heads, box=None, header_style="dim", padding=(0, 1, 0, 0))
    for column in table.columns[1:-1]:
        column.justify = "right"
    for passage in passages if every_layer else _choice(passages, blamed):
        style = "red" if passage.name in blamed else ""
        table.add_row(*map(escape, row(passage)), style=style)
    console.print()
    console.print(table)


def row(passage: Passage) -> tuple[str, ...]:
    """One layer's cells: name, rms in and out, largest output, gradient norm, gain back, weight gain, note."""
    notes = []
    if passage.bad:
        notes.append(f"{passage.bad:.1%} not finite")
    if passage.grad_bad:
        notes.append(f"gradient {passage.grad_bad:.1%} not finite")
    if passage.dead:
        notes.append(f"{passage.dead:.0%} dead")
    if passage.saturated:
        notes.append(f"{passage.saturated:.0%} saturated")
    forward = passage.in_rms, passage.out_rms, passage.out_max
    backward = passage.grad_norm, passage.backward_gain, passage.weight_gain
    return (label(passage), *map(_number, (*forward, *backward)), ", ".join(notes))


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g}"


def _choice(passages: list[Passage], blamed: set[str]) -> list[Passage]:
    every = max(1, math.ceil(len(passages) / _MOST_ROWS))
    worst = [p for p in passages if p.name in blamed][:_MOST_ROWS]
    return [p for number, p in enumerate(passages) if number % every == 0 or p in worst or number == len(passages) - 1]
