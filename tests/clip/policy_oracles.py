"""Clip policies in float64, written from the papers with numpy: one object a policy, fed one norm a step.

`step(norm)` returns (coefficient, skip). A norm that is not finite, or zero, leaves no trace; that is the only thing
that the oracles add to the papers, unless they say so.
"""

from __future__ import annotations

import numpy as np


def is_usable(norm: float) -> bool:
    return bool(np.isfinite(norm)) and norm > 0


def coefficient(limit: float, norm: float) -> float:
    return min(1.0, limit / (norm + 1e-6))


class GlobalNorm:
    """Pascanu, Mikolov, Bengio 2013, algorithm 1."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def step(self, norm: float) -> tuple[float, bool]:
        return coefficient(self.max_norm, norm), False


class SkipSpikes:
    """OLMo-core's skip-step optimiser; with `exact=False`, spikes enter as max(limit, 2 * mean) at most."""

    def __init__(self, sigmas: float = 6.0, window: int = 128, exact: bool = True) -> None:
        self.sigmas, self.window, self.exact = sigmas, window, exact
        self.history: list[float] = []

    def step(self, norm: float) -> tuple[float, bool]:
        recent = np.array(self.history[-self.window :])
        skip, sample = False, norm
        # OLMo counts the step's own norm, and of a single other one there is no deviation.
        if len(recent) >= 2 and len(recent) + 1 >= self.window // 2:
            limit = recent.mean() + self.sigmas * recent.std(ddof=1)
            skip = norm > limit
            if skip and not self.exact:
                sample = min(norm, max(limit, 2 * recent.mean()))
        if is_usable(norm):
            self.history.append(sample)
        return 1.0, bool(skip)


class ZClip:
    """Kumar et al. 2025, algorithm 1. The caller keeps spikes out of the warm-up."""

    def __init__(self, z: float = 2.5, alpha: float = 0.97, warmup: int = 25) -> None:
        self.z, self.alpha, self.warmup = z, alpha, warmup
        self.buffer: list[float] = []
        self.mean = self.variance = np.nan

    def step(self, norm: float) -> tuple[float, bool]:
        if len(self.buffer) < self.warmup:
            if is_usable(norm):
                self.buffer.append(norm)
                self.mean, self.variance = np.mean(self.buffer), np.var(self.buffer)
            return 1.0, False
        deviation = np.sqrt(self.variance)
        z = (norm - self.mean) / (deviation + 1e-6)
        limit = np.inf
        if z > self.z:
            limit = self.mean + self.z * deviation / (z / self.z)
        if is_usable(norm):
            sample = min(norm, limit)
            self.mean = self.alpha * self.mean + (1 - self.alpha) * sample
            self.variance = self.alpha * self.variance + (1 - self.alpha) * (sample - self.mean) ** 2
        return coefficient(limit, norm), False


class AutoClip:
    """Seetharaman et al. 2020, with a bounded history."""

    def __init__(self, percentile: float = 10.0, window: int = 1000) -> None:
        self.percentile, self.window = percentile, window
        self.history: list[float] = []

    def step(self, norm: float) -> tuple[float, bool]:
        if not is_usable(norm):
            return 1.0, False
        self.history.append(norm)
        return coefficient(np.percentile(self.history[-self.window :], self.percentile), norm), False


class Chain:
    """Each sees what those before it let through, until one skips."""

    def __init__(self, *policies) -> None:
        self.policies = policies

    def step(self, norm: float) -> tuple[float, bool]:
        total = 1.0
        for policy in self.policies:
            factor, skip = policy.step(norm * total)
            if skip:
                return total, True
            total *= factor
        return total, False


class PerParameterNorm:
    """`step` takes the norms of all parameters and returns a coefficient each."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def step(self, norms: np.ndarray) -> np.ndarray:
        return np.minimum(1.0, self.max_norm / (norms + 1e-6))


class AdaGC:
    """Wang et al. 2025, algorithm 1. Zeros leave gamma alone; the caller leaves out steps that are not finite."""

    def __init__(self, ratio: float = 1.05, beta: float = 0.98, max_norm: float = 1.0, warmup: int = 100) -> None:
        self.ratio, self.beta, self.max_norm, self.warmup = ratio, beta, max_norm, warmup
        self.steps = 0
        self.gamma: np.ndarray | None = None

    def step(self, norms: np.ndarray) -> np.ndarray:
        if not norms.any():
            return np.ones(len(norms))
        if self.gamma is None:
            self.gamma = np.full(len(norms), np.nan)  # NaN: no gradient seen yet
        if self.steps < self.warmup:
            whole = np.sqrt((norms**2).sum())
            factors = np.full(len(norms), coefficient(self.max_norm, whole))
            gamma = np.fmin(self.gamma, factors * norms)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                factors = np.fmin(self.ratio * self.gamma / norms, 1.0)
            factors[np.isnan(factors)] = 1.0
            gamma = self.beta * self.gamma + (1 - self.beta) * factors * norms
            gamma = np.where(np.isnan(self.gamma), norms, gamma)
        self.gamma = np.where(norms > 0, gamma, self.gamma)
        self.steps += 1
        return factors
