"""Steps with NaN or infinite gradients: skipped whole, propagated as torch does, or raised."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor

import gradfast

BAD = [float("nan"), float("inf"), -float("inf")]


def make(name: str = "Adam", **options: object) -> tuple[list[tuple[str, Tensor]], torch.optim.Optimizer]:
    named = [("first.weight", torch.randn(40)), ("second.bias", torch.randn(3)), ("third.weight", torch.randn(70_000))]
    optimizer = getattr(gradfast, name)(named, lr=0.1, **options)
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    return named, optimizer


def snapshot(named: list[tuple[str, Tensor]], optimizer: torch.optim.Optimizer) -> dict:
    return copy.deepcopy({"parameters": [p.clone() for _, p in named], "state": optimizer.state_dict()["state"]})


def assert_same(left: object, right: object) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {"amsgrad": True})])
def test_skip_changes_nothing_counts_and_names(
    name: str, options: dict, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    named, optimizer = make(name, max_norm=1.0, **options)
    optimizer.step()
    before = snapshot(named, optimizer)
    good = named[1][1].grad.clone()
    named[1][1].grad[2] = bad
    with caplog.at_level(logging.WARNING, logger="gradfast"):
        optimizer.step()
    assert_same(snapshot(named, optimizer), before)
    assert optimizer.skipped_steps == 1
    assert optimizer.nonfinite_parameter == "second.bias"
    assert "second.bias" in caplog.text
    named[1][1].grad = good
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.nonfinite_parameter is None
    assert not torch.equal(named[0][1], before["parameters"][0])


def test_skipped_first_step_leaves_momentum_to_start_afresh() -> None:
    """torch's fused SGD keeps garbage when the first step is skipped; dampening shows whether ours starts over."""
    named, optimizer = make("SGD", momentum=0.9, dampening=0.5)
    saved = [p.grad.clone() for _, p in named]
    named[0][1].grad.fill_(float("nan"))
    optimizer.step()
    assert all(entry["momentum_buffer"] is None for entry in optimizer.state_dict()["state"].values())
    for (_, parameter), gradient in zip(named, saved, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    for (_, parameter), gradient in zip(named, saved, strict=True):
        assert_same(optimizer.state[parameter]["momentum_buffer"], gradient)


@pytest.mark.parametrize("bad", BAD)
def test_propagate_is_what_torch_does(bad: float) -> None:
    named, optimizer = make("SGD", max_norm=1.0, nonfinite="propagate")
    theirs = [p.clone() for _, p in named]
    named[0][1].grad[0] = bad
    for (_, mine), other in zip(named, theirs, strict=True):
        other.grad = mine.grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, lr=0.1).step()
    optimizer.step()
    for (_, mine), other in zip(named, theirs, strict=True):
        # torch rounds the clipped gradient to float32 in between.
        torch.testing.assert_close(mine, other, rtol=2.0**-22, atol=2.0**-24, equal_nan=True)
    assert optimizer.skipped_steps == 0


def test_raise_names_the_parameter_and_changes_nothing() -> None:
    named, optimizer = make("Adam", nonfinite="raise")
    optimizer.step()
    before = snapshot(named, optimizer)
    named[2][1].grad[69_999] = float("nan")
    with pytest.raises(RuntimeError, match=r"third\.weight.*nothing was changed"):
        optimizer.step()
    assert_same(snapshot(named, optimizer), before)


def test_huge_float32_gradients_are_finite_and_clipped() -> None:
    """The square of 1e30 overflows float32, and torch's norm with it; ours is 1e30 * sqrt(n)."""
    parameter = torch.zeros(100)
    parameter.grad = torch.full((100,), 1e30)
    optimizer = gradfast.SGD([parameter], lr=1.0, max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(1e31, rel=1e-6)
    torch.testing.assert_close(parameter, torch.full((100,), -0.1))


def test_half_gradients_do_not_overflow_the_norm() -> None:
    """300 in each of a million places: the norm is 300,000, beyond float16's 65,504."""
    parameter = torch.zeros(1_000_000, dtype=torch.float16)
    parameter.grad = torch.full_like(parameter, 300.0)
    optimizer = gradfast.SGD([parameter], lr=1.0, max_norm=1000.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(300_000.0, rel=1e-7)
    assert optimizer.grad_norm.dtype == torch.float32
    torch.testing.assert_close(parameter, torch.full_like(parameter, -1.0), rtol=2.0**-11, atol=0)
