"""What an optimiser's step leaves behind, as tensors on the device: gradient norms a step, the rest at samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class StepNorms:
    """Of one step. `sums` holds per-parameter sums of |g|^p; clip_coef is NaN where it is not known."""

    grad_norm: Tensor
    clip_coef: Tensor
    sums: Tensor


class Source:
    """Reads an optimiser, ours or torch's.

    gradfast's own leaves norm, clip coefficient and per-parameter sums behind in every step, before clipping. Of
    another the gradients are measured after the step, and only at samples; clipped ones are what it then sees.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module | None) -> None:
        self.optimizer = optimizer
        self.native = hasattr(optimizer, "_measure_and_update")
        known = {id(parameter): name for name, parameter in model.named_parameters()} if model is not None else {}
        self.parameters: list[Tensor] = []
        self.names: list[str] = []
        for number, group in enumerate(optimizer.param_groups):
            given = group.get("param_names")
            for position, parameter in enumerate(group["params"]):
                fallback = given[position] if given else f"param_groups[{number}]['params'][{position}]"
                self.parameters.append(parameter)
                self.names.append(known.get(id(parameter), fallback))
        if not self.parameters:
            raise ValueError("the optimiser has no parameters to monitor")
        self.device = self.parameters[0].device
        self.power = float(getattr(optimizer, "norm_type", 2.0))

    def every_step(self) -> StepNorms | None:
        """Norms of the step just done, copies on the device; None where measuring them would cost a pass."""
        if not self.native:
            return None
        engine: Any = self.optimizer._engine  # type: ignore[attr-defined]
        sums = torch.zeros(len(self.parameters), dtype=torch.float64, device=self.device)
        parts = engine.member_sums()
        if len(parts) == 1 and len(parts[0][0]) == len(self.parameters):
            sums = parts[0][1]  # every parameter has a gradient, on one device: nothing to sort
        else:
            for indices, values in parts:
                sums[torch.tensor(indices, device=self.device)] = values.to(self.device, non_blocking=True)
        return StepNorms(engine.grad_norm().double(), engine.coefficient().double(), sums)

    @torch.no_grad()
    def measured(self) -> StepNorms:
        """The same, by a pass over the gradients."""
        norms = self._norms([p.grad if p.grad is not None else p.new_zeros(()) for p in self.parameters])
        return StepNorms(norms.norm(), torch.full_like(norms[0], math.nan), norms.square())

    @torch.no_grad()
    def copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def sample(self, before: list[Tensor], grad_norm: Tensor) -> list[Tensor]:
        """Three [n] tensors: norms of the parameters, norms of their change, share of each gradient that is not finite.

        The gradients are read for that unless `grad_norm`, of all of them, is known on the host to be finite.

        Args:
            before: copies of the parameters from before the step; overwritten.
        """
        parameters = [parameter.detach() for parameter in self.parameters]
        norms = self._norms(parameters)
        torch._foreach_sub_(before, parameters)
        changes, bad = self._norms(before), torch.zeros_like(norms)
        if grad_norm.device.type != "cpu" or not math.isfinite(grad_norm.item()):
            shares = [
                p.new_zeros(()) if p.grad is None else (~torch.isfinite(p.grad)).float().mean() for p in self.parameters
            ]
            bad = torch.stack([share.to(self.device, torch.float64) for share in shares])
        return [norms, changes, bad]

    def _norms(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack([norm.to(self.device, torch.float64) for norm in torch._foreach_norm(tensors)])
