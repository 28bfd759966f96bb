"""summary.csv, a row per epoch, and steps.csv, a row per optimiser step."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradfast.errors import UserError
from gradfast.files import append_whole, atomic_write
from gradfast.train.results.tally import COLUMNS, Tally
from gradfast.train.stopwatch import PHASES
from gradfast.train.tasks.task import Evaluation, Task

SUMMARY = "summary.csv"
STEPS = "steps.csv"

# Of summary.csv, besides those of the task, which stand between the first two and the others.
FIRST_COLUMNS = (
    "epoch",  # counted from 1
    "train_loss",  # mean over the training images as they were met
)
LAST_COLUMNS = (
    "lr",  # of the epoch's last step
    "grad_norm",  # before clipping, mean over the steps
    "grad_norm_max",
    "clip_fraction",  # share of the steps that were scaled down
    "skipped_steps",  # for a NaN or infinite gradient, in this epoch
    "images_per_s",  # of training, evaluation left out
    *(f"{phase}_share" for phase in PHASES),  # of the time of the steps: waiting for data, forward ...
    "seconds",  # training and evaluation
)
STEP_COLUMNS = ("epoch", "step", *COLUMNS)
_WHOLE: dict[str, Callable[[str], float]] = dict.fromkeys(("epoch", "step", "images", "skipped_steps"), int)


def summary_columns(task: Task) -> tuple[str, ...]:
    return (*FIRST_COLUMNS, *task.columns, *LAST_COLUMNS)


def summary_row(epoch: int, tally: Tally, evaluation: Evaluation, seconds: float) -> dict[str, Any]:
    """The row of an epoch, whose number counts from 1."""
    return {
        "epoch": epoch,
        "train_loss": tally.loss(),
        **evaluation.values,
        "lr": tally.columns["lr"][-1] if len(tally) else 0.0,
        "grad_norm": tally.grad_norm(),
        "grad_norm_max": tally.grad_norm_max(),
        "clip_fraction": tally.clip_fraction(),
        "skipped_steps": tally.skipped_steps,
        "images_per_s": round(tally.images_per_second(), 2),
        **{f"{phase}_share": round(tally.share(phase), 4) for phase in PHASES},
        "seconds": round(seconds, 2),
    }


def step_rows(epoch: int, first_step: int, tally: Tally, start: int = 0) -> list[dict[str, Any]]:
    """The rows of an epoch's steps from the one of index `start` on; epochs and steps count from 1."""
    rows = zip(*(column[start:] for column in tally.columns.values()), strict=True)
    return [
        {"epoch": epoch, "step": first_step + number, **dict(zip(tally.columns, row, strict=True))}
        for number, row in enumerate(rows, start=start)
    ]


def to_csv(columns: Iterable[str], rows: Iterable[Mapping[str, Any]], heading: bool = True) -> str:
    """Rows as CSV; floats are written so that they read back to the same bits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    if heading:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def unknown_filled(row: Mapping[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """A row with nan in the columns that the run it is of did not know."""
    return {name: row.get(name, math.nan) for name in columns}


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file of numbers; none where there is no file.

    A last line without an end is left out: the run that wrote it was killed there, or is writing it.

    Raises:
        UserError: a cell is not a number.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    rows = list(csv.DictReader(whole.splitlines()))
    try:
        return [{name: _WHOLE.get(name, float)(value) for name, value in row.items()} for row in rows]
    except (TypeError, ValueError):
        raise UserError(f"{path} is not a table of numbers; mend it, or move it away to start a new one") from None


class History:
    """The two tables of a run folder.

    Rows of epochs that a resumed run will do again are dropped when it starts, so that a table never holds an epoch
    twice, whenever the earlier run was stopped.

    Args:
        columns: of summary.csv.
        components: names of the parts of the loss, which are columns of steps.csv.
    """

    def __init__(self, folder: Path, columns: Sequence[str], components: Sequence[str] = ()) -> None:
        self.folder = folder
        self.columns = columns
        self.step_columns = (*STEP_COLUMNS, *components)
        self.summary: list[dict[str, Any]] = []

    def start(self, source: Path | None = None, epochs: int = 0) -> None:
        """Write both tables, with the first `epochs` epochs of the run in `source`."""
        steps: list[dict[str, Any]] = []
        if source is not None:
            rows = [row for row in read_csv(source / SUMMARY) if row["epoch"] <= epochs]
            self.summary = [unknown_filled(row, self.columns) for row in rows]
            steps = [row for row in read_csv(source / STEPS) if row["epoch"] <= epochs]
        with atomic_write(self.folder / STEPS) as file:
            file.write(to_csv(self.step_columns, [unknown_filled(row, self.step_columns) for row in steps]).encode())
        self.write_summary()

    def write_summary(self) -> None:
        with atomic_write(self.folder / SUMMARY) as file:
            file.write(to_csv(self.columns, self.summary).encode())

    def add(self, row: dict[str, Any], steps: list[dict[str, Any]]) -> None:
        append_whole(self.folder / STEPS, to_csv(self.step_columns, steps, heading=False))
        self.summary.append(row)
        self.write_summary()
