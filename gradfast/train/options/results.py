"""What a run writes, and what it goes on from."""

from __future__ import annotations

import dataclasses

from gradfast.train import parse
from gradfast.train.options.field import option


@dataclasses.dataclass(frozen=True)
class ResultsOptions:
    """The settings of the group `results`."""

    resume: str | None = option(
        None,
        parse.text,
        "results",
        "continue a run exactly where it stopped: its folder, its name in runs/, a checkpoint, or auto for the newest "
        "sound checkpoint of --output or of runs/; flags given beside it override the saved settings",
        "RUN|auto",
    )
    save_every_steps: int = option(
        0,
        parse.natural,
        "results",
        "also write last.pt after every so many optimiser steps, so that a power cut loses no more (default: after "
        "epochs only)",
        "N",
    )
    keep: int = option(
        0,
        parse.natural,
        "results",
        "keep the newest K checkpoints as step-N.pt too, for --resume auto to fall back on and for you to go back to",
        "K",
    )
    log: str = option(
        "csv",
        parse.some_of("csv", "jsonl", "tensorboard", "wandb"),
        "results",
        "where steps, epochs and events go besides the tables, with commas between: jsonl (log.jsonl), tensorboard "
        "(into the run folder), wandb; a resumed run goes on in the same ones",
        "KIND,...",
    )
    monitor_every: int = option(
        0,
        parse.natural,
        "results",
        "watch the layers: norms, update-to-weight ratios and events into monitor.jsonl, with a sample every so many "
        "steps; gradfast plot draws them (default: not)",
        "N",
    )
    output: str | None = option(
        None,
        parse.text,
        "results",
        "folder for the results; must not exist or be empty (default: runs/MODEL-DATA-N, a new one)",
        "FOLDER",
    )
