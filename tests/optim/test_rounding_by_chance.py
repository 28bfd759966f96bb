"""Rounding by chance: unbiased, reproducible, and by the bits that it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from optim.narrow import NARROW, assert_same, parameters, train
from torch import Tensor

import gradfast


def rounded(value: float, dtype: torch.dtype, count: int = 1_000_000, seed: int = 0) -> Tensor:
    """`count` parameters of zero after a step of plain SGD that adds `value` to each, as float64."""
    parameter = torch.zeros(count, dtype=dtype)
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.full((count,), -value)
    gradfast.SGD([parameter], lr=1.0, stochastic_rounding=True, rounding_seed=seed).step()
    return parameter.double()


VALUES = {
    torch.bfloat16: [1.0 + 2.0**-9, -3.3, 1e-30, 1e-40, 2.0**-133 * 1.3, 1e38],
    torch.float16: [1.0 + 2.0**-12, -3.3, 1e-3, 3e-6, 2.0**-24 * 0.3, 60001.0],
}


@pytest.mark.parametrize(("dtype", "value"), [(dtype, value) for dtype, values in VALUES.items() for value in values])
def test_rounding_is_unbiased_with_the_least_variance(dtype: torch.dtype, value: float) -> None:
    """Only the two neighbours occur, the upper in a share f of n = 10^6 cases: the mean is within 5 standard errors.

    f is the distance from the lower neighbour in units of the gap, and the number of upper ones is binomial: standard
    deviation sqrt(n f (1 - f)). Five of them are exceeded in one of 1.7 million tests. The generator is seeded.
    """
    exact = torch.tensor(value, dtype=torch.float32).double().item()  # what float32 makes of it
    found = rounded(value, dtype)
    neighbours = found.unique()
    assert len(neighbours) <= 2
    low, high = neighbours.min().item(), neighbours.max().item()
    if low == high:
        assert low == exact
        return
    nearest = torch.tensor(exact).to(dtype)
    toward = torch.tensor(math.inf if nearest.item() < exact else -math.inf, dtype=dtype)
    assert {low, high} == {nearest.double().item(), torch.nextafter(nearest, toward).double().item()}
    fraction, count = (exact - low) / (high - low), len(found)
    error = math.sqrt(fraction * (1 - fraction) / count)
    assert abs((found.mean().item() - exact) / (high - low)) < 5 * error + 2.0**-17
    variance = found.var().item() / (high - low) ** 2
    # The variance of a sample's variance of a two-valued variable: f (1 - f) (1 - 2 f)^2 / n, to first order.
    spread = math.sqrt(fraction * (1 - fraction) / count) * abs(1 - 2 * fraction) + 1 / count
    assert abs(variance - fraction * (1 - fraction)) < 6 * spread + 2.0**-17


@pytest.mark.parametrize("dtype", NARROW)
def test_many_tiny_updates_are_not_lost(dtype: torch.dtype) -> None:
    """256 updates of 1/256 unit: a random walk whose mean over n = 100,000 elements is one unit, within 5 errors."""
    count, steps = 100_000, 256
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    parameter = torch.full((count,), 1.5, dtype=dtype)
    parameter.grad = torch.full_like(parameter, -unit / steps)
    optimizer = gradfast.SGD([parameter], lr=1.0, stochastic_rounding=True)
    for _ in range(steps):
        optimizer.step()
    moved = (parameter.double() - 1.5) / unit
    variance = steps * (1 / steps) * (1 - 1 / steps)
    assert abs(moved.mean().item() - 1) < 5 * math.sqrt(variance / count)
    assert abs(moved.var().item() - variance) < 0.1  # that of a Poisson-like count of ups
    nearest = torch.full((count,), 1.5, dtype=dtype)
    nearest.grad = torch.full_like(nearest, -unit / steps)
    plain = gradfast.SGD([nearest], lr=1.0)
    for _ in range(steps):
        plain.step()
    assert nearest.unique().item() == 1.5  # to nearest, all of it is lost


def test_random_bits_of_elements_steps_parameters_and_seeds_are_independent() -> None:
    """Correlations of a million ups and downs stay within 5 / sqrt(n)."""
    count = 1_000_000

    def ups(seed: int) -> list[Tensor]:
        pair = [torch.zeros(count, dtype=torch.bfloat16) for _ in range(2)]
        optimizer = gradfast.SGD(pair, lr=1.0, stochastic_rounding=True, rounding_seed=seed)
        seen = []
        for _ in range(2):
            for parameter in pair:
                parameter.zero_()
                parameter.grad_dtype = torch.float32
                parameter.grad = torch.full((count,), -(1.0 + 2.0**-8))  # halfway
            optimizer.step()
            seen += [(p.double() > 1.0).double() * 2 - 1 for p in pair]
        return seen

    series = ups(0) + ups(1)
    bound = 5 / math.sqrt(count)
    for i, left in enumerate(series):
        assert abs(left.mean().item()) < bound
        for lag in (1, 2, 3, 4, 8, 512):
            assert abs((left[lag:] * left[:-lag]).mean().item()) < bound
        for right in series[:i]:
            assert abs((left * right).mean().item()) < bound


@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"state_dtype": torch.bfloat16}])
@pytest.mark.parametrize("dtype", NARROW)
def test_bits_do_not_depend_on_threads_or_neighbours(dtype: torch.dtype, options: dict) -> None:
    """One thread or three; alone the tensor is one of few chunks, before others it is cut into tasks differently."""
    results = []
    threads = torch.get_num_threads()
    for count, others in ((1, 0), (3, 0), (3, 5)):
        torch.set_num_threads(count)
        ours = parameters(dtype, [(200_001,)] + [(3000 + i,) for i in range(others)])
        optimizer = gradfast.AdamW(ours, lr=0.01, rounding_seed=7, **options)
        train(optimizer, ours, dtype, range(4))
        results.append([ours[0].detach(), optimizer.state[ours[0]]["exp_avg_sq"]])
    torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    again = parameters(dtype, [(200_001,)])
    train(gradfast.AdamW(again, lr=0.01, rounding_seed=8, **options), again, dtype, range(4))
    if "stochastic_rounding" in options:
        assert not torch.equal(again[0], results[0][0])


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011) of n counters, [n, 4] of uint32, written anew from the paper."""
    low = np.uint64(0xFFFFFFFF)
    c = counter.astype(np.uint64)
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[:, 0], np.uint64(0xCD9E8D57) * c[:, 2]
        c = np.stack(
            [(b >> np.uint64(32)) ^ c[:, 1] ^ key[0], b & low, (a >> np.uint64(32)) ^ c[:, 3] ^ key[1], a & low], 1
        )
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return c.astype(np.uint32)


@pytest.mark.parametrize("dtype", NARROW)
def test_bits_are_those_of_seed_step_parameter_and_element(dtype: torch.dtype) -> None:
    """From zero with lr = 1 the exact result is -g; each element must go the way that its own 16 bits say.

    The kernels for CUDA are held to the same function by tests/device/test_mixed.cpp.
    """
    zeros = philox(np.zeros((1, 4), np.uint32), 0)
    assert zeros.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]  # published with the generator
    count, seed, number, steps = 10_007, 0x123456789ABCDEF, 1, 3
    other, parameter = torch.zeros(5, dtype=dtype), torch.zeros(count, dtype=dtype)
    optimizer = gradfast.SGD([other, parameter], lr=1.0, stochastic_rounding=True, rounding_seed=seed)
    exponents = torch.linspace(-26 if dtype == torch.float16 else -140, 12, count)
    for step in range(steps):
        exact = torch.randn(count) * torch.exp2(exponents)
        parameter.zero_()
        for each, gradient in ((other, torch.ones(5)), (parameter, -exact)):
            each.grad_dtype = torch.float32
            each.grad = gradient
        optimizer.step()
        element = np.arange(count)
        counter = np.stack([element // 4, 0 * element, 0 * element + step, 0 * element + number], 1).astype(np.uint32)
        words = philox(counter, seed)[element, element % 4] & 0xFFFF
        # The neighbours of the magnitude, and how far along it lies, all exact in float64.
        magnitude = exact.double().abs()
        nearest = magnitude.to(dtype)
        below = torch.where(nearest.double() > magnitude, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
        above = torch.nextafter(below, torch.full_like(below, math.inf)).double()
        share = ((magnitude - below.double()) / (above - below.double())).numpy()
        if dtype == torch.bfloat16:
            up = words + share * 65536 >= 65536
        else:
            subnormal = (magnitude < 2.0**-14).numpy()
            up = np.where(subnormal, share > (words + 0.5) / 65536, words // 8 + share * 8192 >= 8192)
        expected = torch.where(torch.from_numpy(up), above, below.double()).copysign(exact.double())
        assert_same(parameter.double(), expected)


def test_nothing_finite_becomes_infinite_by_chance() -> None:
    for dtype, value in ((torch.float16, 65_504.0), (torch.bfloat16, torch.finfo(torch.bfloat16).max)):
        assert rounded(value, dtype, 10_000).unique().item() == value
    assert rounded(65_519.0, torch.float16, 10_000).unique().item() == 65_504.0  # as to nearest
    assert rounded(65_520.0, torch.float16, 100).unique().item() == math.inf
