"""The learning rate as a function of the step number.

Being a function and not a recurrence, it has no state to save: a resumed run is at the right rate because it is at
the right step, and a run resumed with more epochs follows the longer curve from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradfast.train.config import TrainConfig

ONE_CYCLE_RISE = 0.3  # share of the run in which the rate rises (Smith and Topin 2018; torch's default)
ONE_CYCLE_START = 1 / 25  # of the peak
ONE_CYCLE_END = ONE_CYCLE_START * 1e-4


def cosine_between(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Schedule:
    """rate(t) = lr * shape(t) for the steps t = 0 ... steps - 1.

    Attributes:
        name: one-cycle, cosine, linear, poly, step, multistep, plateau or constant.
        lr: peak rate.
        steps: optimiser steps of the whole run.
        warmup: steps over which the rate rises; 0 leaves one-cycle its 30 % and the others no rise.
        decay_steps, decay_rate: for `step`, how often the factor applies, and the factor.
        milestones: for `multistep`, the steps from which on the factor applies once more each.
        power: for `poly`.
        drops: for `plateau`, how often the factor applies now: see `count_drops`.
    """

    name: str
    lr: float
    steps: int
    warmup: int = 0
    decay_steps: int = 1
    decay_rate: float = 0.1
    milestones: tuple[int, ...] = ()
    power: float = 0.9
    drops: int = 0

    def rate(self, step: int) -> float:
        return self.lr * self.shape(step)

    def shape(self, step: int) -> float:
        """The factor at a step, from 0 to 1."""
        if self.name == "one-cycle":
            return self.one_cycle(step)
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        if self.name == "cosine":  # Loshchilov and Hutter 2017, without restarts
            return cosine_between(1.0, 0.0, progress)
        if self.name == "linear":
            return 1.0 - progress
        if self.name == "poly":
            return (1.0 - progress) ** self.power
        if self.name == "multistep":
            return self.decay_rate ** sum(step >= milestone for milestone in self.milestones)
        if self.name == "plateau":
            return self.decay_rate**self.drops
        if self.name == "step":
            return self.decay_rate ** (step // self.decay_steps)
        if self.name == "constant":
            return 1.0
        raise ValueError(f"unknown schedule {self.name!r}")

    def one_cycle(self, step: int) -> float:
        rise = self.warmup or round(ONE_CYCLE_RISE * self.steps)
        if step < rise:
            return cosine_between(ONE_CYCLE_START, 1.0, step / rise)
        return cosine_between(1.0, ONE_CYCLE_END, min(1.0, (step - rise) / max(1, self.steps - 1 - rise)))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rate of every parameter group for this step, and return it."""
        rate = self.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate


def build_schedule(config: TrainConfig, steps_per_epoch: int) -> Schedule:
    assert config.lr is not None
    return Schedule(
        name=config.sched,
        lr=config.lr,
        steps=config.epochs * steps_per_epoch,
        warmup=round(config.warmup_epochs * steps_per_epoch),
        decay_steps=config.decay_epochs * steps_per_epoch,
        decay_rate=config.decay_rate,
        milestones=tuple(int(epoch) * steps_per_epoch for epoch in config.decay_milestones.split(",")),
        power=config.poly_power,
    )


def count_drops(losses: Sequence[float], patience: int) -> int:
    """How often the rate has dropped on a plateau, after epochs with these held-out losses.

    It drops when more than `patience` epochs in a row have not brought the loss a ten-thousandth below the lowest one,
    and then waits as long again: torch's ReduceLROnPlateau with its defaults.
    """
    lowest, waited, drops = math.inf, 0, 0
    for loss in losses:
        if loss < lowest * (1 - 1e-4):
            lowest, waited = loss, 0
        else:
            waited += 1
        if waited > patience:
            drops, waited = drops + 1, 0
    return drops
