"""StableAdamW on a device: against the paper in float64; in one launch, without waiting, the same bits each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpu.host import assert_one_launch_and_no_waiting
from gpu.oracle import random
from optim.stable_adamw import StableAdamW, give_gradients
from torch import Tensor

import gradfast
from gradfast import clip
from gradfast.bench.launches import launches_of

SHAPES = [(30, 7), (5,), (), (4096,), (40_001,), (64, 3, 7, 7), (0,)]
CUDA = torch.device("cuda")


def train(
    device: torch.device, dtype: torch.dtype, kind: str, oracles: bool
) -> tuple[list[Tensor], list[StableAdamW], int]:
    """Return parameters (or their masters) after twelve steps, what float64 makes of them, and rates it lowered."""
    parameters = random(SHAPES, dtype, device, seed=0)
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
    followed = [StableAdamW(p.cpu().double().numpy(), decay=0.1, **options) for p in parameters]
    optimizer = gradfast.AdamW(
        parameters, weight_decay=0.1, update_clipping=True, master_weights=kind == "masters", **options
    )
    lowered = 0
    for step in range(12):
        give_gradients(parameters, step)
        for parameter, oracle in zip(parameters, followed, strict=True):
            if kind == "channels last" and parameter.ndim == 4:
                parameter.grad = parameter.grad.contiguous(memory_format=torch.channels_last)
            if oracles:
                lowered += oracle.step(parameter.grad.cpu().double().numpy()) > 1.5
        optimizer.step()
    if kind == "masters":
        parameters = [optimizer.state[parameter]["master_param"] for parameter in parameters]
    return parameters, followed, lowered


@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"),
    [
        (torch.float64, "plain", 1e-9),
        (torch.float32, "plain", 2e-5),
        (torch.float32, "channels last", 2e-5),
        (torch.bfloat16, "masters", 2e-5),
        (torch.float16, "masters", 2e-5),
    ],
)
def test_follows_the_paper(device: torch.device, dtype: torch.dtype, kind: str, tolerance: float) -> None:
    parameters, oracles, lowered = train(device, dtype, kind, True)
    assert lowered > 3
    for parameter, oracle in zip(parameters, oracles, strict=True):
        np.testing.assert_allclose(parameter.cpu().double().numpy(), oracle.p, rtol=tolerance, atol=tolerance)


def test_the_same_bits_every_time(device: torch.device) -> None:
    once, _, _ = train(device, torch.float32, "plain", False)
    again, _, _ = train(device, torch.float32, "plain", False)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.cuda
@pytest.mark.parametrize("tensors", [161, 5000])
def test_one_launch_and_no_waiting(tensors: int) -> None:
    parameters = random([(512,)] * tensors, torch.float32, CUDA, seed=0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = gradfast.AdamW(parameters, update_clipping=True)
    assert_one_launch_and_no_waiting(optimizer)


def twelve_steps(parameters: list[Tensor], options: dict[str, Any]) -> gradfast.AdamW:
    optimizer = gradfast.AdamW(parameters, lr=0.01, update_clipping=True, **options)
    for step in range(12):
        give_gradients(parameters, step)
        optimizer.step()
    return optimizer


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"clip": clip.AdaGC(warmup=2)}])
def test_beside_clipping_in_one_launch_as_on_the_cpu(options: dict[str, Any]) -> None:
    runs = []
    for device in (torch.device("cpu"), CUDA):
        parameters = random(SHAPES, torch.float64, device, seed=0)
        optimizer = twelve_steps(parameters, options)
        runs.append(parameters)
    for mine, other in zip(*runs, strict=True):
        torch.testing.assert_close(other.cpu(), mine, rtol=1e-9, atol=1e-12)
    assert len(launches_of(optimizer.step)) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}])
def test_parameters_on_two_devices(options: dict[str, Any]) -> None:
    """Each device finds the rates of its own tensors."""
    runs = []
    for second in (torch.device("cpu"), CUDA):
        parameters = random(SHAPES, torch.float64, torch.device("cpu"), seed=0)
        parameters[::2] = [parameter.to(second) for parameter in parameters[::2]]
        twelve_steps(parameters, options)
        runs.append(parameters)
    for mine, other in zip(*runs, strict=True):
        torch.testing.assert_close(other.cpu(), mine, rtol=1e-9, atol=1e-12)
