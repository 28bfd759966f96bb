"""One optimiser step, and one forward pass for evaluation: everything that touches the device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfast.errors import UserError
from gradfast.optim.base import ClippedOptimizer
from gradfast.train.averaging import MovingAverage
from gradfast.train.batches import Batch
from gradfast.train.criterion import ClassificationLoss
from gradfast.train.mixing import Mixing
from gradfast.train.optimizers import restore_optimizer

# The customary statistics of natural photographs, for pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STANDARD_DEVIATION = (0.229, 0.224, 0.225)

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """Mean loss, gradient norm before clipping and clip coefficient: 0-d tensors, on the device."""

    loss: Tensor
    grad_norm: Tensor
    clip_coef: Tensor
    images: int


def choose_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        UserError: there is no such device, or it does not work here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} does not work here: {str(error).strip().splitlines()[0]}") from error
    return device


@dataclass
class Learner:
    """A model with what trains it.

    Attributes:
        amp: type of the mixed-precision forward pass, or None.
        scaler: scales the loss under fp16, does nothing otherwise.
        mixing: makes mixtures of a training batch's images, or None.
        average: moving average of the model, which is the one that is measured, or None.
    """

    model: nn.Module
    criterion: ClassificationLoss
    optimizer: ClippedOptimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    amp: torch.dtype | None
    memory_format: torch.memory_format
    mixing: Mixing | None = None
    average: MovingAverage | None = None

    def __post_init__(self) -> None:
        shape = (1, 3, 1, 1)
        self.mean = torch.tensor(MEAN, device=self.device).mul(255).view(shape)
        self.deviation = torch.tensor(STANDARD_DEVIATION, device=self.device).mul(255).view(shape)

    @property
    def measured(self) -> nn.Module:
        """The model whose accuracy counts."""
        return self.model if self.average is None else self.average.module

    def forward(self, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
        """(logits [n, K], targets [n], or shares [n, K] of mixed images) of a batch, on the device."""
        images = batch.images.to(self.device, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        images = ((images.float() - self.mean) / self.deviation).contiguous(memory_format=self.memory_format)
        if training and self.mixing is not None:
            images, targets = self.mixing(images, targets, batch.number)
        context = torch.autocast(self.device.type, self.amp) if self.amp else contextlib.nullcontext()
        with context:
            return (self.model if training else self.measured)(images), targets

    def step(self, batches: list[Batch]) -> StepResult | None:
        """Average the gradients of some batches and update; None where they hold too few images to learn from.

        Batch normalisation has no variance over one image, so a batch of one (left over when its neighbours could
        not be read) is passed over.
        """
        batches = [batch for batch in batches if len(batch.targets) > 1]
        if not batches:
            return None
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch in batches:
            loss = self.criterion(*self.forward(batch, training=True)) / len(batches)
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        if self.scaler.is_enabled():
            # Not scaler.step: it waits for the device to learn whether a gradient is infinite. The optimiser decides
            # that on the device, and skips.
            self.scaler.unscale_(self.optimizer)
        self.optimizer.step()
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        images = sum(len(batch.targets) for batch in batches)
        return StepResult(loss, self.optimizer.grad_norm, self.optimizer.clip_coef, images)

    def state_dict(self) -> dict[str, Any]:
        """What training changes: the model, the optimiser's state and the loss scale."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        } | ({"average": self.average.state_dict()} if self.average is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; an average that was not kept begins at the model."""
        self.model.load_state_dict(state["model"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            if "average" in state:
                self.average.load_state_dict(state["average"])
            else:
                self.average.module.load_state_dict(state["model"])
