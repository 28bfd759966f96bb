"""Training with a loss scale, twice: with gradfast, and with torch's reference step as the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHAPES = [(), (7,), (16, 3), (70_001,)]
INFINITY = float("inf")

# What each step's gradients hold: fine, or a bad value in one place.
GROWS_AND_BACKS_OFF = ["ok", "ok", "ok", "inf", "ok", "nan", "-inf", "ok", "ok", "ok", "ok", "inf", "ok"]
BAD_FROM_THE_START = ["inf", "nan", "ok", "ok", "inf", "ok"]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def true_gradients(like: Sequence[Tensor], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in like]


def give_gradients(parameters: Sequence[Tensor], step: int, scale: float, event: str) -> None:
    """Set `.grad` to what backward leaves under a loss scale, with a bad value where the event says so."""
    for parameter, gradient in zip(parameters, true_gradients(parameters, step), strict=True):
        parameter.grad = (gradient * scale).to(parameter.dtype)
    if event != "ok":
        gradient = parameters[step % len(parameters)].grad
        assert gradient is not None
        gradient.view(-1)[gradient.numel() // 2] = float(event)


def scaler_of(kind: type[torch.amp.GradScaler], **changes: object) -> torch.amp.GradScaler:
    options: dict = {
        "init_scale": 1024.0,
        "growth_interval": 3,
        "growth_factor": 4.0,
        "backoff_factor": 0.25,
        **changes,
    }
    scaler = kind("cpu", **options)
    scaler.scale(torch.zeros(1))  # the scale tensor is made at the first use
    return scaler
