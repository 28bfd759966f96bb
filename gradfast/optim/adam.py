"""Adam and AdamW with clipping inside the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradfast.optim.base import ClippedOptimizer
from gradfast.optim.options import OptionKeywords, takes_options
from gradfast.optim.rule_settings import RuleSettings, learning_rate, number, pair

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Adam(ClippedOptimizer):
    """What Adam and AdamW share; `decoupled_weight_decay` of a group tells them apart, as in torch."""

    def _rule_settings(self, group: dict[str, Any]) -> RuleSettings:
        lr, lr_on_device = learning_rate(group)
        values = [
            lr,
            *pair("betas", group["betas"]),
            number("eps", group["eps"]),
            number("weight_decay", group["weight_decay"]),
            group.get("l1", 0.0),
            bool(group["decoupled_weight_decay"]),
            bool(group["maximize"]),
        ]
        if group["amsgrad"]:
            return RuleSettings("adam_amsgrad", values, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"], lr_on_device, True)
        return RuleSettings("adam", values, ["exp_avg", "exp_avg_sq"], lr_on_device, True)

    def _fresh_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        state = {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in keys}
        # On the parameter's device, where a skipped step leaves it uncounted without the host being told.
        return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **state}


class Adam(_Adam, torch.optim.Adam):
    """`torch.optim.Adam` with gradient clipping, L1 decay and protection from non-finite gradients in the same call.

    With `s = min(1, max_norm / (norm + 1e-6))` and t counting this parameter's updates, for every element:

        g <- s * g + weight_decay * p + l1 * sign(p)
        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2                (AMSGrad: u <- max(u, v), else u = v)
        p <- p - lr / (1 - beta1^t) * m / (sqrt(u / (1 - beta2^t)) + eps)

    Arguments and state are those of `torch.optim.Adam` (Kingma and Ba 2015; AMSGrad: Reddi, Kale, Kumar 2018), and
    checkpoints go both ways. `foreach`, `fused` and `capturable` are accepted and change nothing: a step can be
    captured in a CUDA graph as it is. With `decoupled_weight_decay=True` it is AdamW. For `max_norm`, `clip`,
    `norm_type`, `l1` and `nonfinite` see `ClippedOptimizer`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: `differentiable=True`.
    """

    @takes_options
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[OptionKeywords],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._init_clipping(options, foreach, fused, differentiable)


class AdamW(_Adam, torch.optim.AdamW):
    """`torch.optim.AdamW` with gradient clipping, L1 decay and protection from non-finite gradients in the same call.

    As `gradfast.Adam`, but decay acts on the weight and not through the gradient (Loshchilov and Hutter 2019):

        p <- p * (1 - lr * weight_decay);  p <- p - sign(p) * min(|p|, lr * l1)

    The L1 part is its proximal step: it stops at zero. For the further arguments see `ClippedOptimizer`.

    With `update_clipping=True` it is StableAdamW (Wortsman et al. 2023): every parameter's `lr` is divided by
    `max(1, RMS)`, `RMS^2 = (1 - beta2^t) * mean(g^2 / max(v, eps^2))` with g and v as this step's update takes them. It
    may stand in for clipping by a norm: then the step measures it beside the norm, which reads v once more. With
    `max_norm` or a policy, g is known only after the decision, and g and v are read once more between decision and
    update. Of a DTensor the mean is over all of it: it travels in the all-reduce of the norm, or in a second one.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: `differentiable=True`.
    """

    @takes_options
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        update_clipping: bool = False,
        **options: Unpack[OptionKeywords],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable
        )
        self._init_clipping(options, foreach, fused, differentiable)
        self._clips_updates = update_clipping

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_clips_updates": self._clips_updates}
