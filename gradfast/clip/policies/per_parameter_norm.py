"""Clipping each parameter's gradient by itself."""

from __future__ import annotations

from typing import Any

from gradfast.clip.policies.base import Policy, PolicySettings, check_positive


class PerParameterNorm(Policy):
    """Scales the gradient of every parameter so that its own norm is at most `max_norm`:

        g_i <- g_i * min(1, max_norm / (|g_i| + 1e-6))

    Unlike `GlobalNorm` this changes the direction of the whole step. In a `Chain` it stands last.

    Args:
        max_norm: the largest norm of one parameter's gradient.
        norm_type: p of the norm, at least 1; `inf` for the largest magnitude.
    """

    clips_each_parameter = True

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        super().__init__()
        check_positive("PerParameterNorm", max_norm=max_norm)
        if not norm_type >= 1:
            raise ValueError(f"Invalid norm_type of PerParameterNorm: {norm_type}; it must be at least 1, or inf")
        self.max_norm, self.norm_type = float(max_norm), float(norm_type)

    def settings(self) -> dict[str, Any]:
        return {"max_norm": self.max_norm, "norm_type": self.norm_type}

    def program(self, parameters: int) -> list[PolicySettings]:
        return [("parameter_norm", 0, [self.max_norm])]
