"""AGC on a device: in the step's one launch, against the paper in float64."""

from __future__ import annotations

import pytest
import torch
from gpu.host import assert_one_launch_and_no_waiting
from gpu.oracle import random
from optim.agc_oracle import clipped

import gradfast
from gradfast import clip

# Units of every size beside a warp's and a chunk's: some end in a chunk, some cross one border or several.
SHAPES = [(300, 9), (5,), (), (40_001,), (64, 3, 7, 7), (0, 3), (400, 33), (3, 4097), (2, 9000), (4096, 1)]
CLIPPING, SCALE = 0.8, 64.0
CUDA = torch.device("cuda")


@pytest.mark.parametrize("kind", ["plain", "channels last", "masters"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-9)],
)
def test_follows_the_paper(dtype: torch.dtype, tolerance: float, kind: str, device: torch.device) -> None:
    """One step of SGD at a rate of 1; the tolerance is a rounding of what the step writes: float32 for masters."""
    if kind == "masters":
        if dtype in (torch.float64, torch.float32):
            pytest.skip("a master is of a 16-bit parameter")
        tolerance = 1e-6
    parameters = random(SHAPES, dtype, device, seed=0)
    gradients = [SCALE * gradient for gradient in random(SHAPES, dtype, device, seed=1)]
    if kind == "channels last":
        gradients[4] = gradients[4].contiguous(memory_format=torch.channels_last)
    weights = [parameter.cpu().double().numpy().copy() for parameter in parameters]
    left = [
        torch.as_tensor(clipped(weight, gradient.cpu().double().numpy() / SCALE, CLIPPING)).reshape(shape)
        for weight, gradient, shape in zip(weights, gradients, SHAPES, strict=True)
    ]
    norm = torch.cat([gradient.flatten() for gradient in left]).norm()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    written = [gradient.clone() for gradient in gradients]
    policy = clip.Chain(clip.AGC(CLIPPING), clip.GlobalNorm(norm.item() / 2))
    optimizer = gradfast.SGD(parameters, lr=1.0, clip=policy, master_weights=kind == "masters")
    optimizer.grad_scale = torch.tensor(SCALE, device=device)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm.cpu().double(), norm, rtol=2.0**-22, atol=0)
    for parameter, weight, gradient in zip(parameters, weights, left, strict=True):
        stored = optimizer.state[parameter]["master_param"] if kind == "masters" else parameter
        expected = torch.from_numpy(weight).reshape(gradient.shape) - gradient * (norm / 2 / (norm + 1e-6))
        torch.testing.assert_close(stored.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, written, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("tensors", [161, 5000])
def test_one_launch_and_no_waiting(tensors: int) -> None:
    parameters = random([(16, 32)] * tensors, torch.float32, CUDA, seed=0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = gradfast.AdamW(parameters, clip=clip.AGC(0.01))
    assert_one_launch_and_no_waiting(optimizer)
