"""A `max_norm` of a parameter group's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import gradfast
from gradfast import clip

SHAPES = [[(40, 30), (30,)], [(66_001,), ()], [(9,)]]


def make(limits: list[float | None], name: str = "SGD", dtype: torch.dtype = torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    groups = []
    for shapes, limit in zip(SHAPES, limits, strict=True):
        parameters = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        groups.append({"params": parameters, **({} if limit is None else {"max_norm": limit})})
    return groups, getattr(gradfast, name)(groups, lr=0.1, **options)


def give_gradients(groups: list[dict], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def norm_of(tensors: list[Tensor], p: float) -> float:
    return float(torch.linalg.vector_norm(torch.cat([t.double().flatten() for t in tensors]), p))


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
@pytest.mark.parametrize("max_norm", [None, 3.0])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_each_group_is_held_to_its_own_limit(name: str, max_norm: float | None, norm_type: float) -> None:
    """The same as scaling by hand: first all by max_norm, then each group by its own."""
    limits = [0.5, None, 1e6]
    ours, optimizer = make(limits, name, max_norm=max_norm, norm_type=norm_type)
    theirs, plain = make([None] * 3, name)
    for seed in range(4):
        give_gradients(ours, seed)
        everything = [p.grad for group in ours for p in group["params"]]
        whole = norm_of(everything, norm_type)
        overall = 1.0 if max_norm is None else min(1.0, max_norm / (whole + 1e-6))
        for group, other, limit in zip(ours, theirs, limits, strict=True):
            norm = overall * norm_of([p.grad for p in group["params"]], norm_type)
            factor = overall * (1.0 if limit is None else min(1.0, limit / (norm + 1e-6)))
            for mine, copied in zip(group["params"], other["params"], strict=True):
                copied.grad = mine.grad * factor
        optimizer.step()
        plain.step()
        assert optimizer.clip_coef.item() == pytest.approx(overall, rel=1e-9)
    for group, other in zip(ours, theirs, strict=True):
        for mine, copied in zip(group["params"], other["params"], strict=True):
            torch.testing.assert_close(mine, copied, rtol=1e-9, atol=1e-12)


def test_limits_may_change_and_survive_checkpoints() -> None:
    groups, optimizer = make([0.5, None, None])
    give_gradients(groups)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["max_norm"] = 0.25
    before = [p.clone() for p in groups[0]["params"]]
    optimizer.step()
    moved = norm_of([p - old for p, old in zip(groups[0]["params"], before, strict=True)], 2.0)
    assert moved == pytest.approx(0.1 * 0.25, rel=1e-5)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["max_norm"] == 0.5
    plain = torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["max_norm"] == 0.5, "a checkpoint that says nothing of it leaves it as it was"


def test_with_policies_and_on_any_number_of_threads() -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            groups, optimizer = make([0.5, 20.0, None], "AdamW", torch.float32, clip=clip.AdaGC(warmup=2))
            for seed in range(6):
                give_gradients(groups, seed)
                optimizer.step()
            results.append([p for group in groups for p in group["params"]])
    finally:
        torch.set_num_threads(threads)
    for parameters in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0], strict=True))


def test_a_limit_must_be_positive() -> None:
    groups, optimizer = make([-1.0, None, None])
    give_gradients(groups)
    with pytest.raises(ValueError, match=r"param_groups\[0\]"):
        optimizer.step()


def test_a_limit_no_lower_than_the_optimisers_own_changes_no_bit() -> None:
    groups, optimizer = make([3.0, 3.0, 5.0], max_norm=3.0)
    others, plain = make([None, None, None], max_norm=3.0)
    for each in (groups, others):
        give_gradients(each)
    optimizer.step()
    plain.step()
    assert float(plain.clip_coef) < 1
    for group, other in zip(groups, others, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], other["params"], strict=True))
