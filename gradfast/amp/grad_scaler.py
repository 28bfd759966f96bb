"""Dynamic loss scaling without the extra pass over the gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from gradfast.optim.base import ClippedOptimizer

# Norms that are finite exactly when every gradient of 32 bits or fewer is: their sums, of doubles, cannot overflow.
_TELLING_NORMS = (1.0, 2.0, math.inf)


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` without its pass over all gradients in search of infinities.

    torch's scaler reads every gradient before it calls the optimiser's step. The step of a gradfast optimiser measures
    the gradients' norm anyway, which is finite exactly when all gradients are: it decides by itself whether to skip,
    and this scaler then takes over what it found, on the device, with no wait for it. Everything else is torch's:
    arguments, `scale`, `unscale_`, `update`, `state_dict` (interchangeable), other optimisers, gradfast optimisers
    whose `norm_type` is neither 1, 2 nor infinity, and the rule that a bad step is skipped, whatever `nonfinite` says.

    The norm, `max_norm` and `grad_norms()` are those of the unscaled gradients. `p.grad` stays scaled, unless
    `unscale_` was called. One difference: an fp64 gradient above 1e154 counts as infinite in the 2-norm.

    Micikevicius et al. 2018, "Mixed precision training".
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Do the optimiser's step with unscaled gradients, or skip it where one is infinite or NaN.

        Returns what `optimizer.step(*args, **kwargs)` returns.

        Raises:
            RuntimeError: called twice since `update()`, or with a `closure` keyword, as torch's.
        """
        result = super().step(optimizer, *args, **kwargs)
        if self.is_enabled() and isinstance(optimizer, ClippedOptimizer) and _measures(optimizer):
            state = self._per_optimizer_states[id(optimizer)]
            found = optimizer.found_infinite()
            if not state["found_inf_per_device"] and found is not None:  # else unscale_() has filled it
                state["found_inf_per_device"] = {found.device: found}
        return result

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[Any, Any]:
        """Search for infinities before the step, but not where the step itself does. Called by torch's `step`."""
        if isinstance(optimizer, ClippedOptimizer) and _measures(optimizer):
            return {}
        return super()._check_inf_per_device(optimizer)


def _measures(optimizer: ClippedOptimizer) -> bool:
    return optimizer.norm_type in _TELLING_NORMS
