"""What the doctor says: a finding, with its evidence and the line that mends it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

ERROR, WARNING = "error", "warning"
DROP_BAD = (
    "keep = torch.isfinite(inputs).flatten(1).all(1); inputs, targets = inputs[keep], targets[keep]   # and find the "
    "sample in the data set"
)


@dataclass
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a stable key, as "forward-explodes"; docs/doctor.md lists them.
        severity: "error" where training will fail, "warning" where it will suffer.
        title: one sentence.
        evidence: the numbers that it rests on.
        mend: the line that mends it: Python, of the user's `model`, `inputs`, `targets`, `output` and `loss`.
        layers: the layers concerned, the worst first.
    """

    kind: str
    severity: str
    title: str
    evidence: str
    mend: str
    layers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.severity}: {self.title}\n  evidence: {self.evidence}\n  mend: {self.mend}"


@dataclass
class Trend:
    """A straight line through the logarithms of positive values.

    Attributes:
        total: by what factor the line changes from the first value to the last.
        step: by what factor from one value to the next.
        fit: how much of the logarithms' variance the line explains, 0 to 1.
    """

    total: float
    step: float
    fit: float


def trend(values: Sequence[float]) -> Trend | None:
    """Fit a line to log(values); None for fewer than six values, or any that is not positive and finite."""
    if len(values) < 6 or not all(0 < value < math.inf for value in values):
        return None
    logs = [math.log(value) for value in values]
    centre, mean = (len(logs) - 1) / 2, sum(logs) / len(logs)
    spread = sum((number - centre) ** 2 for number in range(len(logs)))
    slope = sum((number - centre) * log for number, log in enumerate(logs)) / spread
    variance = sum((log - mean) ** 2 for log in logs)
    fit = slope**2 * spread / variance if variance > 0 else 0.0
    return Trend(_exp(slope * (len(logs) - 1)), _exp(slope), fit)


def _exp(power: float) -> float:
    return math.exp(min(power, 700.0))


def some(names: Sequence[str], most: int = 3) -> str:
    """A few names for a sentence."""
    shown = ", ".join(name or "the model itself" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
