"""Holding each parameter's gradient to what it was lately."""

from __future__ import annotations

from typing import Any

from gradfast.clip.policies.base import Policy, PolicySettings, check_positive


class AdaGC(Policy):
    """Clips the gradient of every parameter at a multiple of a running mean of its own, clipped norm:

        first `warmup` steps:  h   = min(1, max_norm / |g|)              gamma_i <- min(gamma_i, h |g_i|)
        then:                  h_i = min(1, ratio * gamma_i / |g_i|)     gamma_i <- beta gamma_i + (1 - beta) h_i |g_i|

    Wang et al. 2025, "AdaGC: Improving Training Stability for Large Language Model Pretraining". Here a gradient of
    zero leaves gamma as it is, where the paper's minimum would hold the parameter at zero for good, and a parameter
    whose first gradient comes after the warm-up begins with that. In a `Chain` it stands last.

    Args:
        ratio: how far above its gamma a parameter's norm may be (the paper's lambda_rel).
        beta: how much of gamma stays at each step.
        max_norm: of the global norm in the warm-up (lambda_abs).
        warmup: steps (T_start).
    """

    clips_each_parameter = True

    def __init__(self, ratio: float = 1.05, beta: float = 0.98, max_norm: float = 1.0, warmup: int = 100) -> None:
        super().__init__()
        check_positive("AdaGC", ratio=ratio, max_norm=max_norm)
        if not 0 <= beta < 1:
            raise ValueError(f"Invalid beta of AdaGC: {beta}; it must be at least 0 and below 1")
        if not (isinstance(warmup, int) and warmup >= 1):
            raise ValueError(f"Invalid warmup of AdaGC: {warmup!r}; it must be a whole number of at least 1")
        self.ratio, self.beta, self.max_norm, self.warmup = float(ratio), float(beta), float(max_norm), warmup

    def settings(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "beta": self.beta, "max_norm": self.max_norm, "warmup": self.warmup}

    def program(self, parameters: int) -> list[PolicySettings]:
        return [("ada_gc", parameters, [self.ratio, self.beta, self.max_norm, float(self.warmup)])]
