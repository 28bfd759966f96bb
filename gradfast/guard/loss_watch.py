"""Seeing from the loss that a run has left its course."""

from __future__ import annotations

import math
from collections import deque
from statistics import median


class LossWatch:
    """Says that a run diverges when the loss stays far above what it was:

        high      if loss > median + sigmas * 1.4826 * MAD and loss > median * ratio, or the loss is not finite
        diverged  after `patience` high losses in a row

    Median and MAD (the median distance from it) are those of the last `window` losses that were not high, with at least
    a quarter of them. One bad batch is not a divergence, and does not move the median.

    Args:
        sigmas: how far above, in units that are standard deviations for a normal distribution.
        ratio: and at least that many times the median (of a positive one), so that a settled loss may tremble.
        window: losses remembered.
        patience: high losses in a row.
    """

    def __init__(self, sigmas: float = 8.0, ratio: float = 1.5, window: int = 128, patience: int = 10) -> None:
        if not (sigmas > 0 and ratio >= 1 and window >= 8 and patience >= 1):
            raise ValueError(
                f"Invalid LossWatch: {sigmas=} > 0, {ratio=} >= 1, {window=} >= 8, {patience=} >= 1 expected"
            )
        self.sigmas, self.ratio, self.window, self.patience = sigmas, ratio, window, patience
        self.recent: deque[float] = deque(maxlen=window)
        self.high_in_a_row = 0
        self.threshold = math.inf

    def diverged(self, loss: float) -> bool:
        """Take note of a step's loss; return whether that makes a divergence."""
        self.threshold = math.inf
        if len(self.recent) >= self.window // 4:
            middle = median(self.recent)
            spread = 1.4826 * median(abs(each - middle) for each in self.recent)
            self.threshold = max(middle + self.sigmas * spread, middle * self.ratio if middle > 0 else middle)
        if loss > self.threshold or not math.isfinite(loss):
            self.high_in_a_row += 1
        else:
            self.high_in_a_row = 0
            self.recent.append(loss)
        return self.high_in_a_row >= self.patience

    def reset(self) -> None:
        """Forget the losses since things went wrong: the run was rolled back."""
        self.high_in_a_row = 0
