"""What is done against the explosion: torch's own clipping, and each of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from task import Task
from torch import Tensor, nn

import gradfast


@dataclass
class Stepper:
    """An optimiser, and what one step of it is."""

    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor], None]
    owns_rate: bool = False  # whether the cure moves the learning rate itself


@dataclass
class Cure:
    """A column of the table: `prepare` mends the model where it does, and makes the stepper."""

    label: str
    prepare: Callable[[Task], Stepper]


def plain_torch(task: Task) -> Stepper:
    optimizer = getattr(torch.optim, task.optimizer)(task.model.parameters(), **task.options)
    return Stepper(optimizer, lambda loss: optimizer.step())


def torch_clipped(task: Task) -> Stepper:
    optimizer = getattr(torch.optim, task.optimizer)(task.model.parameters(), **task.options)

    def step(loss: Tensor) -> None:
        nn.utils.clip_grad_norm_(task.model.parameters(), task.max_norm)
        optimizer.step()

    return Stepper(optimizer, step)


def ours(mended: bool = False, **make: Callable[[Task], Any]) -> Callable[[Task], Stepper]:
    """gradfast's optimiser with arguments that may depend on the task."""

    def prepare(task: Task) -> Stepper:
        if mended and task.mend is not None:
            task.mend(task.model)
        arguments = {name: value(task) for name, value in make.items()}
        optimizer = getattr(gradfast, task.optimizer)(task.model.named_parameters(), **task.options, **arguments)
        return Stepper(optimizer, lambda loss: optimizer.step())

    return prepare


CURES: dict[str, Cure] = {
    "torch": Cure("torch", plain_torch),
    "torch_clip": Cure("torch + clip", torch_clipped),
    "skip": Cure("skip NaN", ours()),
    "max_norm": Cure("max_norm", ours(max_norm=lambda task: task.max_norm)),
    "model": Cure("model", ours(mended=True)),
    "all": Cure("all", ours(mended=True, max_norm=lambda task: task.max_norm)),
}
