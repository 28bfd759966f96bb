"""Checkpoints between torch and gradfast, and between the CPU and a GPU, for every implementation that torch has."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from gpu.oracle import random
from torch import Tensor

import gradfast

SHAPES = [(16, 3), (7,), (), (4097,)]
OPTIONS = {"SGD": {"momentum": 0.9, "dampening": 0.2}, "Adam": {"amsgrad": True}, "AdamW": {"weight_decay": 0.1}}
WAYS = [("torch", "gradfast"), ("gradfast", "torch"), ("gradfast", "gradfast")]


def make(library: str, name: str, parameters: list[Tensor], kind: dict[str, Any], lr: float) -> torch.optim.Optimizer:
    module = torch.optim if library == "torch" else gradfast
    known = {key: value for key, value in kind.items() if not (name == "SGD" and key == "capturable")}
    return getattr(module, name)(parameters, lr=lr, **OPTIONS[name], **known)


def train(optimizer: torch.optim.Optimizer, parameters: list[Tensor], steps: range) -> None:
    for step in steps:
        gradients = random(SHAPES, torch.float64, torch.device("cpu"), seed=step + 1)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.to(parameter.device)
        optimizer.step()


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}])
@pytest.mark.parametrize(("write", "read"), WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_goes_on(name: str, write: str, read: str, kind: dict[str, Any], moved: bool, device: torch.device) -> None:
    """`moved`: saved on the device, and gone on with on the CPU, as when a model is looked at on another machine."""
    if kind.get("capturable") and (device.type == "cpu" or moved or name == "SGD"):
        pytest.skip("torch captures steps of Adam on a GPU alone")
    target = torch.device("cpu") if moved else device
    straight = random(SHAPES, torch.float64, torch.device("cpu"), seed=0)
    train(make("torch", name, straight, {"foreach": False}, 0.05), straight, range(6))

    first = random(SHAPES, torch.float64, device, seed=0)
    source = make(write, name, first, kind, 0.05)
    train(source, first, range(3))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    second = [parameter.to(target) for parameter in first]
    resumed = make(read, name, second, kind, 0.9)
    resumed.load_state_dict(torch.load(file, weights_only=True, map_location=target))
    train(resumed, second, range(3, 6))
    # With capturable torch corrects the bias in float32, since the count of steps is a tensor of that.
    tolerance = 1e-6 if kind.get("capturable") else 1e-12
    for mine, other in zip(second, straight):
        torch.testing.assert_close(mine.cpu(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_on_the_cpu(name: str, device: torch.device) -> None:
    """Loaded without a word of the device: torch moves states to their parameters, and so does gradfast."""
    straight = random(SHAPES, torch.float64, torch.device("cpu"), seed=0)
    optimizer = make("torch", name, straight, {"foreach": False}, 0.05)
    train(optimizer, straight, range(3))
    on_device = [parameter.to(device, copy=True) for parameter in straight]
    resumed = make("gradfast", name, on_device, {}, 0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # where nothing moves, torch takes the very tensors
    train(optimizer, straight, range(3, 6))
    train(resumed, on_device, range(3, 6))
    for mine, other in zip(on_device, straight):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-12, atol=1e-12)
