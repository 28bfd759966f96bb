"""Swap the activation of a whole model."""

from __future__ import annotations

import difflib
from typing import Any

import torch.nn.functional as F
from torch import nn

from gradfast.nn.gains import ACTIVATIONS, SATURATING, activation_name
from gradfast.nn.initialise import init_model

_TRANSFORMER = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def replace_activation(
    model: nn.Module, name: str, *, replace: tuple[str, ...] | None = None, init: str | None = None, **options: Any
) -> int:
    """Put another activation wherever the model has one; returns how many were replaced.

    Weights keep their names and, unless `init` is given, their values. Pass `init="kaiming"` (or another method of
    `init_model`) for a model that is to be trained from scratch: the right gain of the weights depends on the
    activation, as sqrt(2) for relu, 1.53 for gelu, 1.68 for silu, 1.25 for elu, 1 for selu, 5/3 for tanh.

    Args:
        name: "relu", "leaky_relu", "gelu", "silu", "elu", "selu", "sigmoid", "tanh" or another of `ACTIVATIONS`.
        replace: names of the activations to swap. By default every one but sigmoid and tanh, which often are gates or
            outputs; these only where the model has no other.
        init: initialise the model anew, with this method and the gain of the new activation.
        options: for the activation's module, such as `negative_slope=0.2`.

    Raises:
        ValueError: there is no such activation, or the model has none as a module. One that is called as a function
            (`F.relu(x)`) stands in the model's code, and has to be changed there.
    """
    for wanted in (name, *(replace or ())):
        if wanted not in ACTIVATIONS:
            near = difflib.get_close_matches(wanted, ACTIVATIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(ACTIVATIONS)}"
            raise ValueError(f"there is no activation {wanted!r} here; {hint}")
    present = {full: found for full, module in model.named_modules() if full and (found := activation_name(module))}
    if replace is None:
        hidden = set(present.values()) - set(SATURATING)
        replace = tuple(hidden or present.values())
    chosen = [full for full, found in present.items() if found in replace]
    for full in chosen:
        parent, _, own = full.rpartition(".")
        made = ACTIVATIONS[name](**options)
        made.training = model.get_submodule(full).training
        setattr(model.get_submodule(parent), own, made)
    count = len(chosen) + _replace_in_transformers(model, name, replace)
    if count == 0:
        raise ValueError(
            f"{type(model).__name__} has no activation module to replace (of {', '.join(replace) or 'any kind'}); one "
            "that is called as a function, as F.relu(x), has to be changed in the model's code"
        )
    if init is not None:
        init_model(model, init, verbose=False)
    return count


def _replace_in_transformers(model: nn.Module, name: str, replace: tuple[str, ...]) -> int:
    """torch's transformer layers hold theirs as a function, and a number that chooses a fused path for it."""
    count = 0
    for module in model.modules():
        if isinstance(module, _TRANSFORMER):
            current = getattr(module.activation, "__name__", "")
            if current in ACTIVATIONS and (not replace or current in replace):
                function = getattr(F, name)
                module.activation = function
                if isinstance(module, nn.TransformerEncoderLayer):
                    module.activation_relu_or_gelu = {"relu": 1, "gelu": 2}.get(name, 0)
                count += 1
    return count
