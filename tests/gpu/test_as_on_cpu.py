"""What has its own tests on the CPU, run on a GPU and compared with the CPU: formats, roundings by chance, policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.oracle import random
from torch import Tensor

import gradfast
from gradfast.clip import AGC, AdaGC, AutoClip, Chain, GlobalNorm, PerParameterNorm, SkipSpikes, Value, ZClip

SHAPES = [(16, 33), (7,), (), (4097,), (70_001,)]
STEPS = 30

FORMATS: list[dict[str, Any]] = [
    {"master_weights": True},
    {"master_weights": True, "state_dtype": torch.bfloat16},
    {"stochastic_rounding": True, "rounding_seed": 5},
    {"state_dtype": torch.bfloat16},
]


def train(name: str, dtype: torch.dtype, device: torch.device, steps: int, **options: Any) -> tuple[list[Tensor], Any]:
    parameters = random(SHAPES, dtype, device, seed=0)
    optimizer = getattr(gradfast, name)(parameters, lr=0.01, **options)
    for step in range(steps):
        scale = 50.0 if step % 11 == 10 else 1.0  # a spike now and then
        for parameter, gradient in zip(parameters, random(SHAPES, dtype, device, step + 1, scale)):
            parameter.grad = gradient + scale * gradient.sign()
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_formats(name: str, dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> None:
    """One step: rounding by chance draws the same bits, so that most elements are equal and all are neighbours."""
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    expected, _ = train(name, dtype, torch.device("cpu"), steps=2, max_norm=1.0, **momentum, **options)
    found, optimizer = train(name, dtype, device, steps=2, max_norm=1.0, **momentum, **options)
    for mine, other in zip(found, expected):
        unit = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine.cpu(), other, rtol=unit, atol=unit * 2.0**-4)
        assert (mine.cpu() == other).double().mean() > 0.95 or mine.numel() < 100
        for state in optimizer.state[mine].values():
            assert state.device.type == device.type


POLICIES = {
    "GlobalNorm": lambda: GlobalNorm(1.0),
    "PerParameterNorm": lambda: PerParameterNorm(0.5),
    "AGC": lambda: AGC(0.05),
    "Value": lambda: Value(0.5),
    "AutoClip": lambda: AutoClip(20.0, window=16),
    "ZClip": lambda: ZClip(warmup=5),
    "AdaGC": lambda: AdaGC(warmup=5),
    "SkipSpikes": lambda: SkipSpikes(sigmas=3.0, window=8),
    "Chain": lambda: Chain(SkipSpikes(sigmas=3.0, window=8), ZClip(warmup=5)),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name: str, device: torch.device) -> None:
    """In float64, where a decision does not hang on a rounding."""
    make = POLICIES[name]
    expected, reference = train("SGD", torch.float64, torch.device("cpu"), STEPS, momentum=0.9, clip=make())
    found, optimizer = train("SGD", torch.float64, device, STEPS, momentum=0.9, clip=make())
    for mine, other in zip(found, expected):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-9, atol=1e-9)
    assert optimizer.skipped_steps == reference.skipped_steps
    torch.testing.assert_close(optimizer.clip_coef.cpu(), reference.clip_coef, rtol=1e-9, atol=0)
