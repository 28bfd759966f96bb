"""16-bit parameters with fp32 masters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from optim.narrow import NARROW, OPTIMIZERS, assert_same, parameters, train

import gradfast


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_masters_are_the_float32_run_and_parameters_their_rounding(
    name: str, options: dict, dtype: torch.dtype
) -> None:
    ours = parameters(dtype)
    full = [p.detach().float().requires_grad_() for p in ours]
    optimizer = getattr(gradfast, name)(ours, max_norm=1.0, master_weights=True, **options)
    reference = getattr(gradfast, name)(full, max_norm=1.0, **options)
    for step in range(6):
        train(optimizer, ours, dtype, range(step, step + 1))
        train(reference, full, dtype, range(step, step + 1))
        assert torch.equal(optimizer.grad_norm, reference.grad_norm)
        for mine, other in zip(ours, full, strict=True):
            state = optimizer.state[mine]
            assert state["master_param"].dtype == torch.float32
            assert_same(state["master_param"], other.detach())
            assert_same(mine.detach(), other.detach().to(dtype))
            for key, value in reference.state[other].items():
                assert_same(state[key], value)


def test_masters_keep_what_sixteen_bits_lose() -> None:
    """A thousand updates of 2^-12: each is below half a unit (2^-8) of bf16's 1.0; together they are 0.244."""
    results = {}
    for master in (False, True):
        parameter = torch.ones(10, dtype=torch.bfloat16)
        parameter.grad = torch.ones_like(parameter)
        optimizer = gradfast.SGD([parameter], lr=2.0**-12, master_weights=master)
        for _ in range(1000):
            optimizer.step()
        results[master] = parameter[0].item()
    assert results[False] == 1.0
    assert results[True] == torch.tensor(1 - 1000 * 2.0**-12).bfloat16().item()


def test_masters_only_where_the_parameter_is_narrow() -> None:
    """As mixed models need it: norms in fp32 beside bf16 weights, in one optimiser."""
    narrow, full, double = (torch.ones(5, dtype=t) for t in (torch.bfloat16, torch.float32, torch.float64))
    for parameter in (narrow, full, double):
        parameter.grad = torch.ones_like(parameter)
    optimizer = gradfast.AdamW([narrow, full, double], lr=0.1, master_weights=True)
    optimizer.step()
    assert "master_param" in optimizer.state[narrow]
    assert "master_param" not in optimizer.state[full]
    assert "master_param" not in optimizer.state[double]
    assert optimizer.state[narrow]["exp_avg"].dtype == torch.float32
    assert optimizer.state[double]["exp_avg"].dtype == torch.float64
    torch.testing.assert_close(optimizer.state[narrow]["master_param"], full, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}])
def test_layouts(dtype: torch.dtype, options: dict) -> None:
    """Transposed and expanded gradients, a view with gaps: the same result as with everything contiguous."""
    plain = parameters(dtype, [(40, 30), (40, 30), (6, 8)])
    gapped = torch.zeros(6, 16, dtype=dtype)
    views = [plain[0].detach().clone(), plain[1].detach().clone(), gapped[:, ::2]]
    views[2].copy_(plain[2].detach())
    gradient = torch.randn(40, 30).to(dtype)
    row = torch.randn(30).to(dtype)
    last = torch.randn(6, 8).to(dtype)
    plain[0].grad, views[0].grad = gradient, gradient.t().contiguous().t()
    plain[1].grad, views[1].grad = row.expand(40, 30).contiguous(), row.expand(40, 30)
    plain[2].grad, views[2].grad = last, last.clone()
    optimizers = [gradfast.AdamW(each, lr=0.01, max_norm=1.0, **options) for each in (plain, views)]
    for optimizer in optimizers:
        for _ in range(3):
            optimizer.step()
    for mine, other in zip(plain, views, strict=True):
        assert_same(mine.detach(), other)
    assert not gapped[:, 1::2].any()


def test_a_changed_parameter_is_taken_over_by_its_master() -> None:
    """Weights that are loaded or set after the first step count; where nothing changed, the master keeps its bits."""
    parameter = torch.ones(4, dtype=torch.bfloat16)
    parameter.grad = torch.full_like(parameter, 2.0**-12)
    optimizer = gradfast.SGD([parameter], lr=1.0, master_weights=True)
    optimizer.step()
    with torch.no_grad():
        parameter[1] = 5.0
    optimizer.step()
    assert optimizer.state[parameter]["master_param"].tolist() == [1 - 2.0**-11, 5 - 2.0**-12] + [1 - 2.0**-11] * 2


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, gradfast.GradScaler])
def test_pure_fp16_training_with_masters_under_a_scaler(kind: type) -> None:
    """torch's scaler refuses to unscale fp16 gradients in place; in the step they are unscaled as they are widened."""
    parameter = torch.ones(1000, dtype=torch.float16)
    optimizer = gradfast.AdamW([parameter], lr=0.01, master_weights=True, max_norm=1.0)
    scaler = kind("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))
    before = None
    for event in (math.inf, 1.0, math.nan, 1.0):
        parameter.grad = torch.full_like(parameter, event)
        if event != 1.0 and before is not None:
            before = copy.deepcopy((parameter, optimizer.state_dict()["state"]))
        scaler.step(optimizer)
        scaler.update()
        if event != 1.0 and before is not None:
            assert_same((parameter, optimizer.state_dict()["state"]), before)
        before = ()
    assert optimizer.state[parameter]["step"].item() == 2.0
    assert scaler.get_scale() == 256.0
