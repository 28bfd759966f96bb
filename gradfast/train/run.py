"""From the settings of a training run to its parts, and the run itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gradfast.errors import UserError
from gradfast.files import remove_temporaries
from gradfast.nn.sync_norm import synchronise_batch_norms
from gradfast.train.config import TrainConfig, make_config
from gradfast.train.lr_find import find_rate
from gradfast.train.machine.determinism import deterministic
from gradfast.train.machine.drawing import start_drawing
from gradfast.train.machine.place import Place, choose_device
from gradfast.train.machine.processes import World
from gradfast.train.machine.spread import Spread, choose_kind, spread
from gradfast.train.model.averaging import MovingAverage
from gradfast.train.model.compiling import compile_model
from gradfast.train.model.freeze import FrozenBackbone
from gradfast.train.model.optimizers import build_optimizer
from gradfast.train.results.checkpoint import finish_checkpoint
from gradfast.train.results.claim import Claims
from gradfast.train.results.curves import CURVES, draw_curves
from gradfast.train.results.history import STEPS, SUMMARY, read_csv
from gradfast.train.results.logs import require_loggers
from gradfast.train.results.output import check_output, run_name
from gradfast.train.results.progress import Silence, make_progress
from gradfast.train.results.report import describe_data
from gradfast.train.results.resume import check_same_run, find_resumed
from gradfast.train.spikes import build_guard
from gradfast.train.step import Learner
from gradfast.train.tasks import find_task
from gradfast.train.tasks.task import Objective, Task, TaskData
from gradfast.train.trainer import Trainer


def run(settings: dict[str, Any], world: World | None = None) -> int:
    """Train with the given settings; the others keep their defaults, or those of the run that is resumed.

    Args:
        world: the processes that all call this with the same settings.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped it (after saving).

    Raises:
        UserError: see the message; nothing is left half-written.
    """
    world = world or World()
    with make_progress() if world.is_main else Silence() as progress, Claims() as claims:
        # What concerns files is the main process's business; the others learn of it, and of what it fails with.
        resumed = world.from_main(find_resumed(settings, claims.take, progress.say) if world.is_main else None)
        config = make_config((resumed.settings if resumed else {}) | settings)
        output = resumed.output if resumed else (Path(config.output) if config.output else None)
        if resumed is None or output != resumed.folder:
            if output is not None and world.is_main:
                check_output(output)
        elif resumed.complete(config.epochs):
            if world.is_main:
                finish_folder(resumed.path, config)
            progress.say(f"{resumed.path} has all of its {config.epochs} epochs; --epochs with more continues it")
            return 0
        if config.lr_find and world.size > 1:
            raise UserError("--lr-find is for one process: leave out torchrun, and keep --batch-size, which is of all")
        require_loggers(config)
        kind = choose_kind(config.parallel, world, was_given="parallel" in settings)
        if kind == "fsdp" and config.on_spike == "rollback":
            raise UserError(
                "--on-spike rollback keeps whole copies of the model in memory, which --parallel fsdp is there to "
                "avoid; take --on-spike backoff, or --parallel ddp"
            )
        device = choose_device(config.device, world)
        task = find_task(config.task)
        data = task.build_data(config, progress.say)
        progress.say(describe_data(task, config, data))
        check_same_data(world, config, data)
        if resumed:
            check_same_run(resumed, config, data)
        with deterministic(config.deterministic):
            # A resumed run has its weights from the checkpoint: those that it began with may be gone.
            begin = dataclasses.replace(config, weights=None) if resumed else config
            learner = build_learner(task, begin, data, device, world, kind)
            if config.lr_find:
                return find_rate(config, data, learner, output, progress, claims, settings)
            return Trainer(task, config, data, learner, progress, claims).go(output, resumed)


def build_learner(
    task: Task,
    config: TrainConfig,
    data: TaskData,
    device: torch.device,
    world: World | None = None,
    kind: str = "none",
) -> Learner:
    """The model, drawn from the seed, and what trains it.

    Args:
        kind: how the model lies on the processes of `world`: "none", "ddp" or "fsdp".
    """
    world = world or World()
    torch.manual_seed(config.seed)
    place = Place.of(device, config.amp, config.channels_last)
    model = task.build_model(config, data).to(device)
    if kind != "fsdp":  # which cuts weights along their first dimension, and so as they lie by default
        model = model.to(memory_format=place.memory_format)
    if config.sync_bn and world.size > 1:
        synchronise_batch_norms(model)
    average = MovingAverage(model, config.model_ema_decay) if config.model_ema else None
    layout = spread(kind, model, world)
    if average is not None:
        layout.add(average.module)
    frozen = FrozenBackbone(model, config.freeze_backbone) if config.freeze_backbone else None
    if config.compile != "off":
        compile_model(model, config.compile, device)
    objective = task.build_objective(config, data, place)
    check_batch_size(layout, objective, config)
    optimizer = build_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    start_drawing(world, config.seed)
    return Learner(
        model=model,
        objective=objective,
        optimizer=optimizer,
        scaler=scaler,
        place=place,
        average=average,
        frozen=frozen,
        guard=build_guard(config, model, optimizer, scaler, average),
        refuse_nonfinite=config.nonfinite == "raise",
        spread=layout,
    )


def check_batch_size(layout: Spread, objective: Objective, config: TrainConfig) -> None:
    """Raises:
    UserError: a batch, or a process's part of one, is too small.
    """
    fewest, size = layout.fewest(objective), layout.world.size
    if config.batch_size >= size * fewest:
        return
    if size == 1:
        raise UserError(
            f"--batch-size {config.batch_size}: batch norms need {fewest} images; give {fewest} or more, or take "
            "--norm group (--grad-accum averages the gradients of small batches)"
        )
    why = ", as batch norms need two; or share them with --sync-bn" if fewest > 1 else ""
    raise UserError(
        f"--batch-size {config.batch_size} is split over {size} processes: give {size * fewest} or more{why}"
    )


def check_same_data(world: World, config: TrainConfig, data: TaskData) -> None:
    """Raises:
    UserError: the processes, on different machines perhaps, do not see the same images.
    """
    prints = world.gather(data.fingerprint())
    others = [rank for rank, print in enumerate(prints) if print != prints[0]]
    if others:
        raise UserError(
            f"--data {config.data}: process {others[0]} finds other images there than process 0; give every machine "
            "the same files"
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
