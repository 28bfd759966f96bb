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


def number(key: str, value: Any) -> float:
    """Return a hyper-parameter as a float; a tensor's value is fetched from its device. TypeError where it is none."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        if not isinstance(value, (str, bytes)):  # of which Python would read a number
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"gradfast: {key}={value!r} is not a number")


def pair(key: str, values: Any) -> tuple[float, float]:
    """Return two hyper-parameters of one key as floats. TypeError where they are not that."""
    try:
        first, second = values
        return number(key, first), number(key, second)
    except (TypeError, ValueError):
        raise TypeError(f"gradfast: {key}={values!r} is not a pair of numbers") from None


def learning_rate(group: dict[str, Any]) -> tuple[float, Tensor | None]:
    """Split a group's learning rate into a float, and a tensor where it lives on a device and must stay there."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return 0.0, lr.detach() if lr.dtype in (torch.float32, torch.float64) else lr.detach().float()
    return number("lr", lr), None
