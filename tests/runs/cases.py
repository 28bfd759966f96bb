"""Run folders as gradfast train leaves them, written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradfast.train.results.history import STEP_COLUMNS, to_csv

SETTINGS = {"model": "resnet50", "data": "elpv", "epochs": 3, "lr": 0.05, "clip_grad": 1.0, "seed": 0}


def epoch_row(epoch: int, score: float, **values: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "train_loss": 1 / epoch,
        "eval_loss": 0.5,
        "eval_acc1": 0.75,
        "eval_balanced_acc": score,
        "lr": 0.01,
        "grad_norm": 2.0,
        "grad_norm_max": 10.0 * epoch,
        "clip_fraction": 0.5,
        "skipped_steps": 1,
        "images_per_s": 100.0,
        "seconds": 40.0,
        **values,
    }


def write_run(folder: Path, scores: Sequence[float], **settings: Any) -> Path:
    """A run with an epoch for each score (its balanced accuracy), two steps each, of three epochs planned."""
    folder.mkdir(parents=True)
    lines = [f"{name}: {value}\n" for name, value in (SETTINGS | settings).items()]
    (folder / "config.yaml").write_text("# gradfast\n" + "".join(lines))
    rows = [epoch_row(number, score) for number, score in enumerate(scores, start=1)]
    (folder / "summary.csv").write_text(to_csv(epoch_row(1, 0.0), rows))
    steps = [
        (epoch, 2 * epoch - 1 + half, 1 / epoch, 4.0, 0.25, 0.01, 8, 1.5)
        for epoch in range(1, len(rows) + 1)
        for half in (0, 1)
    ]
    (folder / "steps.csv").write_text(to_csv(STEP_COLUMNS, [dict(zip(STEP_COLUMNS, step)) for step in steps]))
    return folder
