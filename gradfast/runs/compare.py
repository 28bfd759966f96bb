"""The table with a column per run: the settings in which they differ, then what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradfast.runs.folder import BEST_COLUMNS, RunFolder
from gradfast.runs.listing import GAP, to_dict
from gradfast.runs.text import NOTHING, ellipsis, magnitude, percent, short_duration, shown

ABSENT = "(not set)"
NARROWEST, WIDEST = 12, 36  # characters of a run's column


def differing_settings(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Setting -> its value in each run, where they are not all the same; None where a run does not have it."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row[1:])}


def results(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """Result -> its text in each run; results that no run has are left out."""

    def of_best(run: RunFolder) -> str:
        best = run.best
        return NOTHING if best is None else f"{BEST_COLUMNS[best.column]} {best.value:.4f}"

    rows: dict[str, Callable[[RunFolder], str]] = {
        "state": lambda run: run.state,
        "epochs": lambda run: f"{run.epochs}/{run.planned or '?'}",
        "best": of_best,
        "best epoch": lambda run: str(run.best.epoch) if run.best else NOTHING,
        "last train_loss": lambda run: shown(run.last("train_loss"), ".4f"),
    }
    for column in dict.fromkeys(name for run in runs if run.summary for name in run.summary[-1]):
        if column.startswith("eval_"):
            rows[f"last {column}"] = lambda run, column=column: shown(run.last(column), ".4f")  # type: ignore[misc]
    rows |= {
        "largest norm": lambda run: magnitude(run.largest("grad_norm_max")),
        "clipped steps": lambda run: percent(run.mean("clip_fraction")),
        "skipped steps": lambda run: shown(run.total("skipped_steps"), "d"),
        "images/s": lambda run: magnitude(run.mean("images_per_s")),
        "time": lambda run: short_duration(run.seconds),
    }
    texts = {name: [text(run) for run in runs] for name, text in rows.items()}
    return {name: row for name, row in texts.items() if any(text != NOTHING for text in row)}


def build_tables(runs: Sequence[RunFolder], width: int) -> list[Any]:
    """Rich tables, each with as many runs as `width` has room for."""
    settings = {
        name: [ABSENT if value is None else str(value) for value in row]
        for name, row in differing_settings(runs).items()
    }
    found = results(runs)
    label = max(map(len, ["setting", *settings, *found]))
    wanted = max(
        map(len, [run.name for run in runs] + [text for row in [*settings.values(), *found.values()] for text in row])
    )
    column = min(max(wanted, NARROWEST), WIDEST)
    at_once = max(1, (width - label) // (column + GAP))
    return [
        _table(runs[first : first + at_once], first, settings, found, column) for first in range(0, len(runs), at_once)
    ]


def _table(
    runs: Sequence[RunFolder], first: int, settings: dict[str, list[str]], found: dict[str, list[str]], column: int
) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(Text(ellipsis(run.name, column)), no_wrap=True, justify="right")
    for rows, style in ((settings, "cyan"), (found, "")):
        for name, texts in rows.items():
            own = texts[first : first + len(runs)]
            table.add_row(Text(name, style=style), *(Text(ellipsis(text, column)) for text in own))
        if rows is settings and rows:
            table.add_row()
    return table


def to_json(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The comparison for ``--json``."""
    return {"settings": differing_settings(runs), "runs": [to_dict(run) for run in runs]}
