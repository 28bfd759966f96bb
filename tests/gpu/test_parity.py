"""Every optimiser, dtype, option and layout on a device, step by step against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu.oracle import Pair, random
from torch import Tensor

import gradfast

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (16, 3), (0,), (5, 4, 3, 3), (4097,), (70_001,)]  # 0-d, empty, tails, several chunks

OPTIONS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
    ("AdamW", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "amsgrad": True}),
    ("Lion", {"lr": 0.01, "weight_decay": 0.1}),
]


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options(name: str, options: dict, dtype: torch.dtype, max_norm: float | None, device: torch.device) -> None:
    pair = Pair(name, random(SHAPES, dtype, device, seed=0), options, max_norm)
    for step in range(4):
        # Away from zero: a sign, or a division by the root of a square, would magnify the rounding of a tiny number.
        gradients = random(SHAPES, dtype, device, seed=step + 1)
        pair.step([gradient + gradient.sign() for gradient in gradients])


def transposed(values: Tensor) -> Tensor:
    return values.t().contiguous().t()


def with_gaps(values: Tensor) -> Tensor:
    wide = torch.zeros(values.shape[0], 2 * values.shape[1] + 3, dtype=values.dtype, device=values.device)
    view = wide[:, 1 : 2 * values.shape[1] + 1 : 2]
    view.copy_(values)
    return view


def off_by_one(values: Tensor) -> Tensor:
    """Not aligned to 16 bytes."""
    storage = torch.zeros(values.numel() + 1, dtype=values.dtype, device=values.device)
    view = storage[1:].view(values.shape)
    view.copy_(values)
    return view


def expanded(values: Tensor) -> Tensor:
    return values[:1].expand(values.shape)


def plain(values: Tensor) -> Tensor:
    return values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient_layout", [plain, transposed, with_gaps, off_by_one, expanded])
@pytest.mark.parametrize("parameter_layout", [plain, transposed, with_gaps, off_by_one])
def test_layouts(
    parameter_layout: Callable[[Tensor], Tensor],
    gradient_layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    shapes = [(33, 65), (7, 3), (80, 60)]
    parameters = [parameter_layout(values) for values in random(shapes, dtype, device, seed=0)]
    pair = Pair("SGD", parameters, {"lr": 0.1, "momentum": 0.9})
    for step in range(3):
        pair.step([gradient_layout(values) for values in random(shapes, dtype, device, seed=step + 1)])


def test_what_lies_between_the_elements_stays(device: torch.device) -> None:
    wide = torch.full((10, 20), 5.0, device=device)
    view = wide[:, 3:10:2]
    view.grad = torch.ones(view.shape, device=device)
    gradfast.SGD([view], lr=1.0).step()
    expected = torch.full((10, 20), 5.0)
    expected[:, 3:10:2] = 4.0
    assert torch.equal(wide.cpu(), expected)


def test_channels_last(device: torch.device) -> None:
    shape = (8, 5, 6, 7)
    parameter = random([shape], torch.float32, device, seed=0)[0].to(memory_format=torch.channels_last)
    pair = Pair("AdamW", [parameter], {"lr": 0.01})
    for step in range(3):
        pair.step([gradient + gradient.sign() for gradient in random([shape], torch.float32, device, seed=step + 1)])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_mixed_dtypes_in_groups(name: str, device: torch.device) -> None:
    shapes = [(1000,), (33, 5), (4099,), (17,)]
    parameters = [random([shape], dtype, device, seed=1)[0] for shape, dtype in zip(shapes, DTYPES)]
    pair = Pair(name, parameters, {"lr": 0.01})
    for step in range(3):
        gradients = [random([shape], dtype, device, seed=step)[0] for shape, dtype in zip(shapes, DTYPES)]
        pair.step([gradient + gradient.sign() for gradient in gradients])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_in_a_tensor_of_the_device(dtype: torch.dtype, device: torch.device) -> None:
    lr = torch.tensor(0.1, dtype=dtype, device=device)
    parameter = torch.ones(1000, dtype=torch.float64, device=device)
    optimizer = gradfast.SGD([parameter], lr=lr)
    for rate in (0.5, 0.25):
        lr.fill_(rate)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.cpu().tolist() == [0.25] * 1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 4095, 4096, 69_999])
def test_nonfinite_steps_are_skipped_whole(bad: float, place: int, device: torch.device) -> None:
    parameters = random([(100,), (70_000,)], torch.float32, device, seed=0)
    optimizer = gradfast.AdamW([("first", parameters[0]), ("second", parameters[1])], max_norm=1.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [parameter.clone() for parameter in parameters]
    states = [{key: value.clone() for key, value in optimizer.state[parameter].items()} for parameter in parameters]
    parameters[1].grad[place] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.nonfinite_parameter == "second"
    for parameter, old, state in zip(parameters, before, states):
        assert torch.equal(parameter, old)
        for key, value in state.items():
            assert torch.equal(optimizer.state[parameter][key], value), key
    parameters[1].grad[place] = 1.0
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.state[parameters[0]]["step"].item() == 2
    with pytest.raises(RuntimeError, match="second"):
        parameters[1].grad[place] = bad
        optimizer.nonfinite = "raise"
        optimizer.step()


def test_a_step_is_the_same_bit_for_bit_every_time(device: torch.device) -> None:
    results = []
    for _ in range(2):
        parameters = random([(1_000_003,), (77,)], torch.float32, device, seed=0)
        optimizer = gradfast.AdamW(parameters, max_norm=0.1)
        for step in range(3):
            for parameter, gradient in zip(parameters, random([(1_000_003,), (77,)], torch.float32, device, step)):
                parameter.grad = gradient
            optimizer.step()
        results.append([*parameters, optimizer.grad_norm])
    for first, second in zip(*results):
        assert torch.equal(first, second)
