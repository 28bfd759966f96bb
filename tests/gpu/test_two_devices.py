"""Parameters on the CPU and on a GPU in one optimiser: one norm, one decision. Without a GPU both are the CPU's."""

from __future__ import annotations

import pytest
import torch
from gpu.oracle import Pair, random
from torch import Tensor

import gradfast

SHAPES = [(7,), (16, 3), (), (4097,), (70_001,)]
CPU = torch.device("cpu")


def both(dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0) -> list[Tensor]:
    """Tensors of every shape, by turns on the CPU and on the device."""
    made = random(SHAPES, dtype, CPU, seed, scale)
    return [tensor.to(device) if number % 2 else tensor for number, tensor in enumerate(made)]


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}), ("AdamW", {"lr": 0.01})]
)
def test_steps(name: str, options: dict, dtype: torch.dtype, max_norm: float | None, device: torch.device) -> None:
    pair = Pair(name, both(dtype, device, seed=0), options, max_norm)
    for step in range(4):
        pair.step([gradient + gradient.sign() for gradient in both(dtype, device, seed=step + 1)])
    for parameter in pair.ours:
        for state in pair.fast.state[parameter].values():
            assert state.device == parameter.device


@pytest.mark.parametrize("where", range(len(SHAPES)))
def test_one_bad_gradient_stops_both(where: int, device: torch.device) -> None:
    named = [(f"layer{number}", p) for number, p in enumerate(both(torch.float32, device, seed=0))]
    parameters = [parameter for _, parameter in named]
    optimizer = gradfast.AdamW(named, max_norm=1.0)
    for step in range(3):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        if step == 1:
            parameters[where].grad.fill_(float("nan"))
        before = [parameter.clone() for parameter in parameters]
        optimizer.step()
        for parameter, old in zip(parameters, before):
            assert torch.equal(parameter, old) == (step == 1)
        assert optimizer.nonfinite_parameter == (f"layer{where}" if step == 1 else None)
    assert optimizer.skipped_steps == 1
    assert {optimizer.state[parameter]["step"].item() for parameter in parameters} == {2.0}


def test_only_one_of_them_has_gradients(device: torch.device) -> None:
    host, far = torch.zeros(2), torch.zeros(2, device=device)
    optimizer = gradfast.SGD([host, far], lr=1.0, max_norm=5.0)
    for given in ([host], [far], [host, far]):
        host.grad = far.grad = None
        for parameter in given:
            parameter.grad = torch.tensor([6.0, 8.0], device=parameter.device)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(10.0 * len(given) ** 0.5, rel=1e-6)
    # Clipped to 5: by 3 where alone, by 3 / sqrt(2) together.
    assert [host[0].item(), far[0].item()] == pytest.approx([-3.0 - 3.0 / 2**0.5] * 2, rel=1e-6)


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, gradfast.GradScaler])
def test_loss_scaling(kind: type[torch.amp.GradScaler], device: torch.device) -> None:
    parameters = [torch.zeros(1), torch.zeros(1, device=device)]
    optimizer = gradfast.SGD(parameters, lr=1.0, max_norm=5.0)
    scaler = kind(device.type, init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.zeros(1, device=device))  # makes the scale
    for bad in (None, 0, 1):
        for number, (parameter, value) in enumerate(zip(parameters, (6.0, 8.0))):
            parameter.grad = torch.full_like(parameter, float("inf") if number == bad else 1024.0 * value)
        if bad is not None:
            scaler.update(1024.0)
        scaler.step(optimizer)
        scaler.update()
        assert [p.item() for p in parameters] == pytest.approx([-3.0, -4.0], rel=1e-6)
        assert scaler.get_scale() == (1024.0 if bad is None else 512.0)
    assert optimizer.skipped_steps == 2


def test_clip_functions(device: torch.device) -> None:
    parameters = both(torch.float32, device, seed=0)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    elements = sum(parameter.numel() for parameter in parameters)
    norm = gradfast.clip_grad_norm_(parameters, 1.0)
    assert norm.device == parameters[0].device
    assert norm.item() == pytest.approx(3.0 * elements**0.5, rel=1e-6)
    total = gradfast.get_total_norm([parameter.grad for parameter in parameters])
    assert total.item() == pytest.approx(1.0, rel=1e-5)


def test_parameters_that_move_to_the_device(device: torch.device) -> None:
    """A model moved after the optimiser was made, with its states: the next step is where they are."""
    parameters = both(torch.float64, CPU, seed=0)
    pair = Pair("AdamW", parameters, {"lr": 0.01})
    for step in range(4):
        if step == 2:
            for parameter in parameters[:3]:
                parameter.data = parameter.data.to(device)
                state = pair.fast.state[parameter]
                state.update({key: value.to(device) for key, value in state.items()})
        gradients = both(torch.float64, CPU, seed=step + 1)
        pair.step([gradient.to(p.device) + gradient.sign().to(p.device) for gradient, p in zip(gradients, parameters)])
