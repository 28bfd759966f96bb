"""``--on-spike``: the guard that stands by a run, and the record of what it saw and did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradfast.files import atomic_write
from gradfast.guard import BackOff, Guard, Rewarm, SnapshotRing, TrainingStopped
from gradfast.guard.guard import several_ranks
from gradfast.monitor.events import Event
from gradfast.monitor.sinks import JSONL
from gradfast.optim.base import ClippedOptimizer
from gradfast.train.config import TrainConfig
from gradfast.train.model.averaging import MovingAverage

EVENTS = "events.jsonl"
SPIKE = 10.0  # times the median of the 128 norms before
SNAPSHOT_EVERY = 50  # steps, of which the last few snapshots stay in memory
SKIPS_IN_A_ROW = 20  # are one too many
LINES_SHOWN = 10  # of a run's events on the terminal, besides roll-backs; all of them are in EVENTS


class RunGuard(Guard):
    """A guard whose events go to the run's own record and not to the log."""

    def _record(self, event: Event) -> None:
        self.events.append(event)
        if self.on_event is not None:
            self.on_event(event)


def build_guard(
    config: TrainConfig,
    model: nn.Module,
    optimizer: ClippedOptimizer,
    scaler: torch.amp.GradScaler,
    average: MovingAverage | None,
) -> RunGuard | None:
    """The guard of ``--on-spike``; None for none.

    ``skip`` leaves out steps whose gradient is not finite, or that a clip policy refuses, as the optimiser does anyway,
    and tells of them, of norms that stand out and of a loss that left its course. ``backoff`` lowers the rate after
    each such step as well, ``rollback`` goes back to a snapshot in memory where that does not help.
    """
    if config.on_spike == "none":
        return None
    draws_back = config.on_spike != "skip"
    also: dict[str, Any] = {"scaler": scaler} | ({"average": average} if average is not None else {})
    return RunGuard(
        optimizer,
        model=model,
        also=also,
        back_off=BackOff() if draws_back else None,
        rewarm=Rewarm() if draws_back else None,
        snapshots=SnapshotRing(every=SNAPSHOT_EVERY) if config.on_spike == "rollback" else None,
        max_consecutive_skips=SKIPS_IN_A_ROW,
        clipped_below=0.0,  # under a limit of 1 most first steps of a network are clipped to a hundredth
        spike=SPIKE,
        process_group=torch.distributed.group.WORLD if several_ranks() else None,
    )


def describe_stop(error: TrainingStopped) -> str:
    """Why the guard gave up, in the command's words."""
    return error.events[-1].message.partition(", and there is no snapshot")[0]


class EventRecord:
    """``events.jsonl`` of a run folder, one JSON object a line, and the same in words on the terminal."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.path = folder / EVENTS
        self.say = say
        self.shown = 0
        self._file: JSONL | None = None

    def start(self, source: Path | None, steps: int) -> None:
        """Take over what the run in `source` recorded of its first `steps` steps; later ones will be done again."""
        if source is None or not (source / EVENTS).is_file():
            return
        kept = []
        for line in (source / EVENTS).read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= steps:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):
                continue  # cut short when the run was killed
        with atomic_write(self.path) as file:
            file.write("".join(kept).encode())

    def note(self, event: Event) -> None:
        if self._file is None:
            self._file = JSONL(self.path)  # made with its first event: a run without any has no such file
        self._file.put(event.to_dict())
        if self.shown < LINES_SHOWN or event.action in ("rolled back", "stopped"):
            self.say(f"event      {event.message}")
        elif self.shown == LINES_SHOWN:
            self.say(f"event      further ones are in {self.path}")
        self.shown += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
