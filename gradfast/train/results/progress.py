"""What is seen of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Any, TextIO

from gradfast.extras import require
from gradfast.train.results.tally import Tally


def describe(tally: Tally) -> str:
    """The figures of the last steps, and the clipped share of the epoch's."""
    return (
        f"loss {tally.recent('loss'):.3f}  norm {tally.recent('grad_norm'):.3g}  "
        f"clipped {tally.clip_fraction():.0%}  lr {tally.columns['lr'][-1]:.2g}"
    )


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


class Progress:
    """Plain lines: one every `interval` seconds at most, besides what the run has to say.

    `due` tells whether `update` would show anything now, so that the numbers are fetched from the device only then.
    """

    interval = 10.0

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.label = ""
        self._total = 0
        self._steps_left = 0
        self._start = self._shown = time.perf_counter()
        self._steps_done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_run(self, steps: int) -> None:
        """Tell how many optimiser steps are to come."""
        self._steps_left = steps
        self._start = time.perf_counter()

    def begin_epoch(self, label: str, batches: int, done: int) -> None:
        """An epoch of so many batches begins, `done` of them already done."""
        self.label, self._total = label, batches

    def due(self) -> bool:
        """Count a step, and say whether it is time to show something."""
        self._steps_done += 1
        self._steps_left -= 1
        return time.perf_counter() - self._shown >= self.interval

    def update(self, done: int, tally: Tally) -> None:
        """Show the state after `done` batches; the tally is drained."""
        self._shown = time.perf_counter()
        if len(tally):
            self._show(done, tally)

    def left(self) -> str:
        """The time to the end of the run, at the pace so far."""
        pace = (time.perf_counter() - self._start) / max(1, self._steps_done)
        return duration(pace * max(0, self._steps_left))

    def _show(self, done: int, tally: Tally) -> None:
        pace = f"{tally.images_per_second():.0f} images/s  {self.left()} left"
        self.say(f"{self.label}  {done}/{self._total}  {describe(tally)}  {pace}")

    def evaluating(self) -> None:
        """Training of the epoch is over, evaluation begins."""

    def say(self, text: str) -> None:
        """Print a line (or some) that stays."""
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Give the terminal back."""


class ProgressBar(Progress):
    """A bar that lives on the last two lines of a terminal: progress and pace, and below it the figures."""

    interval = 0.25

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        require("rich", "train", "the progress bar")
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self.console = Console(file=self.stream, highlight=False)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            console=self.console,
        )
        self._task = self._bar.add_task("", total=None, pace="")
        self._figures = ""
        self._live: Any = None

    def begin_epoch(self, label: str, batches: int, done: int) -> None:
        from rich.live import Live

        super().begin_epoch(label, batches, done)
        self._figures = ""
        self._bar.reset(self._task, total=batches, completed=done, description=label, pace="")
        if self._live is None:
            self._live = Live(
                console=self.console, transient=True, refresh_per_second=5, get_renderable=self._renderable
            )
            self._live.start()

    def _renderable(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(self._bar, Text(self._figures, overflow="ellipsis", no_wrap=True))

    def _show(self, done: int, tally: Tally) -> None:
        pace = f"{tally.images_per_second():.0f} images/s  {self.left()} left"
        self._bar.update(self._task, completed=done, pace=pace)
        self._figures = describe(tally)

    def evaluating(self) -> None:
        self._bar.update(self._task, completed=self._total, pace="held-out images")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class Silence(Progress):
    """Nothing is seen: of several processes one speaks."""

    interval = math.inf

    def say(self, text: str) -> None:
        pass


def make_progress(stream: TextIO | None = None) -> Progress:
    """A bar where `stream` (default: standard output) is a terminal that can draw one, lines elsewhere."""
    stream = stream or sys.stdout
    capable = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
    return ProgressBar(stream) if capable else Progress(stream)
