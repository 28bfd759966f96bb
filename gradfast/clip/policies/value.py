"""Clamping every element of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradfast.clip.policies.base import Policy, PolicySettings, check_positive
from gradfast.clip.reduction import local_tensor


class Value(Policy):
    """Clamps every element of every gradient to `[-limit, limit]`, in place and before the norm is measured.

    Unlike the policies of the norm this is a pass of its own: gradients are read and written once more, 8 bytes a
    parameter in fp32. In a `Chain` it stands in front. NaN stays NaN, and the step is then dealt with as `nonfinite=`
    says; an infinite element becomes `limit`.

    Args:
        limit: the largest magnitude of an element, of the unscaled gradient under mixed precision.
    """

    clips_before_norm = True
    rewrites_gradients = True

    def __init__(self, limit: float) -> None:
        super().__init__()
        check_positive("Value", limit=limit)
        self.limit = float(limit)

    def settings(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def program(self, parameters: int) -> list[PolicySettings]:
        return []

    def rewrite_(self, parameters: Sequence[Tensor], names: Sequence[str], loss_scale: Tensor | None) -> None:
        gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if loss_scale is None or loss_scale.device.type == "cpu":
            scale = 1.0 if loss_scale is None else loss_scale.item()
            torch.ops.gradfast.clip_grad_value_(gradients, self.limit * scale)
            return
        for gradient in gradients:  # the scale is on the device, and stays there
            bound = self.limit * loss_scale.to(gradient.device)
            gradient.clamp_(-bound, bound)

    def count_clipped(self, name: str, weight: Tensor, gradient: Tensor, loss_scale: Tensor | float) -> Tensor:
        return (gradient.abs() > self.limit * loss_scale).sum()

    def units(self, weight: Tensor) -> int:
        return weight.numel()
