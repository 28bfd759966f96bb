"""A parameter group as the engine takes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class RuleSettings(NamedTuple):
    """Which rule steps a parameter group, and with what."""

    rule: str  # name of a rule in csrc/rules
    values: list[float]  # its hyper-parameters, in the order of the rule's struct
    states: list[str]  # keys of its states in `state[parameter]`, in the rule's order
    lr: Tensor | None  # the learning rate where it lives on the device, instead of values[0]
    counted: bool = False  # the state must hold a count of updates, "step"


def scalar(value: float | Tensor) -> float:
    """Return a hyper-parameter as a float; a tensor's value is fetched from its device."""
    return value.item() if isinstance(value, Tensor) else float(value)


def learning_rate(group: dict[str, Any]) -> tuple[float, Tensor | None]:
    """Split a group's learning rate into a float, and a tensor where it lives on a device and must stay there."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return 0.0, lr.detach() if lr.dtype in (torch.float32, torch.float64) else lr.detach().float()
    return scalar(lr), None
