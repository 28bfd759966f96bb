"""From the numbers of steps and samples, on the host, to the metrics that are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradfast.monitor.gather import Source
from gradfast.monitor.grouping import join
from gradfast.monitor.window import StepNumbers


class StepView:
    """One step's gradients, parameter by parameter.

    Attributes:
        grad: norms before clipping, of the true gradients.
        factors: what the policy or the group's limit multiplied each gradient with, beside the coefficient for all.
    """

    def __init__(self, source: Source, step: StepNumbers) -> None:
        self.norm, self.coefficient = step.grad_norm, step.clip_coef
        self.grad = roots(step.sums, step.grad_norm, source.power)
        self.factors = [1.0] * len(self.grad)
        if math.isfinite(self.norm):
            self._of_policy(source, step)
            self._of_groups(source, step)

    @property
    def clipped(self) -> list[float]:
        """Norms after all clipping; NaN where the coefficient is not known."""
        return [norm * self.coefficient * factor for norm, factor in zip(self.grad, self.factors)]

    def _of_policy(self, source: Source, step: StepNumbers) -> None:
        if source.by_parameter is None:
            return
        chain = source.chain
        left = torch.tensor(self.grad, dtype=torch.float64) * self.coefficient
        self.factors = chain.parameter_coefficients(torch.tensor(step.memory, dtype=torch.float64), left).tolist()

    def _of_groups(self, source: Source, step: StepNumbers) -> None:
        for limit, indices in zip(step.group_limits, source.group_indices):
            norm = join(self.grad, indices, source.power) * self.coefficient
            factor = min(1.0, limit / (norm + 1e-6)) if limit < math.inf else 1.0
            for index in indices:
                self.factors[index] *= factor


def roots(sums: Sequence[float], norm: float, power: float) -> list[float]:
    """Norms from sums of powers. Under a loss scale these are of the scaled gradients, and `norm` is not."""
    root = 1.0 if power == math.inf else 1.0 / power
    whole = (max(sums) if power == math.inf else sum(sums)) ** root
    unscale = norm / whole if math.isfinite(norm) and 0 < whole < math.inf else 1.0
    return [value**root * unscale if math.isfinite(value) else value for value in sums]


def of_window(steps: Sequence[StepView]) -> dict[str, float]:
    """Of all steps since the last sample."""
    finite = [step for step in steps if math.isfinite(step.norm)]
    clipped = [step.coefficient < 1 or min(step.factors) < 1 for step in finite]
    return {
        "grad_norm": steps[-1].norm,
        "grad_norm_clipped": steps[-1].norm * steps[-1].coefficient,
        "clip_coef": steps[-1].coefficient,
        "grad_norm_max": max((step.norm for step in finite), default=math.nan),
        "clip_fraction": sum(clipped) / len(clipped) if clipped else 0.0,
        "nonfinite_steps": float(len(steps) - len(finite)),
    }


class GroupMetrics:
    """Joins the parameters' numbers to those of their groups."""

    def __init__(self, source: Source, groups: Mapping[str, Sequence[int]]) -> None:
        self.source, self.groups = source, groups
        self.sizes = [parameter.numel() for parameter in source.parameters]

    def of(self, steps: Sequence[StepView], sample: Mapping[str, Sequence[float]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        power = self.source.power
        power_before = power if self.source.before_norm is None else 2.0
        clipped = steps[-1].clipped if self.source.native else None
        each = self.clip_fractions(steps, sample)
        if clipped is not None and each is not None:
            everything = range(len(clipped))
            metrics["grad_norm"] = join(sample["grad"], everything, power_before)
            metrics["grad_norm_clipped"] = join(clipped, everything, power)
        for group, indices in self.groups.items():
            weights = join(sample["param"], indices)
            metrics[f"l2_norm/grad/{group}"] = join(sample["grad"], indices, power_before)
            if clipped is not None:
                metrics[f"l2_norm/grad_clipped/{group}"] = join(clipped, indices, power)
            metrics[f"l2_norm/param/{group}"] = weights
            metrics[f"update_ratio/{group}"] = join(sample["update"], indices) / weights if weights else 0.0
            metrics[f"nonfinite/{group}"] = self.share(sample["bad"], self.sizes, indices)
            if each is not None:
                metrics[f"clip_fraction/{group}"] = self.share(*each, indices)
        return metrics

    def clip_fractions(
        self, steps: Sequence[StepView], sample: Mapping[str, Sequence[float]]
    ) -> tuple[Sequence[float], Sequence[float]] | None:
        """Of each parameter how often, and of how many, its gradient was clipped by itself; None where none can be.

        Of a policy that clips before the norm, units in the sampled step; of others, steps since the last sample.
        """
        policy = self.source.before_norm
        if policy is not None:
            return sample["clipped_units"], [policy.units(parameter) for parameter in self.source.parameters]
        if self.source.by_parameter is None and not self.source.limited:
            return None
        finite = [step for step in steps if math.isfinite(step.norm)]
        counts = [float(sum(column)) for column in zip(*([f < 1 for f in step.factors] for step in finite))]
        return counts or [0.0] * len(self.sizes), [float(len(finite))] * len(self.sizes)

    @staticmethod
    def share(counts: Sequence[float], of: Sequence[Any], indices: Sequence[int]) -> float:
        total = sum(of[i] for i in indices)
        return sum(counts[i] for i in indices) / total if total else 0.0
