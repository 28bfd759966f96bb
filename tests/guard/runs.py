"""A small run to break: a linear model on noisy data, whose loss falls from about 30 to below 0.1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import gradfast

Batch = tuple[Tensor, Tensor]


class Run:
    """Model, optimiser and batches; `broken[i]` says what is wrong with batch i."""

    def __init__(self, broken: dict[int, str] | None = None, batches: int = 200, lr: float = 0.05, **options) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer = gradfast.SGD(self.model.named_parameters(), lr=lr, momentum=0.9, **options)
        self.broken, self.count = broken or {}, batches
        self.losses: list[float] = []

    def batches(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(8, 1, generator=generator)
        for number in range(self.count):
            inputs = torch.randn(32, 8, generator=generator)
            labels = torch.tanh(inputs @ weights)
            kind = self.broken.get(number)
            if kind == "nan":
                inputs[3, 2] = float("nan")
            elif kind == "spike":
                labels = labels * 1e4
            elif kind == "poison":  # wrong, but not so that a norm would show it
                labels = -5 * labels
            yield inputs, labels

    def backward(self, batch: Batch) -> Tensor:
        inputs, labels = batch
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(inputs), labels)
        loss.backward()
        self.losses.append(loss.item())
        return loss

    def final_loss(self) -> float:
        """On batches that nothing is wrong with."""
        clean = Run(batches=20)
        clean.model = self.model
        with torch.no_grad():
            return sum(nn.functional.mse_loss(self.model(x), y).item() for x, y in clean.batches()) / 20
