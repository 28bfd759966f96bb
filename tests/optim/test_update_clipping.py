"""StableAdamW: AdamW(update_clipping=True) against the paper in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from optim.stable_adamw import StableAdamW, give_gradients

import gradfast

SHAPES = [(30, 7), (5,), (), (40_001,), (0,)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_follows_the_paper(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
    oracles = [StableAdamW(p.double().numpy(), decay=0.1, **options) for p in parameters]
    optimizer = gradfast.AdamW(parameters, weight_decay=0.1, update_clipping=True, **options)
    lowered = 0
    for step in range(30):
        give_gradients(parameters, step)
        lowered += sum(
            oracle.step(p.grad.double().numpy()) > 1.5 for oracle, p in zip(oracles, parameters, strict=True)
        )
        optimizer.step()
        if step == 12:
            parameters, optimizer = copy.deepcopy((parameters, optimizer))
    assert lowered > 8
    for oracle, parameter in zip(oracles, parameters, strict=True):
        np.testing.assert_allclose(parameter.double().numpy(), oracle.p, rtol=tolerance, atol=tolerance)


def test_sees_unscaled_gradients_and_skips_nan() -> None:
    results = []
    for scale in (1.0, 256.0):
        parameters = [torch.ones(50, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)]
        optimizer = gradfast.AdamW(parameters, lr=0.1, update_clipping=True)
        if scale != 1:
            optimizer.grad_scale = torch.tensor(scale)
        for step in range(12):
            give_gradients(parameters, step)
            for parameter in parameters:
                parameter.grad *= scale
            if step == 5:
                parameters[1].grad[0, 0] = float("nan")
            optimizer.step()
        assert optimizer.skipped_steps == 1
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
        assert torch.isfinite(one).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_formats_layouts_and_threads_change_nothing(dtype: torch.dtype) -> None:
    """fp32 masters with the gradients of a 16-bit run are the fp32 run; strides and threads are no matter either."""
    shapes = [(300, 7), (150_001,), (4, 3)]
    runs = []
    for kind in ("plain", "strided", "masters"):
        generator = torch.Generator().manual_seed(1)
        parameters = [torch.randn(shape, generator=generator).to(dtype).float() for shape in shapes]
        if kind == "masters":
            parameters = [p.to(dtype) for p in parameters]
        optimizer = gradfast.AdamW(parameters, lr=0.01, update_clipping=True, master_weights=True)
        for step in range(12):
            give_gradients(parameters, step)
            for parameter in parameters:
                parameter.grad = parameter.grad.to(dtype).to(parameter.dtype)
                if kind == "strided" and parameter.ndim == 2:
                    parameter.grad = parameter.grad.t().contiguous().t()
            threads = torch.get_num_threads()
            torch.set_num_threads(1 + step % 3)
            optimizer.step()
            torch.set_num_threads(threads)
        runs.append([optimizer.state[p].get("master_param", p) for p in parameters])
    plain, strided, masters = runs
    for one, second, third in zip(plain, strided, masters, strict=True):
        torch.testing.assert_close(one, second, rtol=1e-6, atol=1e-7)  # sums in another order
        torch.testing.assert_close(one, third, rtol=1e-6, atol=1e-7)


def test_takes_the_place_of_clipping() -> None:
    with pytest.raises(ValueError, match="update_clipping"):
        gradfast.AdamW([torch.ones(3)], max_norm=1.0, update_clipping=True)
