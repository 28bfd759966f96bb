"""What is done against the explosion: torch's own clipping, and each of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from task import Task
from torch import Tensor, nn

import gradfast
from gradfast.clip import AGC, AdaGC, AutoClip, Chain, GlobalNorm, Policy, SkipSpikes, ZClip
from gradfast.guard import Guard, SnapshotRing


@dataclass
class Stepper:
    """An optimiser, and what one step of it is, given the loss."""

    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor], None]


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


def ours(
    clip: Callable[[Task], Policy] | None = None, mended: bool = False, guarded: bool = False
) -> Callable[[Task], Stepper]:
    """gradfast's optimiser, with a clip policy, with the scenario's own cure, under a guard."""

    def prepare(task: Task) -> Stepper:
        arguments: dict[str, Any] = task.options if clip is None else {**task.options, "clip": clip(task)}
        parameters: Any = task.model.named_parameters()
        if mended and task.mend is not None:
            task.mend(task.model)
            arguments = {**arguments, **task.mend_options}
            parameters = task.model.named_parameters() if task.mend_groups is None else task.mend_groups(task.model)
        optimizer = getattr(gradfast, task.optimizer)(parameters, **arguments)
        if not guarded:
            return Stepper(optimizer, lambda loss: optimizer.step())
        # A limit of 1 clips most steps of some tasks, by a factor of thousands under a wrong loss scale: that alone is
        # no reason to draw back. Skipped steps and a loss that leaves its course are.
        guard = Guard(optimizer, model=task.model, snapshots=SnapshotRing(every=10), clipped_below=1e-9)
        return Stepper(optimizer, lambda loss: guard.step(loss if task.loss_tells else None))

    return prepare


def global_norm(task: Task) -> Policy:
    return GlobalNorm(task.max_norm)


def chain(task: Task) -> Policy:
    return Chain(SkipSpikes(window=32), ZClip(warmup=10), GlobalNorm(task.max_norm))


# Windows and warm-ups are shortened to suit runs of a hundred steps.
CURES: dict[str, Cure] = {
    "torch": Cure("torch", plain_torch),
    "torch_clip": Cure("torch + clip", torch_clipped),
    "skip": Cure("skip NaN", ours()),
    "max_norm": Cure("max_norm", ours(global_norm)),
    "skip_spikes": Cure("SkipSpikes", ours(lambda task: SkipSpikes(window=32))),
    "zclip": Cure("ZClip", ours(lambda task: ZClip(warmup=10))),
    "auto_clip": Cure("AutoClip", ours(lambda task: AutoClip())),
    "ada_gc": Cure("AdaGC", ours(lambda task: AdaGC(warmup=20))),
    # The paper's 0.01 is for batches of a thousand and more; it asks for more with small ones.
    "agc": Cure("AGC", ours(lambda task: AGC(clipping=0.1))),
    "guard": Cure("guard", ours(global_norm, guarded=True)),
    "model": Cure("model", ours(mended=True)),
    "all": Cure("all", ours(chain, mended=True, guarded=True)),
}
