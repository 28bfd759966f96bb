"""Weights and gradients of units of every size, and what AGC is to leave of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from optim import agc_oracle
from torch import Tensor

SHAPES = {
    "conv.weight": (6, 3, 2, 2),
    "conv.bias": (6,),
    "head.weight": (4, 5),
    "scale": (),
    "empty": (0, 3),
    "no columns": (3, 0),
}
# Chunks hold 128 * 1024 elements: units that end in them, cross one border, cross several, and fill whole chunks.
LARGE = {
    "tall": (27_001, 5),
    "wide": (3, 100_001),
    "wider": (2, 300_007),
    "row": (1, 140_000),
    "vector": (270_001,),
    "ones": (1003, 1),
    "even": (2, 128 * 1024),
}


def tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """Weights and gradients of all sizes, a unit that begins at zero, and one without a gradient."""
    generator = torch.Generator().manual_seed(seed)
    named = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        if weight.ndim > 1 and len(weight) > 2:
            gradient *= 10.0 ** torch.randint(-2, 3, (len(weight), *[1] * (weight.ndim - 1)), generator=generator)
            weight[2] = 0
            gradient[1] = 0
        named[name] = weight.to(dtype)
        named[name].grad = gradient.to(dtype)
    return named


def after_agc(
    named: Mapping[str, Tensor], scale: float = 1.0, clipping: float = 0.3, eps: float = 1e-3
) -> dict[str, Tensor]:
    """The true gradients that the published rule leaves, in float64."""
    return {
        name: torch.from_numpy(
            np.asarray(agc_oracle.clipped(p.detach().double().numpy(), p.grad.double().numpy() / scale, clipping, eps))
        )
        for name, p in named.items()
        if p.grad is not None
    }


def copies(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, p in named.items():
        made[name] = p.detach().clone()
        made[name].grad = None if p.grad is None else p.grad.clone()
    return made


def norm_of(gradients: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.abs().square().sum()) for g in gradients.values()))
