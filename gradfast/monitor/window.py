"""The steps since the last sample: packed into one tensor on the device, and unpacked on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StepNorms:
    """Of one step, on the device.

    Attributes:
        grad_norm: global, before clipping, of the true gradients.
        clip_coef: the factor from it; NaN where it is not known.
        sums: float64, per parameter: sums of |g|^p of the gradients in memory.
        memory: float64: what the policy that clips each parameter remembered before the step; mostly empty.
        group_limits: a parameter group's own `max_norm`, infinity where it has none; empty where no group has.
    """

    grad_norm: Tensor
    clip_coef: Tensor
    sums: Tensor
    memory: Tensor
    group_limits: Sequence[float] = ()


@dataclass
class StepNumbers:
    """The same on the host."""

    grad_norm: float
    clip_coef: float
    sums: list[float]
    memory: list[float]
    group_limits: Sequence[float]


def pack(steps: Sequence[StepNorms]) -> Tensor:
    """All of the steps' numbers, float64, in three launches whatever their count."""
    scalars = torch.stack([column for step in steps for column in (step.grad_norm, step.clip_coef)])
    return torch.cat([scalars, *(step.sums for step in steps), *(step.memory for step in steps)])


def unpack(
    numbers: Sequence[float], steps: Sequence[StepNorms], parameters: int
) -> tuple[list[StepNumbers], Sequence[float]]:
    """Take the numbers apart again; returns the steps', and what came behind them."""
    count, remembered = len(steps), len(steps[0].memory) if steps else 0
    sums, memory = 2 * count, 2 * count + count * parameters
    found = [
        StepNumbers(
            numbers[2 * i],
            numbers[2 * i + 1],
            list(numbers[sums + i * parameters :][:parameters]),
            list(numbers[memory + i * remembered :][:remembered]),
            step.group_limits,
        )
        for i, step in enumerate(steps)
    ]
    return found, numbers[memory + count * remembered :]
