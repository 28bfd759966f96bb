"""What a GradScaler tells the optimiser for the time of one step, as attributes: `grad_scale` and `found_inf`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apply_scaling(optimizer: Any, settings: Any) -> bool:
    """Write the loss scale and the scaler's findings into the engine's `StepSettings`. True if a scaler is in charge.

    `grad_scale` is the factor that the gradients in memory carry; anybody may set it. `found_inf` is set by scalers
    alone: nonzero asks to skip. `gradfast.GradScaler` leaves the search to the step, and then it is no tensor.
    """
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    settings.loss_scale = torch.tensor(float(scale)) if isinstance(scale, (int, float)) else scale
    settings.found_infinite = found if isinstance(found, Tensor) else None
    if found is not None and settings.found_infinite is None:
        settings.propagate = False  # a scaler that has not looked relies on the step to skip
    return found is not None
