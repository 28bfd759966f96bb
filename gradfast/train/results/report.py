"""The lines that a run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gradfast.train.config import TrainConfig
from gradfast.train.data.reading import usable_cores
from gradfast.train.model.build import count_parameters
from gradfast.train.model.clipping import describe_clipping
from gradfast.train.results.history import SUMMARY
from gradfast.train.results.progress import duration
from gradfast.train.results.resume import Resumed
from gradfast.train.step import Learner
from gradfast.train.stopwatch import PHASES
from gradfast.train.tasks.task import Task, TaskData

WAITING = 0.25  # a share of the time above which images come too slowly
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
    if learner.spread.world.size > 1:
        place += f", in {learner.spread.world.size} processes ({learner.spread.kind})"
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
        f"clipped {row['clip_fraction']:.0%}{skipped}{unreadable}  {row['images_per_s']:.0f} images/s "
        f"({describe_shares([row])})  {row['seconds']:.0f} s"
    )


def describe_shares(summary: Sequence[Mapping[str, Any]]) -> str:
    """What each phase took of the time of the steps, over some epochs."""
    total = sum(row["seconds"] for row in summary) or 1.0
    shares = {phase: sum(row[f"{phase}_share"] * row["seconds"] for row in summary) / total for phase in PHASES}
    return ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items())


def advise_loading(row: Mapping[str, Any], config: TrainConfig, workers: int) -> str | None:
    """What to change where training waits for images; None where it does not."""
    if not row["data_share"] > WAITING:
        return None
    ways = []
    if workers < usable_cores():
        ways.append(f"--workers {min(usable_cores(), max(2, 2 * workers))} (now {workers})")
    if config.augment != "crop" and config.cache != "on":
        ways.append("--cache on, where memory holds the decoded images")
    ways.append(f"smaller files (the model sees {config.img_size} pixels)")
    return (
        f"advice     {row['data_share']:.0%} of the time went by waiting for images, so a faster device or step would "
        f"change little; try {', or '.join(ways)}"
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
            f"time       {describe_shares(summary)} of the steps",
            f"results    {folder / SUMMARY}, curves.png, last.pt, best.pt",
        ]
    )
