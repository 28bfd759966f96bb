"""Lion with clipping inside the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradfast.optim.base import ClippedOptimizer
from gradfast.optim.options import OptionKeywords, takes_options
from gradfast.optim.rule_settings import RuleSettings, learning_rate, number, pair

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Lion(ClippedOptimizer):
    """Steps by the sign of a momentum (Chen et al. 2023), with `s = min(1, max_norm / (norm + 1e-6))`:

        g <- s * g
        p <- p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
        m <- beta2 * m + (1 - beta2) * g

    The authors use a third to a tenth of AdamW's `lr`, and as many times its `weight_decay`. `l1` is decoupled, as in
    AdamW; for the other arguments see `ClippedOptimizer`. Raises ValueError for a hyper-parameter out of range.
    """

    @takes_options
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[OptionKeywords],
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"Invalid Lion settings: {lr=}, {weight_decay=} must be >= 0, {betas=} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})
        self._init_clipping(options)

    def _rule_settings(self, group: dict[str, Any]) -> RuleSettings:
        lr, lr_on_device = learning_rate(group)
        values = [
            lr,
            *pair("betas", group["betas"]),
            number("weight_decay", group["weight_decay"]),
            group.get("l1", 0.0),
            bool(group["maximize"]),
        ]
        return RuleSettings("lion", values, ["exp_avg"], lr_on_device)

    def _fresh_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format)}
