"""What an optimiser's step leaves behind, as tensors on the device: gradient norms a step, the rest at samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.optim.report import StepReport


@dataclass
class StepNorms:
    """Of one step. `sums` holds per-parameter sums of |g|^p; clip_coef is NaN where it is not known."""

    grad_norm: Tensor
    clip_coef: Tensor
    sums: Tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its local part, of others all."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.detach()


class Source:
    """Reads an optimiser, ours or torch's.

    gradfast's own leaves norm, clip coefficient and per-parameter sums behind in every step, before clipping. Of
    another the gradients are measured after the step, and only at samples; clipped ones are what it then sees.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module | None) -> None:
        self.optimizer = optimizer
        self.native = isinstance(optimizer, StepReport)
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
        optimizer: Any = self.optimizer
        engine = optimizer._engine
        return StepNorms(engine.grad_norm().double(), engine.coefficient().double(), self._sums(optimizer, engine))

    def _sums(self, optimizer: Any, engine: Any) -> Tensor:
        if optimizer._sharding is not None:  # of whole parameters, the same on all ranks
            joined: Tensor = optimizer._sharding.reduction.sums
            return joined.clone()
        parts = engine.member_sums()
        if len(parts) == 1 and len(parts[0][0]) == len(self.parameters):
            every: Tensor = parts[0][1]  # each parameter has a gradient, on one device: nothing to sort
            return every
        sums = torch.zeros(len(self.parameters), dtype=torch.float64, device=self.device)
        for indices, values in parts:
            sums[torch.tensor(indices, device=self.device)] = values.to(self.device, non_blocking=True)
        return sums

    @torch.no_grad()
    def measured(self) -> StepNorms:
        """The same, by a pass over the gradients."""
        gradients = [own_part(p if p.grad is None else p.grad) for p in self.parameters]
        norms = self._norms(gradients) * torch.tensor([p.grad is not None for p in self.parameters], device=self.device)
        return StepNorms(norms.norm(), torch.full_like(norms[0], math.nan), norms.square())

    @torch.no_grad()
    def copies(self) -> list[Tensor]:
        return [own_part(parameter).clone() for parameter in self.parameters]

    @torch.no_grad()
    def sample(self, before: list[Tensor], grad_norm: Tensor) -> list[Tensor]:
        """Three [n] tensors: norms of the parameters, norms of their change, share of each gradient that is not finite.

        The gradients are read for that unless `grad_norm`, of all of them, is known on the host to be finite.

        Args:
            before: copies of the parameters from before the step; overwritten.
        """
        parameters = [own_part(parameter) for parameter in self.parameters]
        norms = self._norms(parameters)
        torch._foreach_sub_(before, parameters)
        changes, bad = self._norms(before), torch.zeros_like(norms)
        if grad_norm.device.type != "cpu" or not math.isfinite(grad_norm.item()):
            gradients = [None if p.grad is None else own_part(p.grad) for p in self.parameters]
            shares = [
                torch.zeros((), device=self.device) if g is None else (~torch.isfinite(g)).float().mean()
                for g in gradients
            ]
            bad = torch.stack([share.to(self.device, torch.float64) for share in shares])
        return [norms, changes, bad]

    def _norms(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack([norm.to(self.device, torch.float64) for norm in torch._foreach_norm(tensors)])
