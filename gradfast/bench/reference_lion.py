"""Lion as one writes it with torch's list operations; torch.optim has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class ReferenceLion(Optimizer):
    """Lion (Chen et al. 2023, algorithm 2) over `torch._foreach_*`: the peer of `gradfast.Lion`, and its oracle."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients: list[Tensor] = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["exp_avg"] for parameter in parameters]
            beta1, beta2 = group["betas"]
            directions = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)

    def undecided(self, parameter: Tensor, relative: float) -> Tensor:
        """Return 1 for elements whose sign in the next step hangs on an error of `relative`, else 0."""
        beta1, _ = self.defaults["betas"]
        assert parameter.grad is not None
        kept = beta1 * self.state[parameter].get("exp_avg", torch.zeros_like(parameter.detach()))
        added = (1 - beta1) * parameter.grad
        return ((kept + added).abs() <= relative * (kept.abs() + added.abs())).to(parameter.dtype)
