"""From the settings of a training run to its parts, and the run itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gradfast.files import remove_temporaries
from gradfast.train.averaging import MovingAverage
from gradfast.train.checkpoint import finish_checkpoint
from gradfast.train.claim import Claims
from gradfast.train.compiling import compile_model
from gradfast.train.config import TrainConfig, make_config
from gradfast.train.curves import CURVES, draw_curves
from gradfast.train.determinism import deterministic
from gradfast.train.freeze import FrozenBackbone
from gradfast.train.history import STEPS, SUMMARY, read_csv
from gradfast.train.logs import require_loggers
from gradfast.train.lr_find import find_rate
from gradfast.train.optimizers import build_optimizer
from gradfast.train.output import check_output, run_name
from gradfast.train.place import AMP_TYPES, Place, choose_device
from gradfast.train.progress import make_progress
from gradfast.train.report import describe_data
from gradfast.train.resume import check_same_run, find_resumed
from gradfast.train.spikes import build_guard
from gradfast.train.step import Learner
from gradfast.train.tasks import find_task
from gradfast.train.tasks.task import Task, TaskData
from gradfast.train.trainer import Trainer


def run(settings: dict[str, Any]) -> int:
    """Train with the given settings; the others keep their defaults, or those of the run that is resumed.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped it (after saving).

    Raises:
        UserError: see the message; nothing is left half-written.
    """
    with make_progress() as progress, Claims() as claims:
        resumed = find_resumed(settings, claims.take, progress.say)
        config = make_config((resumed.settings if resumed else {}) | settings)
        output = resumed.output if resumed else (Path(config.output) if config.output else None)
        if resumed is None or output != resumed.folder:
            if output is not None:
                check_output(output)
        elif resumed.complete(config.epochs):
            finish_folder(resumed.path, config)
            progress.say(f"{resumed.path} has all of its {config.epochs} epochs; --epochs with more continues it")
            return 0
        require_loggers(config)
        device = choose_device(config.device)
        task = find_task(config.task)
        data = task.build_data(config, progress.say)
        progress.say(describe_data(task, config, data))
        if resumed:
            check_same_run(resumed, config, data)
        with deterministic(config.deterministic):
            # A resumed run has its weights from the checkpoint: those that it began with may be gone.
            begin = dataclasses.replace(config, weights=None) if resumed else config
            learner = build_learner(task, begin, data, device)
            if config.lr_find:
                return find_rate(config, data, learner, output, progress, claims, settings)
            return Trainer(task, config, data, learner, progress, claims).go(output, resumed)


def build_learner(task: Task, config: TrainConfig, data: TaskData, device: torch.device) -> Learner:
    """The model, drawn from the seed, and what trains it."""
    torch.manual_seed(config.seed)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    place = Place(device, AMP_TYPES[config.amp], memory_format)
    model = task.build_model(config, data).to(device).to(memory_format=memory_format)
    frozen = FrozenBackbone(model, config.freeze_backbone) if config.freeze_backbone else None
    average = MovingAverage(model, config.model_ema_decay) if config.model_ema else None
    if config.compile != "off":
        compile_model(model, config.compile, device)
    optimizer = build_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    return Learner(
        model=model,
        objective=task.build_objective(config, data, place),
        optimizer=optimizer,
        scaler=scaler,
        place=place,
        average=average,
        frozen=frozen,
        guard=build_guard(config, model, optimizer, scaler, average),
        refuse_nonfinite=config.nonfinite == "raise",
    )


def finish_folder(checkpoint: Path, config: TrainConfig) -> None:
    """Do what a run that was killed with, or after, its last checkpoint had left to do."""
    folder = checkpoint.parent
    remove_temporaries(folder)
    curves, summary, steps = folder / CURVES, read_csv(folder / SUMMARY), read_csv(folder / STEPS)
    if steps:
        finish_checkpoint(checkpoint, int(steps[-1]["step"]), config.keep)
    if summary and not (curves.is_file() and curves.stat().st_mtime_ns >= (folder / SUMMARY).stat().st_mtime_ns):
        panels = find_task(config.task).panels
        draw_curves(folder, summary, panels, config.clip_grad, run_name(config.model, config.data))
