"""One optimiser step: everything of it that touches the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfast.guard import Guard
from gradfast.optim.base import ClippedOptimizer
from gradfast.train.machine.place import Place
from gradfast.train.machine.processes import World
from gradfast.train.machine.spread import Spread
from gradfast.train.model.averaging import MovingAverage
from gradfast.train.model.freeze import FrozenBackbone
from gradfast.train.model.optimizers import restore_optimizer
from gradfast.train.stopwatch import Stopwatch
from gradfast.train.tasks.task import AnyBatch, Objective


class StepResult(NamedTuple):
    """Mean loss, gradient norm before clipping, clip coefficient and parts of the loss: 0-d tensors, on the device."""

    loss: Tensor
    grad_norm: Tensor
    clip_coef: Tensor
    images: int
    components: Mapping[str, Tensor]


class NonFiniteLossError(Exception):
    """Named parts of the loss are NaN or infinite."""


@dataclass
class Learner:
    """A model with what trains it.

    Attributes:
        objective: makes losses of batches.
        scaler: scales the loss under fp16, does nothing otherwise.
        average: moving average of the model, which is the one that is measured, or None.
        frozen: what of the model does not learn, in some epochs or all of them, or None.
        guard: does the optimiser's steps, and what is to be done when one is bad, or None.
        refuse_nonfinite: whether a NaN or infinite part of the loss raises; waits for the device at each step.
        spread: how the model lies on the processes of the run; by default on this one alone.
    """

    model: nn.Module
    objective: Objective
    optimizer: ClippedOptimizer
    scaler: torch.amp.GradScaler
    place: Place
    average: MovingAverage | None = None
    frozen: FrozenBackbone | None = None
    guard: Guard | None = None
    refuse_nonfinite: bool = False
    spread: Spread = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.spread is None:
            self.spread = Spread(self.model, World())
        self.stopwatch = Stopwatch(self.device)

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def measured(self) -> nn.Module:
        """The model whose accuracy counts."""
        return self.model if self.average is None else self.average.module

    @property
    def rate_factor(self) -> float:
        """What the guard will multiply the next step's learning rate with."""
        return 1.0 if self.guard is None else self.guard.learning_rate.factor

    def begin_epoch(self, epoch: int) -> None:
        """Bring the model into the mode in which it trains in this epoch, counted from 0."""
        self.model.train()
        if self.frozen is not None:
            self.frozen.begin_epoch(epoch)
            self.spread.see_what_learns()

    def step(self, batches: Sequence[AnyBatch]) -> StepResult | None:
        """Average the gradients of some batches and update; None where they hold too few images to learn from.

        Raises:
            NonFiniteLossError: with `refuse_nonfinite`, before anything is changed.
        """
        learnt, images = self.spread.weigh(batches, self.objective)
        if not learnt:
            return None
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        components: dict[str, Tensor] = {}
        for number, (batch, factor) in enumerate(learnt, start=1):
            with self.spread.synchronising(last=number == len(learnt)):
                loss, parts = self.objective.losses(self.spread.module, batch)
                self.stopwatch.lap("forward")
                if self.refuse_nonfinite:
                    refuse(parts)  # a loss without parts: the optimiser names the layer instead
                loss = loss * (factor / len(learnt))
                self.scaler.scale(loss).backward()
                self.stopwatch.lap("backward")
            losses.append(loss.detach())
            for name, part in parts.items():
                part = part.detach() * (factor / len(learnt))
                components[name] = components[name] + part if name in components else part
        loss, *joined = self.spread.join([torch.stack(losses).sum() if losses[1:] else losses[0], *components.values()])
        components = dict(zip(components, joined))
        if self.scaler.is_enabled():
            # Not scaler.step: it waits for the device to learn whether a gradient is infinite. The optimiser decides
            # that on the device, and skips.
            self.scaler.unscale_(self.optimizer)
        if self.guard is None:
            self.optimizer.step()
        else:
            self.guard.step(loss)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        self.stopwatch.lap("step")
        return StepResult(loss, self.optimizer.grad_norm, self.optimizer.clip_coef, images, components)

    def state_dict(self) -> dict[str, Any]:
        """What training changes: the model, the optimiser's state, the loss scale, the guard's memory.

        Tensors are whole, and of use on the main process; where the model is sharded, all must ask.
        """
        kept = {} if self.guard is None else {"guard": self.guard.state_dict()}  # first: it may roll back
        return {
            "model": self.spread.whole(self.model.state_dict()),
            "optimizer": self.spread.whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            **kept,
        } | ({"average": self.spread.whole(self.average.state_dict())} if self.average is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; an average that was not kept begins at the model."""
        self.model.load_state_dict(self.spread.like(state["model"], self.model))
        restore_optimizer(self.optimizer, self.spread.like_optimizer(state["optimizer"], self.optimizer))
        self.scaler.load_state_dict(state["scaler"])
        if self.guard is not None and "guard" in state:
            self.guard.load_state_dict(state["guard"])
        if self.average is not None:
            average = state.get("average", {"module": state["model"], "updates": 0})
            module = self.spread.like(average["module"], self.average.module)
            self.average.load_state_dict({**average, "module": module})


def refuse(losses: Mapping[str, Tensor]) -> None:
    """Raises:
    NonFiniteLossError: naming each that is NaN or infinite.
    """
    values = {name: float(loss.detach()) for name, loss in losses.items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteLossError(", ".join(bad))
