"""Two copies of a small set of parameters: one for gradfast, one for torch with clip_grad_norm_."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gradfast

SHAPES = [(), (1,), (7,), (16, 3), (5, 4, 3, 3), (70_001,), (0,)]  # 0-d, empty, tails, more than one chunk


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(like: list[Tensor], steps: int, scale: float = 1.0) -> Iterator[list[Tensor]]:
    """Yield one list of random float64 gradients a step, `scale` times a standard normal."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [scale * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in like]


def run_pair(
    name: str,
    options: dict,
    dtype: torch.dtype = torch.float64,
    max_norm: float | None = 1.0,
    steps: int = 7,
    norm_type: float = 2.0,
    each_step: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
) -> tuple[list[Tensor], list[Tensor], torch.optim.Optimizer, torch.optim.Optimizer]:
    """Train the same parameters with gradfast in `dtype` and with torch in float64; return both and the optimisers."""
    ours = parameters(dtype)
    theirs = [p.detach().double().clone().requires_grad_() for p in ours]
    fast = getattr(gradfast, name)(ours, max_norm=max_norm, norm_type=norm_type, **options)
    oracle = getattr(torch.optim, name)(theirs, foreach=False, **options)
    for step, step_gradients in enumerate(gradients(ours, steps)):
        for mine, other, gradient in zip(ours, theirs, step_gradients, strict=True):
            mine.grad = gradient.to(dtype)
            other.grad = mine.grad.double().clone()
        if max_norm is not None:  # torch refuses the infinity norm of an empty tensor
            torch.nn.utils.clip_grad_norm_([p for p in theirs if p.numel()], max_norm, norm_type=norm_type)
        for optimizer in (fast, oracle):
            each_step(step, optimizer)
            optimizer.step()
    return ours, theirs, fast, oracle
