"""One run folder, read without trusting it: whatever is missing or damaged is named, and the rest is still shown."""

from __future__ import annotations

import contextlib
import csv
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gradfast.errors import UserError
from gradfast.extras import first_line, require
from gradfast.train.results.checkpoint import BEST, LAST
from gradfast.train.results.claim import is_claimed
from gradfast.train.results.history import STEPS, SUMMARY, read_csv

CONFIG = "config.yaml"
MARKS = (CONFIG, SUMMARY, STEPS, LAST, BEST)  # a folder that holds one of them is a run
DEEPEST = 4  # levels below a root that are searched

# The columns by which a task chooses its best epoch: the larger, the better.
BEST_COLUMNS = {"eval_balanced_acc": "balanced accuracy", "eval_AP": "AP"}


class Best(NamedTuple):
    """An epoch, its number from 1, with the value of the column that chooses the best."""

    value: float
    epoch: int
    column: str


@dataclass
class RunFolder:
    """What is known of a run.

    Attributes:
        state: running (its folder is locked), finished (all epochs done), stopped (some are not), or broken.
        problems: what is missing or damaged, a sentence each.
        settings: of its config.yaml, as they stand there: it may be of another version.
        summary: the rows of its summary.csv.
        changed: when something was last written, in seconds since 1970; None where nothing was.
    """

    path: Path
    state: str = "broken"
    problems: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    summary: list[dict[str, Any]] = field(default_factory=list)
    changed: float | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def task(self) -> str:
        return str(self.settings.get("task", "classify"))

    @property
    def epochs(self) -> int:
        """How many are done."""
        return int(self.summary[-1]["epoch"]) if self.summary else 0

    @property
    def planned(self) -> int | None:
        """How many there are to be."""
        epochs = self.settings.get("epochs")
        return epochs if isinstance(epochs, int) and epochs > 0 else None

    @property
    def best_column(self) -> str | None:
        """The column of the summary that chooses the best epoch."""
        known = self.summary[-1] if self.summary else {}
        return next((column for column in BEST_COLUMNS if column in known), None)

    @property
    def best(self) -> Best | None:
        """The best epoch, the first of equals; None before there is one."""
        column = self.best_column
        if column is None:
            return None
        epochs = [Best(row[column], row["epoch"], column) for row in self.summary if not math.isnan(row[column])]
        return max(epochs, key=lambda epoch: epoch.value, default=None)

    @property
    def seconds(self) -> float | None:
        """Time spent in epochs that are done, training and evaluation."""
        return sum(row["seconds"] for row in self.summary) if self.summary else None

    def last(self, column: str) -> Any:
        """The last epoch's value; None where there is none."""
        return self.summary[-1].get(column) if self.summary else None

    def largest(self, column: str) -> float | None:
        values = [row[column] for row in self.summary if column in row and math.isfinite(row[column])]
        return max(values, default=None)

    def mean(self, column: str) -> float | None:
        values = [row[column] for row in self.summary if column in row and math.isfinite(row[column])]
        return sum(values) / len(values) if values else None

    def total(self, column: str) -> int | None:
        return sum(int(row.get(column, 0)) for row in self.summary) if self.summary else None

    def age(self, now: float | None = None) -> float | None:
        """Seconds since something was written."""
        return None if self.changed is None else max(0.0, (now or time.time()) - self.changed)


def read_run_folder(path: Path) -> RunFolder:
    """Read a run folder; nothing that it holds, or lacks, is an error."""
    run = RunFolder(path)
    run.settings = read_settings(path / CONFIG, run.problems)
    run.summary = read_summary(path / SUMMARY, run.problems)
    run.changed = last_change(path)
    if is_claimed(path):
        run.state = "running"
        if not run.settings:
            run.problems = []  # it has only begun
    elif not run.problems:
        run.state = "finished" if run.planned is not None and run.epochs >= run.planned else "stopped"
    return run


def read_settings(path: Path, problems: list[str]) -> dict[str, Any]:
    yaml = require("yaml", "train", "gradfast runs")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"no {CONFIG}")
        return {}
    except OSError as error:
        problems.append(f"{CONFIG}: {error.strerror}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{CONFIG} is not YAML: {first_line(error)}")
        return {}
    if not isinstance(settings, dict):
        problems.append(f"{CONFIG} holds no settings")
        return {}
    return {str(name): value for name, value in settings.items()}


def read_summary(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        if not path.exists():
            problems.append(f"no {SUMMARY}")
            return []
        rows = read_csv(path)
        for row in rows:
            if "epoch" not in row or "seconds" not in row:
                raise UserError("columns are missing")
    except OSError as error:
        problems.append(f"{SUMMARY}: {error.strerror}")
    except (UserError, UnicodeDecodeError, csv.Error):
        problems.append(f"{SUMMARY} is damaged")
    else:
        return rows
    return []


def last_change(path: Path) -> float | None:
    times = []
    for name in MARKS:
        try:
            times.append((path / name).stat().st_mtime)
        except OSError:  # not there, or not to be looked at
            continue
    return max(times, default=None)


def is_run(path: Path) -> bool:
    with contextlib.suppress(OSError):  # a folder that may not be looked into
        return any((path / name).is_file() for name in MARKS)
    return False


def find_runs(root: Path) -> list[Path]:
    """The runs at or below a folder; an empty folder counts, as what a run left that died at once.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; gradfast runs takes run folders, or folders that hold some")
    return [root] if is_run(root) else list(_below(root, 1))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(_children(folder)):
        if is_run(path) or not any(_entries(path)):
            yield path
        elif depth < DEEPEST:
            yield from _below(path, depth + 1)


def _children(folder: Path) -> Iterable[Path]:
    return [path for path in _entries(folder) if path.is_dir() and not path.name.startswith(".")]


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # no permission, or removed a moment ago
        return []
