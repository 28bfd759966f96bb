"""One record for each thing that happened to a run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Event:
    """Something out of the ordinary in one step.

    Attributes:
        step: counted from 1.
        rule: "nonfinite" for a NaN or infinite norm, "spike" for one far above those before, "max_norm" or the name of
            a clip policy; of a guard also "skips" for too many in a row and "loss" for one that left its course.
        norm: global gradient norm before clipping.
        threshold: what the norm was held against, or the count of skips, or the loss; None for "nonfinite".
        action: what was done: "skipped", "clipped", "applied", "rolled back", "stopped".
        worst: (parameter, its gradient norm), the largest or the non-finite first.
        message: all of it in words, with the first bad layer where it was looked for.
    """

    step: int
    rule: str
    norm: float
    threshold: float | None
    action: str
    worst: list[tuple[str, float]] = field(default_factory=list)
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the event as JSON takes it."""
        return asdict(self)


class SpikeRule:
    """A norm above `factor` times the median of the last `window` finite ones is a spike; the first 16 never are."""

    def __init__(self, factor: float, window: int = 128) -> None:
        self.factor = factor
        self.recent: deque[float] = deque(maxlen=window)

    def threshold(self, norm: float) -> float | None:
        """Take note of a norm; return the threshold if it lies above."""
        found = None
        if len(self.recent) >= 16:
            limit = self.factor * sorted(self.recent)[len(self.recent) // 2]
            found = limit if norm > limit else None
        if math.isfinite(norm):
            self.recent.append(norm)
        return found


def worst(names: Sequence[str], norms: Sequence[float], most: int = 3) -> list[tuple[str, float]]:
    """The parameters with the largest norms, non-finite ones first."""
    order = sorted(range(len(norms)), key=lambda i: (finite := math.isfinite(norms[i]), -norms[i] if finite else 0.0))
    return [(names[i], norms[i]) for i in order[:most]]
