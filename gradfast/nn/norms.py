"""Take normalisation out of a model: what stays is a learnt scale and shift of the whole tensor, as in Fixup."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradfast.nn.layers import is_norm


class ScalarAffine(nn.Module):
    """y = scale * x + bias, with one learnt number each: what Fixup puts where a norm stood (Zhang et al. 2019)."""

    def __init__(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


def replace_norms(model: nn.Module) -> int:
    """Put a `ScalarAffine` in the place of every normalisation layer; returns how many there were.

    Fixup wants a shift before each activation and one scale a branch; here every norm leaves both, which adds scales
    but nothing that would need a norm. Follow with `init_model(model, "fixup")`, and build the optimiser after.
    """
    found = [(name, module) for name, module in model.named_modules() if name and is_norm(module)]
    for name, module in found:
        parent, _, own = name.rpartition(".")
        like = next((p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point()), torch.zeros(()))
        setattr(model.get_submodule(parent), own, ScalarAffine(like.device, like.dtype))
    return len(found)
