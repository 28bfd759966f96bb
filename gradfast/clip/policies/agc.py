"""Adaptive clipping: gradients against the size of their weights, unit by unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from gradfast.clip.policies.base import Policy, PolicySettings, check_positive
from gradfast.clip.reduction import is_dtensor


class AGC(Policy):
    """Scales the gradient of every unit that is large against the unit's weights:

        G_i <- G_i * clipping * max(|W_i|, eps) / max(|G_i|, 1e-6)        where |G_i| > clipping * max(|W_i|, eps)

    Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition Without Normalization". A unit is
    an output: a row of a matrix, a filter of a convolution; a vector or a scalar is one as a whole. `eps` lets units
    that begin at zero train. In a `Chain` it stands in front of all that need the norm, which is measured afterwards.

    The step decides it on the device, in the pass that measures the norm: that reads the weights beside the gradients,
    4 bytes a parameter more in fp32, and the factors act where the update reads the gradients. `p.grad` stays as it is;
    `grad_norm` and `grad_norms()` are of what AGC leaves. Weights are those that the step updates: of a 16-bit
    parameter with `master_weights` the fp32 master. A complex element counts as two numbers.

    Of a DTensor the units must be whole on their ranks: matrices and filters sharded by their first dimension, as FSDP2
    does, or replicated. A sharded vector, which is one unit, is to be left alone: `vectors=False` or `exclude`.

    Args:
        clipping: the largest ratio; 0.01 in the paper for batches of 1024 to 4096, larger for smaller batches.
        eps: smallest norm that a unit's weights are taken to have.
        exclude: parameters to leave alone, by name, `*` and `?` as in file names: `("head.*", "*.bias")`. The paper
            excludes the last layer. Names are those that the optimiser was given as `(name, parameter)` pairs.
        vectors: False leaves vectors and scalars alone: biases, and scales of normalisations.
    """

    clips_before_norm = True

    def __init__(
        self, clipping: float = 0.01, eps: float = 1e-3, exclude: Iterable[str] = (), vectors: bool = True
    ) -> None:
        super().__init__()
        check_positive("AGC", clipping=clipping, eps=eps)
        if isinstance(exclude, str):
            raise ValueError(f"exclude of AGC is a list of names, got the string {exclude!r}")
        self.clipping, self.eps = self.unit_clipping = float(clipping), float(eps)
        self.exclude, self.vectors = tuple(exclude), bool(vectors)

    def settings(self) -> dict[str, Any]:
        return {"clipping": self.clipping, "eps": self.eps, "exclude": self.exclude, "vectors": self.vectors}

    def program(self, parameters: int) -> list[PolicySettings]:
        return []

    def by_units(self, names: Sequence[str], parameters: Sequence[Tensor]) -> list[bool]:
        taken = [self._takes(name, parameter) for name, parameter in zip(names, parameters, strict=True)]
        for name, parameter, takes in zip(names, parameters, taken):
            if takes and is_dtensor(parameter):
                check_units_whole(name, parameter)
        return taken

    def count_clipped(self, name: str, weight: Tensor, gradient: Tensor, loss_scale: Tensor | float) -> Tensor:
        if gradient.numel() == 0 or not self._takes(name, weight):
            return torch.zeros((), dtype=torch.long, device=gradient.device)
        limit = self.clipping * loss_scale * unit_norm(weight.detach()).clamp(min=self.eps)
        return (unit_norm(gradient) > limit).sum()

    def units(self, weight: Tensor) -> int:
        return weight.shape[0] if weight.ndim > 1 else 1

    def _takes(self, name: str, parameter: Tensor) -> bool:
        if parameter.ndim <= 1 and not self.vectors:
            return False
        return not any(fnmatchcase(name, pattern) for pattern in self.exclude)


def check_units_whole(name: str, parameter: Any) -> None:
    """Raise ValueError for a DTensor of which a rank holds parts of units."""
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_replicate() or parameter.device_mesh.size(dimension) == 1:
            continue
        if parameter.ndim <= 1:
            raise ValueError(
                f"gradfast: AGC takes a vector as one unit, but {name!r} is sharded over dimension {dimension} of "
                f"{parameter.device_mesh}: give AGC vectors=False, or leave it out by exclude=[{name!r}]"
            )
        if not placement.is_shard(0):
            raise ValueError(
                f"gradfast: AGC needs whole units, Shard(0) or Replicate, but {name!r} has the placement {placement} "
                f"on dimension {dimension} of {parameter.device_mesh}: leave it out by exclude=[{name!r}], or clip by "
                "AdaGC instead"
            )


def unit_norm(tensor: Tensor) -> Tensor:
    """The 2-norm of every unit, in fp32 at least, shaped so that it multiplies the tensor."""
    dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    if tensor.ndim <= 1:
        return torch.linalg.vector_norm(tensor, dtype=dtype)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True, dtype=dtype)
