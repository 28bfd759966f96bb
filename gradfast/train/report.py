"""The lines that a run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gradfast.train.clipping import describe_clipping
from gradfast.train.config import TrainConfig
from gradfast.train.history import SUMMARY
from gradfast.train.models import count_parameters
from gradfast.train.progress import duration
from gradfast.train.resume import Resumed
from gradfast.train.step import Learner
from gradfast.train.tasks.task import Task, TaskData

NAMED_AT_MOST = 10  # bad files in the terminal; all of them are in skipped_images.txt


def describe_data(task: Task, config: TrainConfig, data: TaskData) -> str:
    """What there is to learn from, and which files were left out."""
    lines = []
    for bad in data.bad[:NAMED_AT_MOST]:
        lines.append(f"skipped {bad.path}: {bad.reason}")
    if len(data.bad) > NAMED_AT_MOST:
        lines.append(f"skipped {len(data.bad) - NAMED_AT_MOST} more, listed in skipped_images.txt")
    left_out = f"; {len(data.bad)} files skipped" if data.bad else ""
    lines.append(f"data       {config.data}: {task.describe_data(config, data)}{left_out}")
    return "\n".join(lines)


def describe_setup(config: TrainConfig, learner: Learner, folder: Path, resumed: Resumed | None) -> str:
    """What is trained, how, and where the results go."""
    place = f"cpu, {torch.get_num_threads()} threads" if learner.device.type == "cpu" else str(learner.device)
    lines = [
        f"model      {config.model}, {count_parameters(learner.model) / 1e6:.1f} M parameters, on {place}",
        f"optimiser  gradfast.{type(learner.optimizer).__name__}, {describe_clipping(config)}; lr {config.lr:g} "
        f"{config.sched}, batch {config.batch_size * config.grad_accum}, {config.epochs} epochs",
        f"results    {folder}",
    ]
    if resumed:
        position = resumed.state["position"]
        changed = f", with {', '.join(resumed.changed)}" if resumed.changed else ""
        lines.append(
            f"resumed    {resumed.path} after {position['epoch']} epochs, {position['batch']} batches{changed}"
        )
    return "\n".join(lines)


def describe_epoch(task: Task, row: Mapping[str, Any], epochs: int, late_bad: int, blame: str = "") -> str:
    """One line per epoch.

    Args:
        late_bad: files that turned out unreadable.
        blame: the losses behind skipped steps, in brackets.
    """
    skipped = f"  skipped steps {row['skipped_steps']}{blame}" if row["skipped_steps"] else ""
    unreadable = f"  unreadable files {late_bad}" if late_bad else ""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.3f}  "
        f"held out: {task.describe_evaluation(row)}  norm {row['grad_norm']:.3g} (max {row['grad_norm_max']:.3g})  "
        f"clipped {row['clip_fraction']:.0%}{skipped}{unreadable}  {row['images_per_s']:.0f} images/s  "
        f"{row['seconds']:.0f} s"
    )


def describe_result(
    task: Task,
    summary: Sequence[Mapping[str, Any]],
    best: tuple[int, float],
    data: TaskData,
    folder: Path,
    seconds: float,
) -> str:
    """What came out, beside what can be had without learning."""
    return "\n".join(
        [
            f"done       {len(summary)} epochs; {duration(seconds)}",
            *task.describe_result(summary, best, data),
            f"results    {folder / SUMMARY}, curves.png, last.pt, best.pt",
        ]
    )
