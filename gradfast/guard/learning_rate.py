"""Learning rates that draw back after a bad step and come back, whatever schedule they follow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch.optim import Optimizer


@dataclass(frozen=True)
class BackOff:
    """A factor on every learning rate that falls with each bad step and recovers over the good ones.

        bad step:    factor <- max(floor, factor * fall)
        good step:   factor <- min(1, factor * fall^(-1 / recovery))

    so that one fall is made good in `recovery` good steps.

    Args:
        fall: what a bad step multiplies the factor with, above 0 and below 1.
        recovery: good steps that make one fall good again.
        floor: the factor never falls below it.
    """

    fall: float = 0.5
    recovery: int = 100
    floor: float = 0.01

    def __post_init__(self) -> None:
        if not (0 < self.fall < 1 and self.recovery >= 1 and 0 < self.floor <= 1):
            raise ValueError(f"Invalid {self}: fall must be in (0, 1), recovery at least 1, floor in (0, 1]")


@dataclass(frozen=True)
class Rewarm:
    """A linear warm-up after a burst of skipped steps or a roll-back: factors 1/steps, 2/steps ... 1.

    Args:
        steps: its length; 0 for none.
        burst: how many steps must be skipped in a row to set it off.
    """

    steps: int = 50
    burst: int = 5

    def __post_init__(self) -> None:
        if self.steps < 0 or self.burst < 1:
            raise ValueError(f"Invalid {self}: steps must be at least 0, burst at least 1")


class LearningRateGuard:
    """Both together: one factor, put on the learning rates for the time of a step.

    The groups' `lr` are as the scheduler left them before and after: it never sees the factor.
    """

    def __init__(self, optimizer: Optimizer, back_off: BackOff | None, rewarm: Rewarm | None) -> None:
        self.optimizer, self.back_off, self.rewarm = optimizer, back_off, rewarm
        self.fallen = 1.0  # the back-off's factor
        self.warm_steps = 0  # steps that the warm-up under way still takes
        self.skipped_in_a_row = 0

    @property
    def factor(self) -> float:
        """What the next step's learning rates are multiplied with."""
        if self.rewarm is None or self.warm_steps == 0:
            return self.fallen
        return self.fallen * (self.rewarm.steps - self.warm_steps + 1) / self.rewarm.steps

    def step_was(self, bad: bool, skipped: bool) -> None:
        """Take note of a step: whether it was bad, and whether it changed anything."""
        if self.back_off is not None:
            if bad:
                self.fallen = max(self.back_off.floor, self.fallen * self.back_off.fall)
            else:
                self.fallen = min(1.0, self.fallen * self.back_off.fall ** (-1 / self.back_off.recovery))
        if skipped:
            self.skipped_in_a_row += 1
            if self.rewarm is not None and self.skipped_in_a_row == self.rewarm.burst:
                self.warm_up()
            return
        self.skipped_in_a_row = 0
        self.warm_steps = max(0, self.warm_steps - 1)

    def warm_up(self) -> None:
        """Begin a warm-up with the next step that is not skipped."""
        if self.rewarm is not None:
            self.warm_steps = self.rewarm.steps

    @contextlib.contextmanager
    def lowered(self) -> Iterator[None]:
        """The learning rates times the factor, for the time of the block."""
        factor = self.factor
        if factor == 1.0:
            yield
            return
        before = [group["lr"] for group in self.optimizer.param_groups]
        try:
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * factor  # a tensor's successor is a new tensor: the old one keeps its value
            yield
        finally:
            for group, lr in zip(self.optimizer.param_groups, before, strict=True):
                group["lr"] = lr

    def state_dict(self) -> dict[str, float]:
        return {"fallen": self.fallen, "warm_steps": self.warm_steps, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.fallen = float(state["fallen"])
        self.warm_steps, self.skipped_in_a_row = int(state["warm_steps"]), int(state["skipped_in_a_row"])
