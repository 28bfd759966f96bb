"""What a step does to the weights under each way of clipping, in float64 with numpy: W <- W - clipped gradient.

`step(weights, gradients)` returns the new weights. The rules of the norm are those of `policy_oracles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from clip.policy_oracles import coefficient
from optim.stable_adamw import StableAdamW

Arrays = list[np.ndarray]


def is_finite(gradients: Sequence[np.ndarray]) -> bool:
    return all(bool(np.isfinite(gradient).all()) for gradient in gradients)


def global_norm(gradients: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(sum((gradient**2).sum() for gradient in gradients)))


class Clipped:
    """One rule after the other, each on what is left; a step that is not finite, or that a rule skips, is left out."""

    def __init__(self, *rules: Callable[[Arrays, Arrays], Arrays | None]) -> None:
        self.rules = rules

    def step(self, weights: Arrays, gradients: Arrays) -> Arrays:
        if not is_finite(gradients):
            return weights
        left: Arrays | None = gradients
        for rule in self.rules:
            assert left is not None
            left = rule(weights, left)
            if left is None:
                return weights
        assert left is not None
        return [weight - gradient for weight, gradient in zip(weights, left, strict=True)]


def whole(oracle: Any) -> Callable[[Arrays, Arrays], Arrays | None]:
    """A policy of the global norm: one factor for all."""

    def rule(_: Arrays, gradients: Arrays) -> Arrays | None:
        factor, skip = oracle.step(global_norm(gradients))
        return None if skip else [factor * gradient for gradient in gradients]

    return rule


def each(oracle: Any) -> Callable[[Arrays, Arrays], Arrays]:
    """A policy of every parameter's norm: a factor for each."""

    def rule(_: Arrays, gradients: Arrays) -> Arrays:
        factors = oracle.step(np.array([np.sqrt((gradient**2).sum()) for gradient in gradients]))
        return [factor * gradient for factor, gradient in zip(factors, gradients, strict=True)]

    return rule


def elements(limit: float) -> Callable[[Arrays, Arrays], Arrays]:
    return lambda _, gradients: [np.clip(gradient, -limit, limit) for gradient in gradients]


def units(clipping: float, eps: float) -> Callable[[Arrays, Arrays], Arrays]:
    """Brock et al. 2021, equation 3, unit by unit; a vector or a scalar is one unit."""

    def scaled(weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        gradient = np.asarray(gradient)
        result = gradient.copy()
        rows = [...] if weight.ndim <= 1 else range(len(weight))
        for row in rows:
            largest = clipping * max(np.sqrt((weight[row] ** 2).sum()), eps)
            norm = np.sqrt((gradient[row] ** 2).sum())
            if norm > largest:
                result[row] = gradient[row] * largest / max(norm, 1e-6)
        return result

    return lambda weights, gradients: [scaled(w, g) for w, g in zip(weights, gradients, strict=True)]


def groups(limits: Sequence[float]) -> Callable[[Arrays, Arrays], Arrays]:
    """A limit for every parameter's group, each of a single parameter."""

    def rule(_: Arrays, gradients: Arrays) -> Arrays:
        return [g * coefficient(limit, global_norm([g])) for g, limit in zip(gradients, limits, strict=True)]

    return rule


class Stable:
    """StableAdamW: the clipping is of the update, so that the whole step is the oracle."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.each: list[StableAdamW] = []

    def step(self, weights: Arrays, gradients: Arrays) -> Arrays:
        if not self.each:
            self.each = [StableAdamW(weight, **self.options) for weight in weights]
        if is_finite(gradients):
            for oracle, gradient in zip(self.each, gradients, strict=True):
                oracle.step(gradient)
        return [oracle.p for oracle in self.each]
