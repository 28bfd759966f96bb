"""Leaving out steps whose gradient norm stands out."""

from __future__ import annotations

from typing import Any

from gradfast.clip.policies.base import Policy, PolicySettings, check_positive, check_window


class SkipSpikes(Policy):
    """Skips a step whose norm is far above those before it:

        skip if norm > mean + sigmas * sd,     mean and sd (with n - 1) of the last `window` norms

    once there are `window / 2` of them with this step's own. As OLMo does (OLMo 2, 2025; its optimiser looks at the
    loss as well). A skipped step changes no parameter, state or step count, and is counted in `skipped_steps`.

    In OLMo a spike enters the window as it is, and hides the next ones: a norm of 1000 among 127 of 1 lifts the limit
    to 540. Here it enters as `max(limit, 2 * mean)` at most, which still lets the limit follow when norms stay high:
    a run that changes its level for good is skipped for a while and then goes on.

    Args:
        sigmas: how many standard deviations are let through.
        window: how many norms are remembered, from 2 on.
        exact: let spikes enter as they are, as OLMo does.
    """

    def __init__(self, sigmas: float = 6.0, window: int = 128, exact: bool = False) -> None:
        super().__init__()
        check_positive("SkipSpikes", sigmas=sigmas)
        check_window("SkipSpikes", "window", window)
        self.sigmas, self.window, self.exact = float(sigmas), window, bool(exact)

    def settings(self) -> dict[str, Any]:
        return {"sigmas": self.sigmas, "window": self.window, "exact": self.exact}

    def program(self, parameters: int) -> list[PolicySettings]:
        return [("skip_spikes", self.window, [self.sigmas, float(self.exact)])]
