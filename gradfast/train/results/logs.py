"""``--log``: steps, epochs and events of a run as JSON lines, to TensorBoard, to Weights & Biases."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradfast.extras import require
from gradfast.files import atomic_write
from gradfast.monitor.events import Event
from gradfast.monitor.sinks import JSONL, Sink, TensorBoard, WandB
from gradfast.train.config import TrainConfig

LOG = "log.jsonl"
WANDB_ID = "wandb-id.txt"
_NOT_METRICS = ("epoch", "step", "images", "seconds")


def require_loggers(config: TrainConfig) -> None:
    """Raises:
    UserError: a package that ``--log`` asks for is not installed.
    """
    kinds = config.log.split(",")
    if "tensorboard" in kinds:
        require("tensorboard", "monitor", "--log tensorboard")
    if "wandb" in kinds:
        require("wandb", "wandb", "--log wandb")


class RunLog:
    """What happens in a run, step by step, to the sinks of ``--log``.

    Steps and epochs share one axis, the optimiser's steps. A resumed run goes on in the same logs: what they hold
    beyond its checkpoint is cut from the JSON lines, hidden by TensorBoard (`purge_step`), and not taken twice by W&B.
    """

    def __init__(self) -> None:
        self.sinks: list[Sink] = []

    def open(self, folder: Path, source: Path | None, steps: int, epochs: int, config: TrainConfig) -> None:
        """Begin, or go on.

        Args:
            source: the folder of the run that is resumed, or None.
            steps, epochs: how many of them are done.
        """
        kinds = config.log.split(",")
        if "jsonl" in kinds:
            trim(folder / LOG, source / LOG if source else None, steps, epochs)
            self.sinks.append(JSONL(folder / LOG))
        if "tensorboard" in kinds:
            self.sinks.append(TensorBoard(folder, purge_step=steps + 1 if source == folder else None))
        if "wandb" in kinds:
            self.sinks.append(open_wandb(folder, config))

    def steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows as steps.csv has them.

        They become ``train/loss``, ``train/grad_norm`` before clipping and ``train/grad_norm_clipped`` after it,
        ``train/images_per_s`` ...
        """
        for row in rows:
            metrics = {f"train/{name}": value for name, value in row.items() if name not in _NOT_METRICS}
            metrics["train/grad_norm_clipped"] = row["grad_norm"] * row["clip_coef"]
            metrics["train/images_per_s"] = row["images"] / row["seconds"] if row["seconds"] > 0 else 0.0
            for sink in self.sinks:
                sink.write(row["step"], metrics)
        for sink in self.sinks:
            sink.flush()

    def epoch(self, step: int, row: Mapping[str, Any]) -> None:
        """A row as summary.csv has it: ``epoch/eval_loss`` ..., at the epoch's last step."""
        for sink in self.sinks:
            sink.write(step, {f"epoch/{name}": value for name, value in row.items()})
            sink.flush()

    def event(self, event: Event) -> None:
        for sink in self.sinks:
            sink.event(event)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def trim(path: Path, source: Path | None, steps: int, epochs: int) -> None:
    """Make `path` hold the lines of `source` up to so many steps and epochs; without a source nothing."""
    kept = []
    if source is not None and source.is_file():
        for line in source.read_text(encoding="utf-8").splitlines():
            try:
                content = json.loads(line)
                step = content["step"] if "step" in content else content["event"]["step"]
            except (ValueError, TypeError, KeyError):
                continue  # cut short when the run was killed
            if step <= steps and content.get("epoch/epoch", 0) <= epochs:
                kept.append(line + "\n")
    with atomic_write(path) as file:
        file.write("".join(kept).encode())


def open_wandb(folder: Path, config: TrainConfig) -> WandB:
    """A run of W&B whose name stays in the folder, so that a resumed one is the same; the project is W&B's to know."""
    require("wandb", "wandb", "--log wandb")
    path = folder / WANDB_ID
    if not path.is_file():
        with atomic_write(path) as file:
            file.write(secrets.token_hex(4).encode())
    name = path.read_text().strip()
    return WandB(dir=str(folder), id=name, resume="allow", name=folder.name, config=config.to_dict())
