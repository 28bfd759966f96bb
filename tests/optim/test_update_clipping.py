"""StableAdamW: AdamW(update_clipping=True) against the paper in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from clip import policy_oracles as oracles
from optim.stable_adamw import StableAdamW, give_gradients

import gradfast
from gradfast import clip

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


class ByMaxNorm:
    """What the gradients are multiplied with, by hand: one number a parameter, None for a skipped step."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {"max_norm": 0.7}

    def __call__(self, norms: np.ndarray, norm: float) -> np.ndarray | None:
        return np.full(len(norms), min(1.0, 0.7 / (norm + 1e-6)))


class ByGroups(ByMaxNorm):
    """Besides, each of two groups by a limit of its own."""

    limits = (0.2, 0.4)

    def __call__(self, norms: np.ndarray, norm: float) -> np.ndarray:
        factors = super().__call__(norms, norm)
        for group, limit in zip((slice(0, 2), slice(2, None)), self.limits, strict=True):
            factors[group] *= min(1.0, limit / (np.sqrt(((factors * norms)[group] ** 2).sum()) + 1e-6))
        return factors


class ByChain:
    def __init__(self) -> None:
        self.options = {"clip": clip.Chain(clip.SkipSpikes(6.0, 8), clip.ZClip(warmup=4), clip.GlobalNorm(0.7))}
        self.rule = oracles.Chain(
            oracles.SkipSpikes(6.0, 8, exact=False), oracles.ZClip(warmup=4), oracles.GlobalNorm(0.7)
        )

    def __call__(self, norms: np.ndarray, norm: float) -> np.ndarray | None:
        factor, skip = self.rule.step(norm)
        return None if skip else np.full(len(norms), factor)


class ByAdaGC:
    def __init__(self) -> None:
        self.options = {"clip": clip.AdaGC(ratio=6.0, warmup=4, beta=0.5)}
        self.rule = oracles.AdaGC(ratio=6.0, warmup=4, beta=0.5)

    def __call__(self, norms: np.ndarray, norm: float) -> np.ndarray:
        return self.rule.step(norms)


@pytest.mark.parametrize("kind", [ByMaxNorm, ByGroups, ByChain, ByAdaGC])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_sees_gradients_as_the_clipping_left_them(
    dtype: torch.dtype, tolerance: float, scale: float, kind: type
) -> None:
    """The size of an update depends on the clip factor wherever v remembers gradients that were clipped otherwise."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    hyper = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
    followed = [StableAdamW(p.double().numpy().copy(), decay=0.1, **hyper) for p in parameters]
    unclipped = copy.deepcopy(followed)
    by_hand = kind()
    groups: list[Any] = parameters
    if kind is ByGroups:
        groups = [
            {"params": parameters[:2], "max_norm": ByGroups.limits[0]},
            {"params": parameters[2:], "max_norm": ByGroups.limits[1]},
        ]
    optimizer = gradfast.AdamW(groups, weight_decay=0.1, update_clipping=True, **by_hand.options, **hyper)
    if scale != 1:
        optimizer.grad_scale = torch.tensor(scale)
    lowered = otherwise = skips = 0
    for step in range(40):
        give_gradients(parameters, step)
        size = (1 + step % 3) / (4000 if step != 30 else 1)
        for parameter in parameters:
            parameter.grad = (parameter.grad.double() * size * scale).to(dtype)
        gradients = [p.grad.double().numpy() / scale for p in parameters]
        norms = np.array([np.sqrt((g**2).sum()) for g in gradients])
        factors = by_hand(norms, float(np.sqrt((norms**2).sum())))
        optimizer.step()
        skips += factors is None
        if factors is not None:
            for oracle, alone, gradient, factor in zip(followed, unclipped, gradients, factors, strict=True):
                rms = oracle.step(factor * gradient)
                lowered += rms > 1.5
                otherwise += abs(rms - alone.step(gradient)) > 0.1
    assert lowered > 8 and otherwise > 8
    assert optimizer.skipped_steps == skips and (skips > 0) == (kind is ByChain)
    for oracle, parameter in zip(followed, parameters, strict=True):
        np.testing.assert_allclose(parameter.double().numpy(), oracle.p, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}, {"clip": clip.AdaGC(warmup=2)}])
def test_halves_and_threads_change_nothing(options: dict[str, Any]) -> None:
    """A step in two halves is that of several devices, where each finds the rates of its own tensors."""
    runs = []
    for halves, threads in ((False, 1), (False, 5), (True, 2)):
        generator = torch.Generator().manual_seed(1)
        parameters = [torch.randn(shape, generator=generator) for shape in [*SHAPES, (300_001,)]]
        optimizer = gradfast.AdamW(parameters, lr=0.01, update_clipping=True, **options)
        if halves:
            optimizer._join_sums = lambda engine: engine.total_sum()
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for step in range(12):
            give_gradients(parameters, step)
            optimizer.step()
        torch.set_num_threads(before)
        runs.append(parameters)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_limit_set_later_is_heeded() -> None:
    results = []
    for late in (False, True):
        parameters = [torch.ones(50, dtype=torch.float64)]
        optimizer = gradfast.AdamW(parameters, lr=0.1, update_clipping=True, max_norm=None if late else 0.5)
        optimizer.max_norm = 0.5
        for step in range(12):
            give_gradients(parameters, step)
            optimizer.step()
        results.append(parameters[0])
    assert torch.equal(*results)
