"""Runs of 16-bit parameters, for the tests of their precision."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = [torch.bfloat16, torch.float16]
OPTIMIZERS = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("AdamW", {"lr": 0.01, "amsgrad": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("Lion", {"lr": 0.001}),
]
SHAPES = [(), (1,), (513,), (16, 3), (70_001,), (0,)]


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def give_gradients(to: list[Tensor], step: int, dtype: torch.dtype) -> None:
    """The same values for every dtype of parameters: random ones, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(50 + step)
    for parameter in to:
        gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
        parameter.grad = gradient.to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, to: list[Tensor], dtype: torch.dtype, steps: range) -> None:
    for step in steps:
        give_gradients(to, step, dtype)
        optimizer.step()


def assert_same(left: object, right: object) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)
