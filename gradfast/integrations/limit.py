"""One clipping limit out of two: the framework's and the optimiser's own."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from gradfast.optim.base import ClippedOptimizer


def unwrapped(optimizer: Any) -> Any:
    """Return the optimiser inside the wrappers that frameworks put around it."""
    while not isinstance(optimizer, ClippedOptimizer) and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def lower_limit(optimizer: ClippedOptimizer, own: float | None, max_norm: float, norm_type: float) -> None:
    """Have the optimiser clip to the smaller of its own limit and the framework's, as clipping twice would.

    Args:
        optimizer: whose `max_norm` is set.
        own: the limit that it was made with.
        max_norm: the framework's; infinity for none.
        norm_type: of the framework's limit.

    Raises:
        ValueError: both have a limit, each on a norm of another type: no single limit does the same.
    """
    if max_norm == float("inf"):
        optimizer.max_norm = own
    elif own is None:
        optimizer.max_norm, optimizer.norm_type = max_norm, float(norm_type)
    elif float(norm_type) == optimizer.norm_type:
        optimizer.max_norm = min(own, max_norm)
    else:
        raise ValueError(
            f"the optimizer clips the {optimizer.norm_type}-norm to {own} and the framework is asked to clip the "
            f"{norm_type}-norm to {max_norm}: set only one of the two"
        )
