"""The settings of clipping that every optimiser takes: checked, and handed to the engine."""

from __future__ import annotations

import math
from typing import Any

NONFINITE = ("skip", "propagate", "raise")
CLIP_SETTINGS = ("max_norm", "norm_type", "nonfinite")


def check_clipping(max_norm: float | None, norm_type: float, nonfinite: str) -> None:
    """Raise ValueError for a setting that makes no sense."""
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"Invalid max_norm value: {max_norm}; it must be positive, or None for no clipping")
    if not norm_type >= 1:
        raise ValueError(f"Invalid norm_type value: {norm_type}; it must be at least 1, or inf")
    if nonfinite not in NONFINITE:
        raise ValueError(f"Invalid nonfinite value: {nonfinite!r}; it must be one of {', '.join(NONFINITE)}")


def check_l1(group: dict[str, Any]) -> None:
    """Raise ValueError if a group's L1 decay is negative or NaN."""
    if not group.get("l1", 0.0) >= 0.0:
        raise ValueError(f"Invalid l1 value: {group['l1']}")


def apply_clipping(settings: Any, max_norm: float | None, norm_type: float, nonfinite: str) -> None:
    """Write the settings of one step into the engine's `StepSettings`."""
    settings.max_norm = math.inf if max_norm is None else max_norm
    settings.norm_type = norm_type
    settings.propagate = nonfinite == "propagate"
