"""Clipping by the global norm."""

from __future__ import annotations

from typing import Any

from gradfast.clip.policies.base import Policy, PolicySettings, check_positive


class GlobalNorm(Policy):
    """Scales all gradients so that their global norm is at most `max_norm`:

        g <- g * min(1, max_norm / (norm + 1e-6))

    Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks". `max_norm=` of an
    optimiser is short for it.

    Args:
        max_norm: the largest norm that is let through; 1 is common, detection models use 35.
        norm_type: p of the norm, at least 1; `inf` for the largest magnitude.
    """

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        super().__init__()
        check_positive("GlobalNorm", max_norm=max_norm)
        if not norm_type >= 1:
            raise ValueError(f"Invalid norm_type of GlobalNorm: {norm_type}; it must be at least 1, or inf")
        self.max_norm, self.norm_type = float(max_norm), float(norm_type)

    def settings(self) -> dict[str, Any]:
        return {"max_norm": self.max_norm, "norm_type": self.norm_type}

    def program(self, parameters: int) -> list[PolicySettings]:
        return [("global_norm", 0, [self.max_norm])]
