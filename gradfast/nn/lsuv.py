"""Layer-sequential unit variance: scale each layer by what it really puts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.nn.layers import CONVOLUTIONS, TRANSPOSED
from gradfast.nn.preserve import preserved


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor, or a tuple, list or mapping of arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@torch.no_grad()
def scale_to_unit_variance(model: nn.Module, batch: Any, note: Callable[[str, str], None]) -> None:
    """Divide every linear and convolution weight by the standard deviation of its output (Mishkin and Matas 2016).

    The paper runs the model anew for each layer until its deviation is close to 1. A layer without bias is linear in
    its weight, so dividing weight and output by the measured deviation is exact, and one forward pass serves all
    layers: each meets inputs that come from layers already scaled. A layer whose output does not vary is left alone.

    Args:
        note: called with (layer's name, what was done).
    """
    done: set[int] = set()

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def scale(module: Any, _: Any, output: Tensor) -> Tensor | None:
            if id(module.weight) in done:
                return None
            done.add(id(module.weight))
            deviation = output.float().std(correction=0).item()
            if not 1e-8 < deviation < float("inf"):
                note(name, f"left alone, its outputs have std {deviation:.3g}")
                return None
            module.weight.div_(deviation)
            note(name, f"/ {deviation:.3g} for outputs of std 1")
            return output / deviation

        return scale

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
    ]
    try:
        with preserved(model):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
