"""The learning rate as a function of the step number.

Being a function and not a recurrence, it has no state to save: a resumed run is at the right rate because it is at
the right step, and a run resumed with more epochs follows the longer curve from there.
"""

from __future__ import annotations

import math
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
        name: one-cycle, cosine, linear, step or constant.
        lr: peak rate.
        steps: optimiser steps of the whole run.
        warmup: steps over which the rate rises; 0 leaves one-cycle its 30 % and the others no rise.
        decay_steps, decay_rate: for `step`, the factor and how often it applies.
    """

    name: str
    lr: float
    steps: int
    warmup: int = 0
    decay_steps: int = 1
    decay_rate: float = 0.1

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
    )
