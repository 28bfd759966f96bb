"""The table with a row per run: its columns, in what order rows come, and how it is made to fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradfast.runs.folder import RunFolder
from gradfast.runs.text import (
    NOTHING,
    data_name,
    ellipsis,
    magnitude,
    percent,
    short_age,
    short_duration,
    shown,
)

WIDTH = 100  # where the terminal says nothing
GAP = 2  # characters between two columns


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        value: what ``--json`` gives and ``--sort`` orders by; None where it is not known.
        text: how it looks.
        largest_first: the order of ``--sort``; what is best, or most to worry about, comes first.
        least: characters that it may be cut down to; None where it may not be cut.
    """

    value: Callable[[RunFolder], Any]
    text: Callable[[RunFolder], str]
    largest_first: bool = False
    least: int | None = None


def _best_text(run: RunFolder) -> str:
    best = run.best
    return NOTHING if best is None else f"{best.value:.3f} @{best.epoch}"


def _setting(name: str) -> Callable[[RunFolder], str]:
    return lambda run: str(run.settings.get(name, NOTHING))


COLUMNS = {
    "name": Column(lambda run: run.name, lambda run: run.name, least=16),
    "state": Column(lambda run: run.state, lambda run: run.state),
    "task": Column(lambda run: run.task, lambda run: run.task),
    "model": Column(_setting("model"), _setting("model"), least=8),
    "data": Column(_setting("data"), lambda run: data_name(run.settings.get("data", NOTHING)), least=8),
    "epochs": Column(lambda run: run.epochs, lambda run: f"{run.epochs}/{run.planned or '?'}", largest_first=True),
    "best": Column(lambda run: run.best.value if run.best else None, _best_text, largest_first=True),
    "loss": Column(lambda run: run.last("train_loss"), lambda run: shown(run.last("train_loss"))),
    "norm": Column(
        lambda run: run.largest("grad_norm_max"),
        lambda run: magnitude(run.largest("grad_norm_max")),
        largest_first=True,
    ),
    "clip": Column(lambda run: run.mean("clip_fraction"), lambda run: percent(run.mean("clip_fraction")), True),
    "skip": Column(lambda run: run.total("skipped_steps"), lambda run: shown(run.total("skipped_steps"), "d"), True),
    "time": Column(lambda run: run.seconds, lambda run: short_duration(run.seconds), largest_first=True),
    "age": Column(lambda run: run.age(), lambda run: short_age(run.age())),
}
ABOUT = {
    "best": "the best epoch's balanced accuracy or AP, and @ its number",
    "loss": "of training, last epoch",
    "norm": "the largest gradient norm of a step before clipping",
    "clip": "share of the steps that clipping scaled down",
    "skip": "steps skipped for a NaN or infinite gradient",
    "time": "spent in the epochs that are done",
    "age": "since the run last wrote something",
}
SAID_ONCE = ("task", "model", "data")  # above the table, where all runs agree
RIGHT = ("epochs", "best", "loss", "norm", "clip", "skip", "time", "age")


def sort_runs(runs: Sequence[RunFolder], name: str) -> list[RunFolder]:
    """By a column; runs in which it is not known, or is NaN, come last."""
    column = COLUMNS[name]

    def known(run: RunFolder) -> bool:
        value = column.value(run)
        return value is not None and value == value

    runs = sorted(runs, key=lambda run: run.name)
    return [
        *sorted(filter(known, runs), key=column.value, reverse=column.largest_first),
        *(run for run in runs if not known(run)),
    ]


def choose_columns(runs: Sequence[RunFolder]) -> tuple[list[str], str]:
    """The columns to show, and what is said above the table in place of those that would say the same in each row."""
    same = {}
    if len(runs) > 1:
        for name in SAID_ONCE:
            texts = {COLUMNS[name].text(run) for run in runs if run.settings}
            if len(texts) == 1:
                same[name] = texts.pop()
    heading = "all: " + ", ".join(f"{name} {text}" for name, text in same.items()) if same else ""
    return [name for name in COLUMNS if name not in same], heading


def fit(cells: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """Cut texts so that the columns, headings and gaps fit `width`: of those that may be cut always the widest."""
    widths = {name: max(len(name), *map(len, texts)) for name, texts in cells.items()}
    while sum(widths.values()) + GAP * (len(widths) - 1) > width:
        room = [name for name in widths if (least := COLUMNS[name].least) is not None and widths[name] > least]
        if not room:
            break
        widths[max(room, key=widths.__getitem__)] -= 1
    return {name: [ellipsis(text, widths[name]) for text in texts] for name, texts in cells.items()}


STYLES = {"running": "green", "finished": "", "stopped": "yellow", "broken": "red"}


def build_table(runs: Sequence[RunFolder], width: int) -> tuple[Any, str]:
    """(a rich table, what is said above it)"""
    from rich.table import Table
    from rich.text import Text

    names, heading = choose_columns(runs)
    cells = fit({name: [COLUMNS[name].text(run) for run in runs] for name in names}, width)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=True, overflow="ellipsis")
    for row, run in enumerate(runs):
        texts = {name: Text(cells[name][row]) for name in names}
        texts["state"].stylize(STYLES[run.state])
        table.add_row(*texts.values())
    return table, heading


def to_dict(run: RunFolder) -> dict[str, Any]:
    """A run for ``--json``: numbers that are not finite are null."""
    values = {name: column.value(run) for name, column in COLUMNS.items() if name not in ("best", "age")}
    best = run.best
    return {
        "folder": str(run.path),
        **{name: _finite(value) for name, value in values.items()},
        "epochs_planned": run.planned,
        "best": {"metric": best.column, "value": best.value, "epoch": best.epoch} if best else None,
        "last": {name: _finite(value) for name, value in run.summary[-1].items()} if run.summary else None,
        "changed": run.changed,
        "problems": run.problems,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
