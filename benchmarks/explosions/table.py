"""The table of outcomes, for the terminal and for the docs, and the curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cures import CURES
from scenarios import SCENARIOS
from trial import Result

PICTURE = "explosions.png"
START, END = "<!-- table: begin -->", "<!-- table: end -->"


def cell(results: Sequence[Result]) -> str:
    """One scenario under one cure: "6/6 0.21" for learnt in six of six seeds, with the median final loss."""
    if not results:
        return ""
    learnt = sum(result.outcome == "learnt" for result in results)
    diverged = sum(result.outcome == "diverged" for result in results)
    median = statistics.median(result.final for result in results)
    size = "inf" if median >= 1e30 else f"{median:.2g}"
    words = f"{learnt}/{len(results)}" if learnt else "diverged" if diverged == len(results) else "stuck"
    if not learnt and 0 < diverged < len(results):
        words = f"{diverged}/{len(results)} div."
    return f"{words} {size}"


def rows(results: Sequence[Result], broken: bool) -> list[list[str]]:
    made = []
    for scenario in SCENARIOS:
        mine = [r for r in results if r.scenario == scenario and r.broken == broken]
        if mine:
            made.append([scenario.replace("_", " "), *(cell([r for r in mine if r.cure == cure]) for cure in CURES)])
    return made


def text(results: Sequence[Result]) -> str:
    titles = {True: "broken: learnt in so many seeds, or how it failed; median final loss", False: "sound"}
    parts = []
    for broken, title in titles.items():
        table = [["", *(cure.label for cure in CURES.values())], *rows(results, broken)]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths)) for row in table]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


def markdown_table(results: Sequence[Result], broken: bool) -> str:
    head = ["scenario", *(cure.label for cure in CURES.values())]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows(results, broken):
        cells = [row[0], *(f"**{value}**" if learnt_always(value) else value for value in row[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def learnt_always(value: str) -> bool:
    learnt, slash, seeds = value.split(" ")[0].partition("/")
    return bool(slash) and learnt == seeds and "div." not in value


def markdown(results: Sequence[Result], path: Path) -> None:
    """Put the tables between the two marks of a Markdown file, and the curves under docs/images."""
    body = path.read_text()
    before, rest = body.split(START)
    after = rest.split(END)[1]
    seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in results}))
    sections = [
        f"Broken: in how many of seeds {seeds} it learnt, or how it failed, and the median final loss.\n",
        markdown_table(results, True),
        "\nSound twins: what each cure does where nothing is wrong.\n",
        markdown_table(results, False),
    ]
    path.write_text(before + START + "\n\n" + "\n".join(sections) + "\n\n" + END + after)
    curves(results, path.parent / "images")


def curves(results: Sequence[Result], folder: Path) -> None:
    """The loss of the first seed of every broken scenario, under four cures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seed = min(result.seed for result in results)
    names = [name for name in SCENARIOS if any(r.scenario == name and r.broken for r in results)]
    chosen = [name for name in ("torch", "torch_clip", "model", "all") if name in CURES]
    colours = dict(zip(chosen, ("#d55e00", "#e69f00", "#56b4e9", "#009e73")))
    figure = Figure(figsize=(13, 2.4 * -(-len(names) // 4)), layout="constrained")
    axes: Any = figure.subplots(-(-len(names) // 4), 4, squeeze=False).flatten()
    for axis, name in zip(axes, names):
        for result in results:
            if result.scenario == name and result.broken and result.seed == seed and result.cure in chosen:
                values = [min(max(value, 1e-4), 1e4) for value in result.losses]
                axis.plot(values, color=colours[result.cure], label=CURES[result.cure].label, linewidth=1.2)
        axis.set_yscale("symlog", linthresh=1e-2) if name == "gan" else axis.set_yscale("log")
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=7)
    figure.suptitle(f"training loss of seed {seed}, cut off at 10⁴ (NaN and infinity lie there too)", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / PICTURE).open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
