"""What one process comes to in float64 with torch's optimiser and torch's clipping: the oracle of this folder."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import gradfast

MAX_NORM = 0.05  # far below the gradients' norms: every step clips


def model(widths: tuple[int, ...] = (6, 13, 7, 3), seed: int = 0) -> nn.Sequential:
    """Layers whose sizes no number of ranks divides; the same on every rank, in float64."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, dtype=torch.float64), nn.Tanh()]
    made = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def batches(steps: int = 4, size: int = 8, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, width, generator=generator, dtype=torch.float64) for _ in range(steps)]


def loss_of(module: nn.Module, batch: Tensor) -> Tensor:
    return (module(batch) ** 2).sum(-1).mean()


def train_alone(
    module: nn.Module, name: str, norm_type: float = 2.0, max_norm: float = MAX_NORM, steps: int = 4, **options: Any
) -> tuple[list[Tensor], dict[str, Tensor], torch.optim.Optimizer]:
    """Train a copy of `module`. Returns the norm at each step, the parameters in the end, and the optimiser."""
    module = copy.deepcopy(module)
    optimizer = getattr(torch.optim, name)(module.parameters(), foreach=False, **options)
    norms = []
    for batch in batches(steps):
        optimizer.zero_grad()
        loss_of(module, batch).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm, norm_type))
        optimizer.step()
    return norms, {key: value.detach() for key, value in module.named_parameters()}, optimizer


def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_parameters(module: nn.Module, expected: dict[str, Tensor], rtol: float = 1e-11) -> None:
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(whole(parameter), expected[name], rtol=rtol, atol=1e-13, msg=lambda m, n=name: n + m)


def assert_same_on_all_ranks(value: Tensor) -> None:
    """To the last bit; a NaN equals a NaN."""
    assert not isinstance(value, DTensor)
    values = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(values, value.detach())
    for other in values:
        assert torch.equal(torch.nan_to_num(other, nan=-1.0), torch.nan_to_num(value, nan=-1.0)), values


def assert_norm(optimizer: gradfast.SGD, expected: Tensor) -> None:
    """The optimiser's last norm is `expected`, and the same on all ranks."""
    torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-12, atol=0)
    assert_same_on_all_ranks(optimizer.grad_norm)
