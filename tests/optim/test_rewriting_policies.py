"""The policy that clamps single elements before the norm is measured."""

from __future__ import annotations

import pytest
import torch

import gradfast
from gradfast import clip

SHAPES = {"conv.weight": (6, 3, 2, 2), "conv.bias": (6,), "head.weight": (4, 5), "scale": (), "empty": (0, 3)}


def make(policy: clip.Policy, dtype: torch.dtype = torch.float64) -> tuple[dict[str, torch.Tensor], object]:
    generator = torch.Generator().manual_seed(0)
    named = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()
    }
    for parameter in named.values():
        parameter.grad = (2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(dtype)
    named["conv.weight"][2] = 0  # a unit that begins at zero
    named["head.weight"].grad[1] = 0  # and one without a gradient
    return named, gradfast.SGD(named.items(), lr=1.0, clip=policy)


@pytest.mark.parametrize("policy", [clip.Value(0.5)])
def test_limits_are_of_unscaled_gradients(policy: clip.Policy) -> None:
    named, optimizer = make(policy)
    others, scaled = make(policy)
    for parameter in others.values():
        parameter.grad *= 512.0
    scaled.grad_scale = torch.tensor(512.0)
    optimizer.step()
    scaled.step()
    for name in named:
        torch.testing.assert_close(named[name], others[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("policy", [clip.Value(0.5)])
def test_nan_is_skipped_all_the_same(policy: clip.Policy) -> None:
    named, optimizer = make(policy)
    named["head.weight"].grad[2, 3] = float("nan")
    before = {name: p.clone() for name, p in named.items()}
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.nonfinite_parameter == "head.weight"
    assert all(torch.equal(named[name], before[name]) for name in named)


def test_value_clamps_and_the_norm_is_of_what_is_left() -> None:
    named, optimizer = make(clip.Chain(clip.Value(0.5), clip.GlobalNorm(1.0)))
    clamped = {name: p.grad.clamp(-0.5, 0.5) for name, p in named.items()}
    before = {name: p.clone() for name, p in named.items()}
    norm = torch.sqrt(sum(g.square().sum() for g in clamped.values()))
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)
    for name, parameter in named.items():
        expected = before[name] - clamped[name] / (norm + 1e-6)
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-15)


def test_the_message_names_the_policy_that_skipped() -> None:
    policy = clip.Chain(clip.Value(1e6), clip.GlobalNorm(1e9), clip.SkipSpikes(window=2))
    assert isinstance(policy.decider(1), clip.SkipSpikes)
    named, optimizer = make(policy)
    for size in (1.0, 1.1, 1000.0):
        named["conv.bias"].grad = torch.full((6,), size, dtype=torch.float64)
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert "SkipSpikes" in optimizer._explain_skip()


def test_refusals() -> None:
    for make_policy in (
        lambda: clip.Chain(clip.GlobalNorm(1.0), clip.Value(1.0)),
        lambda: clip.Value(float("inf")),
    ):
        with pytest.raises(ValueError):
            make_policy()
