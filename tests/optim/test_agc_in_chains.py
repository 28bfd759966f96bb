"""AGC beside other clipping: what stands before it, behind it, and for a group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from optim.agc_cases import SHAPES, after_agc, copies, norm_of, tensors

import gradfast
from gradfast import clip

BEHIND: dict[str, Callable[[], clip.Policy]] = {
    "norm": lambda: clip.GlobalNorm(1.0),
    "each": lambda: clip.PerParameterNorm(0.2),
    "AdaGC": lambda: clip.AdaGC(warmup=2, beta=0.5),
    "several": lambda: clip.Chain(clip.SkipSpikes(3.0, 4), clip.ZClip(warmup=3), clip.GlobalNorm(2.0)),
}


@pytest.mark.parametrize("name", BEHIND)
def test_policies_behind_see_what_it_leaves(name: str) -> None:
    """Eight steps with a spike: as those policies alone decide on gradients that the oracle clipped."""
    named = tensors({**SHAPES, "large": (3, 100_001)})
    others = copies(named)
    optimizer = gradfast.AdamW(named.items(), lr=0.1, clip=clip.Chain(clip.AGC(0.3), BEHIND[name]()))
    reference = gradfast.AdamW(others.items(), lr=0.1, clip=BEHIND[name]())
    for step in range(8):
        for key, p in named.items():
            p.grad = tensors({key: p.shape}, seed=step)[key].grad * (20.0 if step == 6 else 1.0)
        left = after_agc(named, clipping=0.3)
        for key, other in others.items():
            other.grad = left[key]
        optimizer.step()
        reference.step()
        assert optimizer.grad_norm.item() == pytest.approx(reference.grad_norm.item(), rel=1e-12)
        assert optimizer.clip_coef.item() == pytest.approx(reference.clip_coef.item(), rel=1e-12)
        for key, p in named.items():
            torch.testing.assert_close(p, others[key], rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")
    assert optimizer.skipped_steps == reference.skipped_steps


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_elements_are_clamped_first(scale: float) -> None:
    """`Chain(Value, AGC)`: units of what clamping leaves, for tensors of every kind of loop."""
    named = tensors({**SHAPES, "wide": (3, 100_001), "turned": (7, 5)})
    turned = named["turned"].detach().t().contiguous().t()
    turned.grad, named["turned"] = named["turned"].grad, turned
    for p in named.values():
        p.grad *= scale
    before = copies(named)
    for p in before.values():
        p.grad = (p.grad / scale).clamp(-0.5, 0.5)
    left = after_agc(before)
    optimizer = gradfast.SGD(named.items(), lr=1.0, clip=clip.Chain(clip.Value(0.5), clip.AGC(0.3)))
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.step()
    for name, p in named.items():
        torch.testing.assert_close(p, before[name] - left[name], rtol=1e-12, atol=1e-14)
    assert optimizer.grad_norm.item() == pytest.approx(norm_of(left), rel=1e-12)


def test_limits_of_groups_are_for_what_it_leaves() -> None:
    named = tensors({"a": (4, 5), "b": (3, 3)})
    before, left = copies(named), after_agc(named, clipping=5.0)
    groups = [{"params": [("a", named["a"])], "max_norm": 0.5}, {"params": [("b", named["b"])]}]
    gradfast.SGD(groups, lr=1.0, clip=clip.AGC(5.0)).step()
    norm = left["a"].norm()
    assert norm > 0.5
    torch.testing.assert_close(named["a"], before["a"] - left["a"] * 0.5 / (norm + 1e-6), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(named["b"], before["b"] - left["b"], rtol=1e-12, atol=1e-14)
