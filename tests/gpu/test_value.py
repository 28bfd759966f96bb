"""Clipping by value on a device: in the step's one launch, without waiting for a loss scale that lies there."""

from __future__ import annotations

import pytest
import torch
from gpu.host import assert_one_launch_and_no_waiting
from gpu.oracle import random

import gradfast
from gradfast import clip

SHAPES = [(30, 7), (5,), (), (4096,), (40_001,), (64, 3, 7, 7), (0,)]
LIMIT, SCALE = 0.3, 64.0
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-9)],
)
@pytest.mark.parametrize("layout", ["dense", "channels last"])
def test_as_clamping_then_clipping(dtype: torch.dtype, tolerance: float, layout: str, device: torch.device) -> None:
    """One step of SGD against float64; the tolerance is a rounding of the parameters' type."""
    parameters = random(SHAPES, dtype, device, seed=0)
    gradients = [SCALE * gradient for gradient in random(SHAPES, dtype, device, seed=1)]
    if layout == "channels last":
        gradients[5] = gradients[5].contiguous(memory_format=torch.channels_last)
    before = [parameter.cpu().double().clone() for parameter in parameters]
    clamped = [(gradient.cpu().double() / SCALE).clamp(-LIMIT, LIMIT) for gradient in gradients]
    norm = torch.cat([gradient.flatten() for gradient in clamped]).norm()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = gradfast.SGD(parameters, lr=1.0, clip=clip.Chain(clip.Value(LIMIT), clip.GlobalNorm(1.0)))
    optimizer.grad_scale = torch.tensor(SCALE, device=device)
    written = [gradient.clone() for gradient in gradients]
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm.cpu().double(), norm, rtol=2.0**-22, atol=0)
    for parameter, start, gradient in zip(parameters, before, clamped, strict=True):
        expected = start - gradient * min(1.0, 1.0 / (norm.item() + 1e-6))
        torch.testing.assert_close(parameter.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, written, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("tensors", [161, 5000])
def test_one_launch_and_no_waiting(tensors: int) -> None:
    parameters = random([(512,)] * tensors, torch.float32, CUDA, seed=0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = gradfast.AdamW(parameters, clip=clip.Value(0.5))
    optimizer.grad_scale = torch.tensor(2.0, device=CUDA)
    assert_one_launch_and_no_waiting(optimizer)
