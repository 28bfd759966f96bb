"""Where a monitor's numbers go: CSV, JSON lines, TensorBoard, Weights & Biases, or your own subclass of `Sink`.

Of several ranks the first one writes, and a sink of another does nothing.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from gradfast.extras import require
from gradfast.files import write_failure
from gradfast.monitor.events import Event

RECORD = "monitor.jsonl"  # the file in a run folder that `gradfast plot` reads


class Sink:
    """Takes what a monitor has; each method does nothing unless a subclass says otherwise."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One sample: metric -> value."""

    def history(self, first_step: int, norms: Sequence[float], coefficients: Sequence[float]) -> None:
        """Global norm before clipping and clip coefficient of every step since the last call."""

    def event(self, event: Event) -> None:
        """Something out of the ordinary."""

    def flush(self) -> None:
        """Write what has come so far to where a crash does not reach it."""

    def close(self) -> None:
        """No more will come."""


def on_first_rank() -> bool:
    """Whether this process writes: the only one, or the first of several."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _open(path: Path, mode: str) -> IO[str]:
    if not on_first_rank():  # the first rank's file is not this one's to make, or to empty
        path, mode = Path(os.devnull), "w"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open(mode, newline="", encoding="utf-8")
    except OSError as error:
        raise write_failure(path, error) from error


class CSV(Sink):
    """A table with a row per sample and a column per metric, those of the first sample; written over."""

    def __init__(self, path: str | Path) -> None:
        self._file = _open(Path(path), "w")
        self._writer: csv.DictWriter[str] | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, ["step", *metrics], extrasaction="ignore", lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow({"step": step, **metrics})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class JSONL(Sink):
    """One JSON object a line: samples, the norm of every step, and events. What `gradfast plot` reads.

    Given a folder, the file is `monitor.jsonl` in it. Lines are appended, so that a resumed run goes on in the same
    file. NaN and infinity, for which JSON has no numbers, are the strings "nan", "inf" and "-inf".
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path if path.suffix in (".jsonl", ".json") else path / RECORD
        self._file = _open(self.path, "a")

    def put(self, content: Mapping[str, Any]) -> None:
        """One object of any content.

        Raises:
            UserError: the system would not write.
        """
        try:
            self._file.write(json.dumps(_plain(content)) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_failure(self.path, error) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.put({"step": step, **metrics})

    def history(self, first_step: int, norms: Sequence[float], coefficients: Sequence[float]) -> None:
        self.put({"history": first_step, "grad_norm": list(norms), "clip_coef": list(coefficients)})

    def event(self, event: Event) -> None:
        self.put({"event": event.to_dict()})

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that could not be written, and was told of
            self._file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class TensorBoard(Sink):
    """Scalars under the metrics' names, events as text.

    Args:
        purge_step: in a folder that has events already, hide those of this step and later: they will come again.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        require("tensorboard", "monitor", "the TensorBoard sink")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step) if on_first_rank() else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def event(self, event: Event) -> None:
        self._writer.add_text("events", event.message, event.step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB(Sink):
    """Metrics to the current Weights & Biases run, or to one that is started with the given options.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(self, **options: Any) -> None:
        self._wandb: Any = require("wandb", "wandb", "the Weights & Biases sink")
        self._own = self._wandb.run is None and on_first_rank()
        if self._own:
            self._wandb.init(**options)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._wandb.log(dict(metrics), step=step)

    def event(self, event: Event) -> None:
        if hasattr(self._wandb, "alert"):
            self._wandb.alert(title=f"gradfast: {event.rule}", text=event.message)

    def close(self) -> None:
        if self._own:
            self._wandb.finish()
