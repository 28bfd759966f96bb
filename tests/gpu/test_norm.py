"""The norm over every tail, every kind of p, and more elements than 32 bits can count."""

from __future__ import annotations

import pytest
import torch
from gpu.oracle import random

import gradfast

# Vectors of 16 bytes, a warp of them, chunks of 4096 to 16,384 elements; each with its neighbours.
EDGES = [2, 4, 8, 16, 64, 128, 256, 512, 4096, 8192, 16_384, 65_536]
SIZES = sorted({max(edge + beside, 0) for edge in EDGES for beside in (-1, 0, 1)} | {0, 3, 100_003, 1_000_003})
# Half a unit of float32, in which the norm is shown, and the double precision that it is summed in.
RELATIVE = {torch.float64: 1e-13, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-23, torch.float16: 2.0**-23}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_sizes(norm_type: float, dtype: torch.dtype, shift: int, device: torch.device) -> None:
    for size in SIZES:
        tensor = random([(size + shift,)], dtype, device, seed=size)[0][shift:]
        exact = tensor.cpu().double()
        expected = torch.linalg.vector_norm(exact, norm_type) if size else torch.zeros(()).double()
        found = gradfast.get_total_norm([tensor], norm_type).cpu().double()
        torch.testing.assert_close(found, expected, rtol=RELATIVE[dtype], atol=0, msg=lambda m, n=size: f"{n}: {m}")


def test_many_tensors_are_one_vector(device: torch.device) -> None:
    tensors = random([(size,) for size in SIZES], torch.float32, device, seed=0)
    expected = torch.cat([tensor.cpu().double() for tensor in tensors]).norm()
    found = gradfast.get_total_norm(tensors).cpu().double()
    torch.testing.assert_close(found, expected, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("value", [1e20, 1e-25])
def test_range_of_float32(value: float, device: torch.device) -> None:
    tensor = torch.full((10_000,), value, device=device)
    exact = tensor[0].double().item() * 100
    assert gradfast.get_total_norm([tensor]).item() == pytest.approx(exact, rel=2.0**-22)


def elements_beyond(device: torch.device, bytes_each: int) -> int:
    """More than 2^31 on a GPU, if it has room; on a CPU, where the same path takes minutes, more than one chunk."""
    if device.type == "cpu":
        return 2**17 + 13
    elements = 2**31 + 12_345
    free, _ = torch.cuda.mem_get_info()
    if free < elements * bytes_each * 1.1:
        pytest.skip(f"needs {elements * bytes_each / 2**30:.0f} GiB of free GPU memory, has {free / 2**30:.0f}")
    return elements


def test_norm_and_step_beyond_two_to_the_31(device: torch.device) -> None:
    elements = elements_beyond(device, bytes_each=4)  # parameter and gradient, two bytes each
    parameter = torch.ones(elements, dtype=torch.bfloat16, device=device)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[-3:] = torch.tensor([3.0, 4.0, 0.0], dtype=torch.bfloat16)
    parameter.grad[7] = 12.0
    assert gradfast.get_total_norm([parameter.grad]).item() == 13.0
    optimizer = gradfast.SGD([parameter], lr=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 13.0
    assert parameter[-3:].tolist() == [-2.0, -3.0, 1.0]
    assert parameter[7].item() == -11.0
    parameter[-3:] = 1.0
    parameter[7] = 1.0
    assert bool((parameter == 1.0).all())  # and nothing else was touched
