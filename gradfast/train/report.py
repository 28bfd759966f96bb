"""The lines that a run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gradfast.train.clipping import describe_clipping
from gradfast.train.config import TrainConfig
from gradfast.train.data import Data
from gradfast.train.history import SUMMARY
from gradfast.train.metrics import majority_share
from gradfast.train.models import count_parameters
from gradfast.train.progress import duration
from gradfast.train.resume import Resumed
from gradfast.train.step import Learner

NAMED_AT_MOST = 10  # bad files in the terminal; all of them are in skipped_images.txt


def describe_data(config: TrainConfig, data: Data) -> str:
    """How many images of which class, and which files were left out."""
    lines = []
    for bad in data.bad[:NAMED_AT_MOST]:
        lines.append(f"skipped {bad.path}: {bad.reason}")
    if len(data.bad) > NAMED_AT_MOST:
        lines.append(f"skipped {len(data.bad) - NAMED_AT_MOST} more, listed in skipped_images.txt")
    train, held_out = data.train.listing.counts(), data.evaluation.listing.counts()
    classes = list(zip(data.classes, train, held_out))
    shown = ", ".join(f"{name} {n} + {m}" for name, n, m in classes[:8]) + (" ..." if len(classes) > 8 else "")
    left_out = f"; {len(data.bad)} files skipped" if data.bad else ""
    lines.append(
        f"data       {config.data}: {sum(train)} training + {sum(held_out)} held-out images of {len(classes)} classes "
        f"({shown}){left_out}"
    )
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


def describe_epoch(row: Mapping[str, Any], epochs: int, late_bad: int) -> str:
    """One line per epoch."""
    skipped = f"  skipped steps {row['skipped_steps']}" if row["skipped_steps"] else ""
    unreadable = f"  unreadable files {late_bad}" if late_bad else ""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.3f}  "
        f"held out: loss {row['eval_loss']:.3f}  accuracy {row['eval_acc1']:.3f}  "
        f"balanced {row['eval_balanced_acc']:.3f}  norm {row['grad_norm']:.3g} (max {row['grad_norm_max']:.3g})  "
        f"clipped {row['clip_fraction']:.0%}{skipped}{unreadable}  {row['images_per_s']:.0f} images/s  "
        f"{row['seconds']:.0f} s"
    )


def describe_result(
    summary: Sequence[Mapping[str, Any]], best: tuple[int, float], data: Data, folder: Path, seconds: float
) -> str:
    """What came out, beside what guessing would have given."""
    last = summary[-1]
    counts = data.evaluation.listing.counts()
    commonest = data.classes[counts.index(max(counts))]
    return "\n".join(
        [
            f"done       {len(summary)} epochs; {duration(seconds)}",
            f"last       accuracy {last['eval_acc1']:.3f}, balanced accuracy {last['eval_balanced_acc']:.3f}",
            f"best       balanced accuracy {best[1]:.3f} in epoch {best[0]} (chosen on the held-out images themselves, "
            "so a little flattering)",
            f"guessing   accuracy {majority_share(counts):.3f} (always {commonest!r}), balanced accuracy "
            f"{1 / len(counts):.3f}",
            f"results    {folder / SUMMARY}, curves.png, last.pt, best.pt",
        ]
    )
