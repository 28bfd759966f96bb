"""Numbers that look random and can be made anew, anywhere, a slice at a time.

The check of a billion parameters needs their initial values and gradients again, and no second copy of them fits. So
all come from one table of a million, repeated; its length is a prime, so that no two rows, chunks or vectors of a
tensor are alike. They have either sign, and magnitudes from a half up: the square of the smallest, as Adam keeps it, is
still a normal number in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

LENGTH = 1_048_573


class Noise:
    """The table on one device. A stream of numbers is named by two: the tensor's index, and what it is for."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(LENGTH, generator=generator).to(device)
        table = (normal + normal.sign()) / 2
        self._table = torch.cat([table, table])  # any LENGTH in a row are there without wrapping

    def part(self, stream: tuple[int, int], first: int, count: int) -> Tensor:
        """Return elements `first` to `first + count` of a stream, float32, at most a table's length."""
        start = (stream[0] * 7919 + stream[1] * 104_729 + first) % LENGTH
        return self._table[start : start + count]

    @torch.no_grad()
    def fill(self, tensor: Tensor, stream: tuple[int, int], scale: float = 1.0) -> None:
        """Write a stream times `scale`, rounded to the tensor's dtype, into a contiguous tensor."""
        flat = tensor.view(-1)
        for first in range(0, flat.numel(), LENGTH):
            part = flat[first : first + LENGTH]
            part.copy_(self.part(stream, first, part.numel()) * scale)
