"""Clipping norms with a high z-score."""

from __future__ import annotations

from typing import Any

from gradfast.clip.policies.base import Policy, PolicySettings, check_positive, check_window


class ZClip(Policy):
    """Clips a norm whose z-score is high, harder the higher it is:

        z     = (norm - mean) / (sd + 1e-6)
        limit = mean + z_limit * sd / (z / z_limit)                 where z > z_limit; else none
        mean <- alpha * mean + (1 - alpha) * min(norm, limit)       and the variance likewise, around the new mean

    after `warmup` norms, whose mean and variance they start from. Kumar, Owen, Roy Chowdhury, Güra 2025, "ZClip:
    Adaptive Spike Mitigation for LLM Pre-Training". Follow it by a `GlobalNorm` for a bound in the warm-up and beyond:
    `Chain(ZClip(), GlobalNorm(1.0))`.

    Two faults of the published code are mended, and change nothing where they do not strike: a NaN is left out (there
    it makes the mean NaN for good), and a spike in the warm-up no longer widens sd for hundreds of steps: once there
    are five norms, one above `max(median + 6 * 1.4826 * MAD, 2 * median)` is clipped to that, and counts for no more.

    Args:
        z: the largest z-score that is let through.
        alpha: how much of mean and variance stays at each step.
        warmup: how many norms they start from.
    """

    def __init__(self, z: float = 2.5, alpha: float = 0.97, warmup: int = 25) -> None:
        super().__init__()
        check_positive("ZClip", z=z)
        if not 0 < alpha < 1:
            raise ValueError(f"Invalid alpha of ZClip: {alpha}; it must be between 0 and 1")
        check_window("ZClip", "warmup", warmup)
        self.z, self.alpha, self.warmup = float(z), float(alpha), warmup

    def settings(self) -> dict[str, Any]:
        return {"z": self.z, "alpha": self.alpha, "warmup": self.warmup}

    def program(self, parameters: int) -> list[PolicySettings]:
        return [("zclip", self.warmup, [self.z, self.alpha])]
