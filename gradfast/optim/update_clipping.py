"""Update clipping of StableAdamW: a learning rate that falls where Adam's denominator lags behind the gradients.

On a CPU the native step does this itself (csrc/cpu/stepper.cpp); here is what tells it the factors on other devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def rate_factors(
    parameters: Sequence[Tensor],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
    loss_scale: Tensor | None,
) -> Tensor:
    """Return the factor on each parameter's learning rate, a float64 tensor on their device; nothing waits for it.

    With v the `exp_avg_sq` that this step will leave, and t its number:

        RMS^2  = (1 - beta2^t) * mean(g^2 / max(v, eps^2))
        factor = 1 / max(1, RMS)

    A few launches for all parameters of a group together, which read gradients and `exp_avg_sq` and make copies of
    their size: about 60 bytes a parameter in fp32, beside the 32 of the step.

    Args:
        parameters: all of the optimiser's, on one device.
        groups: the group of each parameter.
        state: the optimiser's. Parameters without one are at their first step, where RMS is 1.
        loss_scale: the factor that the gradients carry, or None.
    """
    factors = torch.ones(len(parameters), dtype=torch.float64, device=parameters[0].device)
    by_group: dict[int, list[int]] = {}
    for number, parameter in enumerate(parameters):
        if parameter.grad is None or parameter.numel() == 0 or "exp_avg_sq" not in state.get(parameter, ()):
            continue
        by_group.setdefault(id(groups[number]), []).append(number)
    for numbers in by_group.values():
        group = groups[numbers[0]]
        beta2, eps = float(group["betas"][1]), float(group["eps"])
        gradients = [_computable(parameters[number].grad) for number in numbers]
        if loss_scale is not None:
            gradients = [gradient / loss_scale.to(gradient.device, gradient.dtype) for gradient in gradients]
        denominators = [_computable(state[parameters[number]]["exp_avg_sq"]).clone() for number in numbers]
        torch._foreach_mul_(denominators, beta2)
        torch._foreach_addcmul_(denominators, gradients, gradients, 1 - beta2)
        torch._foreach_clamp_min_(denominators, eps * eps)
        torch._foreach_sqrt_(denominators)
        ratios = torch._foreach_norm(torch._foreach_div(gradients, denominators))
        sums = torch.stack([ratio.double() for ratio in ratios]).square()
        sizes = torch.tensor([parameters[number].numel() for number in numbers], dtype=torch.float64)
        steps = torch.stack([state[parameters[number]]["step"].double() for number in numbers]) + 1
        mean_squares = (1 - beta2**steps) * sums / sizes.to(sums.device, non_blocking=True)
        factors[torch.tensor(numbers, device=factors.device)] = mean_squares.clamp(min=1.0).rsqrt()
    return factors


def _computable(tensor: Any) -> Tensor:
    """A 16-bit tensor in fp32, as the step computes."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
