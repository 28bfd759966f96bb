"""The settings of clipping that every optimiser takes: checked, and handed to the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradfast.clip.policies import GlobalNorm, Policy

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


def norm_settings(clip: Policy | None, max_norm: float | None, norm_type: float) -> tuple[float | None, float]:
    """Return `max_norm` and `norm_type` as a policy wants them. `GlobalNorm` alone is nothing else but these two."""
    if clip is None:
        return max_norm, norm_type
    if not isinstance(clip, Policy):
        raise TypeError(f"clip= takes a clip policy such as gradfast.clip.GlobalNorm(1.0), got {clip!r}")
    if max_norm is not None:
        raise ValueError(f"give max_norm={max_norm} or clip={clip!r}, not both; or Chain(..., GlobalNorm({max_norm}))")
    if norm_type not in (2.0, clip.norm_type):
        raise ValueError(
            f"norm_type={norm_type} is not that of {clip!r}; give it there: GlobalNorm(max_norm, norm_type)"
        )
    return clip.max_norm if isinstance(clip, GlobalNorm) else None, clip.norm_type


def check_l1(group: dict[str, Any]) -> None:
    """Raise ValueError if a group's L1 decay is negative or NaN; a group without any does not name it.

    So its keys are those of torch, and `torch.distributed.checkpoint` finds each of them in a checkpoint of torch's.
    """
    if not group.get("l1", 0.0) >= 0.0:
        raise ValueError(f"Invalid l1 value: {group['l1']}")
    if not group.get("l1", True):
        del group["l1"]


def group_limits(groups: Sequence[Mapping[str, Any]], max_norm: float | None) -> list[float]:
    """Return each group's own `max_norm`, infinity where it has none that could act.

    The norm of a part is never above that of the whole: what is no lower than the optimiser's own `max_norm` does
    nothing. `ZeroRedundancyOptimizer` writes that very number into every group.
    """
    limits = [math.inf if group.get("max_norm") is None else float(group["max_norm"]) for group in groups]
    for number, limit in enumerate(limits):
        if not limit > 0:
            raise ValueError(f"Invalid max_norm of param_groups[{number}]: {limit}; it must be positive, or None")
    return [limit if max_norm is None or limit < max_norm else math.inf for limit in limits]


def apply_clipping(settings: Any, max_norm: float | None, norm_type: float, nonfinite: str) -> None:
    """Write the settings of one step into the engine's `StepSettings`."""
    settings.max_norm = math.inf if max_norm is None else max_norm
    settings.norm_type = norm_type
    settings.propagate = nonfinite == "propagate"
