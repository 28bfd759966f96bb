"""Stochastic gradient descent with clipping inside the step."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradfast.optim.base import ClippedOptimizer
from gradfast.optim.distributed_checkpoint import called_by_helpers
from gradfast.optim.options import OptionKeywords, takes_options
from gradfast.optim.rule_settings import RuleSettings, learning_rate, number

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGD(ClippedOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` with gradient clipping, L1 decay and protection from non-finite gradients in the same call.

    With `s = min(1, max_norm / (norm + 1e-6))`, for every element:

        g <- s * g + weight_decay * p + l1 * sign(p)
        m <- momentum * m + (1 - dampening) * g          (m <- g at the first step)
        p <- p - lr * (nesterov ? g + momentum * m : m)

    Arguments and state are those of `torch.optim.SGD` (momentum as in Sutskever et al. 2013), and checkpoints go both
    ways. `foreach` and `fused` are accepted and change nothing. For `max_norm`, `clip`, `norm_type`, `l1` and
    `nonfinite` see `ClippedOptimizer`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: `differentiable=True`.
    """

    @takes_options
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[OptionKeywords],
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach)
        self._init_clipping(options, foreach, fused, differentiable)

    def _rule_settings(self, group: dict[str, Any]) -> RuleSettings:
        lr, lr_on_device = learning_rate(group)
        momentum = number("momentum", group["momentum"])
        values = [
            lr,
            momentum,
            number("dampening", group["dampening"]),
            bool(group["nesterov"]),
            number("weight_decay", group["weight_decay"]),
            group.get("l1", 0.0),
            bool(group["maximize"]),
        ]
        if momentum == 0:
            return RuleSettings("sgd", values, [], lr_on_device)
        return RuleSettings("sgd_momentum", values, ["momentum_buffer"], lr_on_device)

    def _fresh_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum_buffer": torch.zeros_like(parameter, memory_format=torch.preserve_format)}

    # A momentum buffer that no step has filled yet, because all were skipped, is saved and copied as `None`: else the
    # first step after that would count as the second, and be damped. Asking waits for a GPU: only where it matters.

    def _unfilled(self) -> list[Tensor]:
        """Return the parameters whose momentum buffer was made but never filled, as the engine counts."""
        damped = any(number("dampening", group["dampening"]) for group in self.param_groups)
        if self._engine is None or not damped:
            return []
        parameters = [self._engine_parameters[index] for index in self._engine.never_updated()]
        # Its user may have taken a state away since, and asking for one that is not there would make it.
        return [parameter for parameter in parameters if parameter in self.state]

    def _forget_engine(self) -> None:
        for parameter in self._unfilled():
            self.state[parameter].pop("momentum_buffer", None)
        super()._forget_engine()

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        unfilled = self._unfilled()
        if unfilled and not called_by_helpers():  # what loads in place needs a tensor there to load into
            identities = {id(parameter) for parameter in unfilled}
            groups = (group["params"] for group in self.param_groups)
            for index, parameter in enumerate(chain.from_iterable(groups)):
                if id(parameter) in identities and index in packed["state"]:
                    packed["state"][index] = {**packed["state"][index], "momentum_buffer": None}
        return packed

    def __getstate__(self) -> dict[str, Any]:
        copied = super().__getstate__()
        copied["state"] = copied["state"].copy()
        for parameter in self._unfilled():
            copied["state"][parameter] = {**copied["state"][parameter], "momentum_buffer": None}
        return copied
