"""Activations by name: the module that computes each, and the gain that keeps the signal's size through it."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name -> module. The names are torch.nn.init.calculate_gain's and torch.nn.functional's.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu6": nn.ReLU6,
    "prelu": nn.PReLU,
    "celu": nn.CELU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "softplus": nn.Softplus,
}
SATURATING = ("sigmoid", "tanh", "hardtanh")

FUNCTIONS: dict[Callable[..., Any], str] = {
    function: name
    for name in ACTIVATIONS
    for space in (F, torch)
    for suffix in ("", "_")
    if callable(function := getattr(space, name + suffix, None))
}
METHODS = {name + suffix: name for name in ("relu", "sigmoid", "tanh") for suffix in ("", "_")}


def activation_name(module: nn.Module) -> str | None:
    """Return the name of an activation module, or None for any other module."""
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind:
            return name
    return None


def check_activation(name: str) -> str:
    if name not in ACTIVATIONS and name != "linear":
        near = difflib.get_close_matches(name, ACTIVATIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(ACTIVATIONS)}"
        raise ValueError(f"there is no activation {name!r} here; {hint}")
    return name


def gain(name: str, slope: float | None = None) -> float:
    """Return the factor on a weight's standard deviation that makes up for the activation after it.

    torch.nn.init.calculate_gain where it knows the activation: 1 for "linear" and "sigmoid", 5/3 for "tanh", sqrt(2)
    for "relu", sqrt(2 / (1 + slope^2)) for "leaky_relu". For the others 1 / sqrt(E[f(z)^2]), z standard normal, so that
    the next layer's inputs keep a mean square of 1. "selu" is 1, which is what makes it self-normalising (Klambauer et
    al. 2017; torch's 3/4 trades that for stabler gradients).

    Args:
        name: one of `ACTIVATIONS`, or "linear".
        slope: for "leaky_relu" and "prelu", the slope of the negative side; by default 0.01 and 0.25.

    Raises:
        ValueError: the name is unknown.
    """
    check_activation(name)
    known: Any = "leaky_relu" if name == "prelu" else name  # Any: torch's annotation lists the names it knows
    if known == "leaky_relu":
        return nn.init.calculate_gain(known, slope if slope is not None else 0.25 if name == "prelu" else 0.01)
    if known in ("linear", "sigmoid", "tanh", "relu"):
        return nn.init.calculate_gain(known)
    return 1.0 / math.sqrt(mean_square(name))


@functools.cache
def mean_square(name: str) -> float:
    """E[f(z)^2] of an activation for standard normal z, integrated to about seven digits."""
    z = torch.linspace(-12.0, 12.0, 200_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    value: Tensor = ACTIVATIONS[name]().double()(z)
    return torch.trapezoid(value.square() * density, z).item()
