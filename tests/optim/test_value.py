"""Clipping by value in the step: against float64, and `.grad` stays as backward wrote it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradfast
from gradfast import clip

SHAPES = [(300, 7), (5,), (), (40_001,), (8, 3, 3, 3), (0,)]
LIMIT = 0.3

Make = Callable[..., torch.optim.Optimizer]
RULES: dict[str, tuple[Make, Make, dict[str, Any]]] = {
    "sgd": (gradfast.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (gradfast.AdamW, torch.optim.AdamW, {"lr": 0.01}),
    "amsgrad": (gradfast.Adam, torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
}


def parameters_of(dtype: torch.dtype, layout: str = "dense") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    if layout == "channels last":
        made[4] = made[4].contiguous(memory_format=torch.channels_last)
    return made


def give_gradients(parameters: list[Tensor], step: int, layout: str = "dense", scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale
        if layout == "transposed" and gradient.ndim == 2:
            gradient = gradient.t().contiguous().t()
        elif layout == "gaps" and gradient.ndim == 1 and len(gradient):
            gradient = torch.stack([gradient, gradient], dim=1)[:, 0]
        parameter.grad = gradient


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["dense", "transposed", "gaps", "channels last"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_as_clamping_then_clipping_then_torch(
    rule: str, layout: str, dtype: torch.dtype, tolerance: float, scale: float
) -> None:
    """Of the true gradients, before the norm; the tolerances are three steps' rounding of the stored parameters."""
    if dtype == torch.float16 and rule != "sgd":
        pytest.skip("float16 states do not hold Adam's second moments: the optimisers differ, not the clipping")
    ours, theirs, options = RULES[rule]
    parameters = parameters_of(dtype, layout)
    exact = [parameter.double().clone() for parameter in parameters]
    optimizer = ours(parameters, clip=clip.Chain(clip.Value(LIMIT), clip.GlobalNorm(2.0)), **options)
    oracle = theirs(exact, **options)
    if scale != 1:
        optimizer.grad_scale = torch.tensor(scale)
    for step in range(3):
        give_gradients(parameters, step, layout, scale)
        written = [copy.deepcopy(parameter.grad) for parameter in parameters]
        for one, parameter in zip(exact, parameters, strict=True):
            one.grad = (parameter.grad.double() / scale).clamp(-LIMIT, LIMIT)
        norm = torch.nn.utils.clip_grad_norm_(exact, 2.0)
        optimizer.step()
        oracle.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, written, strict=True))
    for parameter, one in zip(parameters, exact, strict=True):
        torch.testing.assert_close(parameter.double(), one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_norm_is_of_what_is_left(norm_type: float, dtype: torch.dtype) -> None:
    parameters = parameters_of(dtype)
    give_gradients(parameters, 0)
    optimizer = gradfast.SGD(parameters, lr=0.1, clip=clip.Chain(clip.Value(LIMIT), clip.GlobalNorm(1e9, norm_type)))
    expected = torch.cat([p.grad.double().clamp(-LIMIT, LIMIT).flatten() for p in parameters]).norm(norm_type)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_take_the_limit_in_float32(dtype: torch.dtype) -> None:
    """0.3 is no number of either format: the master sees it to float32's precision."""
    parameter = torch.zeros(1000, dtype=dtype)
    parameter.grad = torch.full_like(parameter, 7.0)
    optimizer = gradfast.SGD([parameter], lr=1.0, clip=clip.Value(LIMIT), master_weights=True)
    optimizer.step()
    assert torch.equal(optimizer.state[parameter]["master_param"], torch.full((1000,), -LIMIT))


def test_infinite_elements_become_the_limit_and_nan_is_skipped() -> None:
    parameter = torch.zeros(10)
    optimizer = gradfast.SGD([parameter], lr=1.0, clip=clip.Value(LIMIT))
    parameter.grad = torch.tensor([math.inf, -math.inf] + [0.0] * 8)
    optimizer.step()
    assert torch.equal(parameter, torch.tensor([-LIMIT, LIMIT] + [0.0] * 8))
    assert parameter.grad[0] == math.inf, "as backward wrote it"
    parameter.grad = torch.full((10,), math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and parameter.isfinite().all()


def test_a_limit_out_of_reach_changes_no_bit() -> None:
    results = []
    for policy in (None, clip.Value(1e30)):
        parameters = parameters_of(torch.float32)
        optimizer = gradfast.AdamW(parameters, lr=0.1, clip=policy)
        for step in range(3):
            give_gradients(parameters, step)
            optimizer.step()
        results.append(parameters)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_as_a_function_it_clamps_in_place() -> None:
    parameters = parameters_of(torch.float64)
    give_gradients(parameters, 0)
    clamped = [p.grad.clamp(-LIMIT, LIMIT) for p in parameters]
    norm = torch.cat([g.flatten() for g in clamped]).norm()
    result = clip.Chain(clip.Value(LIMIT), clip.GlobalNorm(2.0)).apply_(parameters)
    assert result.norm.item() == pytest.approx(norm.item(), rel=1e-12)
    for parameter, gradient in zip(parameters, clamped, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 2.0 / (norm + 1e-6), rtol=1e-12, atol=0)


def test_complex_parameters_are_refused_by_name() -> None:
    parameter = torch.zeros(3, dtype=torch.complex64)
    parameter.grad = torch.ones_like(parameter)
    optimizer = gradfast.SGD([("spectrum", parameter)], lr=0.1, clip=clip.Value(1.0))
    with pytest.raises(NotImplementedError, match="no order to clip by: 'spectrum'"):
        optimizer.step()
    with pytest.raises(NotImplementedError, match="no order to clip by"):
        clip.Value(1.0).apply_([parameter])


def test_the_message_names_what_skipped() -> None:
    """A policy behind it in a chain, or the parameter with the NaN."""
    policy = clip.Chain(clip.Value(1e6), clip.GlobalNorm(1e9), clip.SkipSpikes(window=2))
    assert isinstance(policy.decider(1), clip.SkipSpikes)
    parameter = torch.zeros(6, dtype=torch.float64)
    optimizer = gradfast.SGD([("head.bias", parameter)], lr=1.0, clip=policy)
    for size in (1.0, 1.1, 1000.0):
        parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert "SkipSpikes" in optimizer._explain_skip()
    parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 2
    assert optimizer.nonfinite_parameter == "head.bias"


def test_refusals() -> None:
    for make_policy in (
        lambda: clip.Chain(clip.GlobalNorm(1.0), clip.Value(1.0)),
        lambda: clip.Value(math.inf),
        lambda: clip.Value(0.0),
        lambda: clip.Value(-1.0),
    ):
        with pytest.raises(ValueError):
            make_policy()
