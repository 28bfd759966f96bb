"""Clipping at a percentile of the norms so far."""

from __future__ import annotations

from typing import Any

from gradfast.clip.policies.base import Policy, PolicySettings, check_window


class AutoClip(Policy):
    """Clips at a percentile of the norms seen so far, this step's included:

        limit = percentile(norms, percentile)          between two norms linearly, as numpy does

    Seetharaman, Wichern, Pardo, Le Roux 2020, "AutoClip: Adaptive Gradient Clipping for Source Separation Networks".
    The default, 10, is theirs: nine steps of ten are clipped. They remember all norms of a run; here the last `window`.

    Args:
        percentile: from 0 (the smallest norm) to 100 (the largest: never clips).
        window: how many norms are remembered, 16 bytes each.
    """

    def __init__(self, percentile: float = 10.0, window: int = 1000) -> None:
        super().__init__()
        if not 0 <= percentile <= 100:
            raise ValueError(f"Invalid percentile of AutoClip: {percentile}; it must be from 0 to 100")
        check_window("AutoClip", "window", window)
        self.percentile, self.window = float(percentile), window

    def settings(self) -> dict[str, Any]:
        return {"percentile": self.percentile, "window": self.window}

    def program(self, parameters: int) -> list[PolicySettings]:
        return [("auto_clip", self.window, [self.percentile])]
