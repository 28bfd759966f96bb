"""Policies that change the gradients before their norm is measured: by element, and by unit."""

from __future__ import annotations

import numpy as np
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


def oracle(weight: np.ndarray, gradient: np.ndarray, clipping: float, eps: float) -> np.ndarray:
    """Brock et al. 2021, equation 3, with eps; unit by unit."""
    if weight.ndim <= 1:
        weight, gradient = weight[None], gradient[None]
        return oracle(weight.reshape(1, -1), gradient.reshape(1, -1), clipping, eps).reshape(gradient.shape)[0]
    result = gradient.copy()
    for i in range(len(weight)):
        largest = clipping * max(np.sqrt((weight[i] ** 2).sum()), eps)
        norm = np.sqrt((gradient[i] ** 2).sum())
        if norm > largest:
            result[i] = gradient[i] * largest / max(norm, 1e-6)
    return result


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)]
)
def test_agc_follows_the_paper(dtype: torch.dtype, tolerance: float) -> None:
    named, optimizer = make(clip.AGC(0.3, exclude=["head.*"]), dtype)
    expected = {
        name: p.grad.double().numpy()
        if name == "head.weight"
        else oracle(p.double().numpy(), p.grad.double().numpy(), 0.3, 1e-3)
        for name, p in named.items()
    }
    optimizer.step()
    for name, parameter in named.items():
        np.testing.assert_allclose(parameter.grad.double().numpy(), expected[name], rtol=tolerance, atol=0)
    assert optimizer.grad_norm.item() == pytest.approx(
        np.sqrt(sum((g**2).sum() for g in expected.values())), rel=10 * tolerance
    )
    assert named["conv.weight"][2].abs().max() > 0, "a unit at zero trains"


def test_agc_by_hand() -> None:
    """|W| = 5, |G| = 10, clipping 0.01: the gradient is scaled to 0.05."""
    weight = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    weight.grad = torch.tensor([[6.0, 8.0], [0.3, 0.4]])
    clip.AGC().apply_([weight])
    torch.testing.assert_close(weight.grad, torch.tensor([[0.03, 0.04], [0.3, 0.4]]))


def test_agc_leaves_vectors_alone_on_request() -> None:
    named, optimizer = make(clip.AGC(0.01, vectors=False))
    before = {name: p.grad.clone() for name, p in named.items()}
    optimizer.step()
    for name, parameter in named.items():
        assert torch.equal(parameter.grad, before[name]) == (parameter.ndim <= 1 or parameter.numel() == 0)


@pytest.mark.parametrize("policy", [clip.AGC(0.1), clip.Value(0.5)])
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


@pytest.mark.parametrize("policy", [clip.AGC(0.1), clip.Value(0.5)])
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
        lambda: clip.AGC(clipping=0),
        lambda: clip.AGC(exclude="head"),
        lambda: clip.Value(float("inf")),
    ):
        with pytest.raises(ValueError):
            make_policy()
