"""Clamping every element of the gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradfast.clip.policies.base import Policy, PolicySettings, check_positive


class Value(Policy):
    """Clamps every element of every gradient, before the norm is measured:

        g <- min(max(g, -limit), limit)

    It happens as the step reads the gradients and costs no pass and no launch; `.grad` stays as backward wrote it. In
    a `Chain` it stands in front. NaN stays NaN, and the step is then dealt with as `nonfinite=` says; an infinite
    element becomes `limit`. Complex parameters are refused with a `NotImplementedError`: their values have no order.

    Args:
        limit: the largest magnitude of an element, of the unscaled gradient under mixed precision.
    """

    clips_before_norm = True

    def __init__(self, limit: float) -> None:
        super().__init__()
        check_positive("Value", limit=limit)
        self.limit = self.element_limit = float(limit)

    def settings(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def program(self, parameters: int) -> list[PolicySettings]:
        return []

    def count_clipped(self, name: str, weight: Tensor, gradient: Tensor, loss_scale: Tensor | float) -> Tensor:
        return (gradient.abs() > self.limit * loss_scale).sum()

    def units(self, weight: Tensor) -> int:
        return weight.numel()
