"""One step in float64 on the CPU, from the values that are stored: what any device must give, to a rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gradfast
from gradfast.bench.reference_lion import ReferenceLion

# Of a parameter or state: half a unit of the storage type, and a few roundings of the arithmetic's (float32's for all
# but float64). Absolute: where terms of up to eight cancel, the arithmetic's rounding is that of the terms.
RELATIVE = {torch.float64: 1e-13, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
ABSOLUTE = {torch.float64: 1e-14, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-14, torch.float16: 2.0**-14}


def make(name: str, parameters: Sequence[Tensor], options: dict[str, Any], **clipping: Any) -> torch.optim.Optimizer:
    return getattr(gradfast, name)(parameters, **options, **clipping)


def make_oracle(name: str, parameters: Sequence[Tensor], options: dict[str, Any]) -> torch.optim.Optimizer:
    options = {key: value.cpu().double() if torch.is_tensor(value) else value for key, value in options.items()}
    if name == "Lion":
        return ReferenceLion(parameters, **options)
    return getattr(torch.optim, name)(parameters, foreach=False, **options)


class Pair:
    """Parameters on a device, stepped by gradfast, and float64 copies, stepped by torch after clipping as it does."""

    def __init__(self, name: str, parameters: Sequence[Tensor], options: dict[str, Any], max_norm: float | None = 1.0):
        self.ours = list(parameters)
        self.theirs = [copied(parameter) for parameter in self.ours]
        self.fast = make(name, self.ours, options, max_norm=max_norm)
        self.oracle = make_oracle(name, self.theirs, options)
        self.max_norm = max_norm

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Step both by `gradients`, whose layouts our side keeps, from the values that our side stores; compare."""
        for mine, other, gradient in zip(self.ours, self.theirs, gradients):
            mine.grad = gradient
            other.copy_(mine.detach())
            for key, value in self.oracle.state[other].items():
                if torch.is_tensor(value):
                    value.copy_(self.fast.state[mine][key])
            other.grad = copied(gradient)
        total = torch.cat([other.grad.flatten() for other in self.theirs]).norm()
        if self.max_norm is not None:
            for other in self.theirs:
                other.grad *= min(1.0, self.max_norm / (total.item() + 1e-6))
        self.fast.step()
        self.oracle.step()
        # The norm is summed in double precision and shown in float32 for all but float64.
        torch.testing.assert_close(self.fast.grad_norm.cpu().double(), total, rtol=2.0**-23, atol=0)
        self.compare()

    def compare(self) -> None:
        for index, (mine, other) in enumerate(zip(self.ours, self.theirs)):
            close(mine.detach(), other, f"parameter {index}")
            for key, value in self.oracle.state[other].items():
                if torch.is_tensor(value) and value.dim() == other.dim() and key != "step":
                    close(self.fast.state[mine][key], value, f"{key} of parameter {index}")


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double().clone(memory_format=torch.contiguous_format)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    rtol, atol = RELATIVE[found.dtype], ABSOLUTE[found.dtype]
    torch.testing.assert_close(
        found.cpu().double(), expected, rtol=rtol, atol=atol, msg=lambda message: f"{what}: {message}"
    )


def random(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0
) -> list[Tensor]:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes]
