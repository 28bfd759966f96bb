"""Where torch is wrong, gradfast is right. Each test shows both; where the installed torch is mended, it says so.

The faults were found with torch 2.13 to 2.15 on a CPU. Each test first asserts that torch still has the fault, for else
a comparison with it would prove nothing, and skips itself as fixed upstream where it has not.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import gradfast

LR = {"SGD": 0.1, "Adam": 0.1, "AdamW": 0.1}


def fixed_upstream(what: str) -> None:
    pytest.skip(f"torch {torch.__version__} has this mended: {what}")


def plain(name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
    """One step of torch's single-tensor code on contiguous copies: what the step should be."""
    copied = parameter.detach().clone(memory_format=torch.contiguous_format)
    copied.grad = gradient.clone(memory_format=torch.contiguous_format)
    getattr(torch.optim, name)([copied], lr=0.1, foreach=False).step()
    return copied


@pytest.mark.parametrize("name", LR)
def test_fused_step_with_another_layout_of_the_gradient(name: str) -> None:
    """torch pairs elements by their place in memory: a transposed gradient updates the wrong weights."""
    start, gradient = torch.randn(8, 6), torch.randn(6, 8).t()
    expected = plain(name, start, gradient)
    found = {}
    for module in (torch.optim, gradfast):
        parameter = start.clone()
        parameter.grad = gradient
        getattr(module, name)([parameter], lr=0.1, fused=True).step()
        found[module] = parameter
    torch.testing.assert_close(found[gradfast], expected, rtol=2.0**-20, atol=2.0**-22)
    if torch.allclose(found[torch.optim], expected, atol=1e-3):
        fixed_upstream("a transposed gradient in a fused step")
    assert (found[torch.optim] - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", LR)
def test_fused_step_of_a_view_with_gaps(name: str) -> None:
    """torch walks on through the gaps, and overwrites what belongs to another tensor."""
    neighbours, own = {}, {}
    for module in (torch.optim, gradfast):
        storage = torch.ones(16, 4)
        parameter = storage[::2]
        parameter.grad = torch.ones(8, 4)
        getattr(module, name)([parameter], lr=0.1, fused=True).step()
        neighbours[module], own[module] = storage[1::2], parameter
    assert torch.equal(neighbours[gradfast], torch.ones(8, 4))
    torch.testing.assert_close(own[gradfast], plain(name, torch.ones(8, 4), torch.ones(8, 4)))
    if torch.equal(neighbours[torch.optim], torch.ones(8, 4)):
        fixed_upstream("a fused step of a view with gaps")
    assert not torch.equal(own[torch.optim], own[gradfast])  # and half of the view itself got no update


def test_fused_step_with_an_expanded_gradient() -> None:
    """The gradient of a sum is one number seen at many places. torch reads behind it, so this looks for no value."""
    storage = torch.tensor([1.0, 0.0, 0.0, 0.0])
    start = torch.zeros(4)
    found = {}
    for module in (torch.optim, gradfast):
        parameter = start.clone()
        parameter.grad = storage[:1].expand(4)
        module.SGD([parameter], lr=1.0, fused=True).step()
        found[module] = parameter.tolist()
    assert found[gradfast] == [-1.0] * 4
    if found[torch.optim] == [-1.0] * 4:
        fixed_upstream("an expanded gradient in a fused step")
    assert found[torch.optim] == [-1.0, 0.0, 0.0, 0.0]


def test_fused_sgd_with_a_gradient_that_comes_later() -> None:
    """torch: TypeError, since one momentum buffer is a tensor and the other still None."""

    def train(module: object) -> list[Tensor]:
        parameters = [torch.zeros(2), torch.zeros(3)]
        optimizer = module.SGD(parameters, lr=1.0, momentum=0.5, dampening=0.25, fused=True)
        parameters[0].grad = torch.ones(2)
        optimizer.step()
        parameters[1].grad = torch.ones(3)
        optimizer.step()
        return parameters

    # Second step of the first: 0.5 * 1 + 0.75 * 1 more; first step of the second: undamped.
    assert [p.tolist() for p in train(gradfast)] == [[-2.25] * 2, [-1.0] * 3]
    try:
        theirs = train(torch.optim)
    except TypeError:
        return
    assert [p.tolist() for p in theirs] == [[-2.25] * 2, [-1.0] * 3]
    fixed_upstream("a late first gradient in fused SGD")


def test_norm_of_half_precision_gradients() -> None:
    """256 gradients of 6,000: their norm, 96,000, is more than float16 holds. torch clips them all to zero."""
    gradient = torch.full((256,), 6000.0, dtype=torch.float16)
    found = {}
    for clip in (torch.nn.utils.clip_grad_norm_, gradfast.clip_grad_norm_):
        parameter = torch.zeros(256, dtype=torch.float16)
        parameter.grad = gradient.clone()
        norm = clip([parameter], max_norm=96.0)
        found[clip] = norm.item(), parameter.grad[0].item()
    norm, value = found[gradfast.clip_grad_norm_]
    assert norm == 96_000.0
    assert value == pytest.approx(6.0, rel=2.0**-11)
    parameter = torch.zeros(256, dtype=torch.float16)
    parameter.grad = gradient.clone()
    optimizer = gradfast.SGD([parameter], lr=1.0, max_norm=96.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 96_000.0
    assert parameter[0].item() == pytest.approx(-6.0, rel=2.0**-11)
    if found[torch.nn.utils.clip_grad_norm_][0] == norm:
        fixed_upstream("the norm of float16 gradients")
    assert found[torch.nn.utils.clip_grad_norm_] == (float("inf"), 0.0)


@pytest.mark.parametrize("value", [1e20, 1e-25])
def test_norm_of_huge_and_tiny_gradients(value: float) -> None:
    """Their squares overflow or vanish in float32; summed in double precision they do neither."""
    gradients = [torch.full((100,), value)]
    assert gradfast.get_total_norm(gradients).item() == pytest.approx(10 * value, rel=1e-6, abs=0)
    theirs = torch.nn.utils.get_total_norm(gradients).item()
    if theirs == pytest.approx(10 * value, rel=1e-3, abs=0):
        fixed_upstream("the float32 norm of huge and tiny numbers")
    assert theirs in (0.0, float("inf"))


def test_norm_of_one_long_tensor() -> None:
    """torch adds float32 squares in a few running sums: each addend is rounded to a unit of a sum that keeps growing.

    Equal values make it plain: the sum of 2^25 squares of 1 is exact; of 0.1, torch on a CPU is off by far more than
    float32's own rounding, and the error grows with the length: 1e-2 at the 124 million of a GPT-2.
    """
    length = 1 << 25
    gradient = torch.full((length,), 0.1)
    exact = (length * float(gradient[0]) ** 2) ** 0.5
    assert gradfast.get_total_norm([gradient]).item() == pytest.approx(exact, rel=2.0**-24)
    error = abs(torch.nn.utils.get_total_norm([gradient]).item() / exact - 1)
    if error < 1e-6:
        fixed_upstream("the float32 norm of one long tensor")
    assert error > 1e-5


@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_nan_gradient_spreads_into_every_weight(kind: dict) -> None:
    """Not a fault of the arithmetic: clip_grad_norm_ multiplies by NaN. gradfast skips the step instead."""
    found = {}
    for module in (torch.optim, gradfast):
        parameters = [torch.ones(3), torch.ones(2)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        parameters[0].grad[1] = float("nan")
        if module is torch.optim:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        module.SGD(parameters, lr=0.1, **({"max_norm": 1.0} if module is gradfast else kind)).step()
        found[module] = list(itertools.chain(*(p.tolist() for p in parameters)))
    assert found[gradfast] == [1.0] * 5
    assert all(value != value for value in found[torch.optim])


def test_foreach_sgd_with_nesterov_rewrites_the_gradient() -> None:
    """torch adds the momentum into `p.grad` itself, which the next backward pass, or a logger, takes for a gradient."""
    left = {}
    for module in (torch.optim, gradfast):
        parameter = torch.ones(3)
        parameter.grad = torch.ones(3)
        module.SGD([parameter], lr=0.1, momentum=0.9, nesterov=True, foreach=True).step()
        left[module] = parameter.grad.tolist()
    assert left[gradfast] == [1.0] * 3
    if left[torch.optim] == [1.0] * 3:
        fixed_upstream("gradients after foreach SGD with nesterov")
    assert left[torch.optim] == pytest.approx([1.9] * 3)
