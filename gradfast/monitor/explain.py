"""Where did it go wrong? The first bad layer, forward or backward, found by running once more, and only when needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradfast.monitor.doctor.probe import Measurement, Passage, watching
from gradfast.monitor.doctor.signal import label, trail
from gradfast.nn.preserve import preserved


def explain(
    model: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], norms: Mapping[str, float]
) -> str:
    """Say where the first NaN or infinity of a step arose.

    The forward pass is run once more, on the same inputs, and every layer's output looked at. If all are finite, the
    gradients of the parameters tell: going backward, the first bad one belongs to the layer furthest along the forward
    pass. torch's anomaly mode finds the same, and makes every step of every run slower for it.

    Args:
        norms: name of a parameter -> norm of its gradient in that step.
    """
    found = Measurement()
    try:
        with preserved(model), torch.no_grad(), watching(model, found):
            model(*arguments, **keywords)
    except Exception as error:  # the explanation of a failure must not be the failure
        return f"running the forward pass once more failed: {error}"
    for number, passage in enumerate(found.passages):
        if passage.bad:
            if number == 0 and not math.isfinite(passage.in_rms):
                return f"the batch itself holds NaN or infinity; {label(passage)} is the first to meet it"
            before = trail(found.passages[:number])
            return f"forward, {label(passage)} is the first to put out NaN or infinity ({passage.bad:.1%}); {before}"
    return _backward(found.passages, norms)


def explain_by_norms(norms: Mapping[str, float], before: Mapping[str, float], factor: float) -> str:
    """Say where the gradient went wrong on its way back, from the parameters' norms alone: no batch, and no pass.

    From the output towards the input, in the order in which the model holds its layers, the first whose gradient is
    not finite; where all are, the first whose norm is `factor` times what it was.

    Args:
        norms: name of a parameter -> norm of its gradient in the bad step.
        before: the same of a good step; may be empty.
    """
    layers, usual = _by_layer(norms), _by_layer(before)
    ranked = list(layers)
    bad = [name for name in ranked if not math.isfinite(layers[name])]
    what = "is NaN or infinite"
    if not bad:
        bad = [name for name in ranked if 0 < usual.get(name, 0.0) * factor < layers[name]]
        what = f"is {factor:g} times what it was"
    if not bad:
        return ""

    def size(name: str) -> str:
        return f"{layers[name]:.3g} at {name or 'the model itself'}" + (
            f" ({usual[name]:.3g} before)" if name in usual else ""
        )

    first = bad[-1]
    if first == ranked[-1]:
        return (
            f"backward, the gradient {what} from the last layer on, {size(first)}: look at the batch, the forward pass "
            "and the loss"
        )
    behind = ", ".join(map(size, reversed(ranked[ranked.index(first) + 1 :][:3])))
    return f"backward, the gradient of {first} is the first that {what}: {size(first)}; nearer to the loss {behind}"


def _by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """Parameters' norms joined to those of the modules that hold them."""
    layers: dict[str, float] = {}
    for name, norm in norms.items():
        module = name.rpartition(".")[0]
        known = layers.get(module, 0.0)
        layers[module] = math.hypot(known, norm) if math.isfinite(norm + known) else math.nan
    return layers


def _backward(passages: Sequence[Passage], norms: Mapping[str, float]) -> str:
    order = {passage.name: number for number, passage in enumerate(passages)}
    layers = _by_layer(norms)
    ranked = sorted((name for name in layers if name in order), key=order.__getitem__)
    bad = [name for name in ranked if not math.isfinite(layers[name])]
    largest = max(passages, key=lambda passage: passage.out_max, default=None)
    peak = f"; forward all is finite, at most {largest.out_max:.3g} at {label(largest)}" if largest else ""
    if not bad:
        return f"no layer's gradient is NaN or infinite{peak}"
    first = bad[-1]
    if first == ranked[-1]:
        return f"backward, the gradient is NaN or infinite from the last layer, {first}, on: look at the loss{peak}"
    sizes = ", ".join(f"{layers[name]:.3g} at {name}" for name in reversed(ranked[ranked.index(first) + 1 :][:3]))
    return (
        f"backward, the gradient of {first} is the first with NaN or infinity; before it the norms were {sizes}{peak}"
    )
