"""Put another normalisation in the place of a model's own: by groups of channels, or none at all, as in Fixup."""

from __future__ import annotations

from collections import Counter

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


def group_count(channels: int, most: int = 32) -> int:
    """The largest divisor of `channels` up to `most` that leaves a group two channels or more; 1 where there is none.

    Wu and He (2018) take 32. A group of a single channel would see nothing but itself, and be zero where an image has
    shrunk to one pixel.
    """
    return max((n for n in range(1, min(most, channels // 2) + 1) if channels % n == 0), default=1)


def group_norms(model: nn.Module, groups: int = 32) -> dict[int, int]:
    """Put a GroupNorm (Wu and He 2018) in the place of every BatchNorm2d: it does the same whatever the batch.

    Scale and shift keep their values and names, so that a zero that starts a residual block as the identity stays, and
    pre-trained weights fit; the running statistics go. Build the optimiser after.

    Args:
        groups: how many, at most; see `group_count`.

    Returns:
        {number of groups: number of layers that have so many}; empty where the model has no BatchNorm2d.
    """
    found = [(name, module) for name, module in model.named_modules() if name and isinstance(module, nn.BatchNorm2d)]
    made: Counter[int] = Counter()
    for name, old in found:
        count = group_count(old.num_features, groups)
        new = nn.GroupNorm(count, old.num_features, eps=old.eps, affine=False)
        if old.affine:
            new.affine, new.weight, new.bias = True, old.weight, old.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new.train(old.training))
        made[count] += 1
    return dict(sorted(made.items(), reverse=True))
