"""Random changes of training images, each a function of (seed, epoch, index) and of nothing else.

The transforms of torchvision draw from torch's global generator. `drawing_from` seeds it for one image and puts it
back, so that an image looks the same in an epoch whatever process reads it and whatever was drawn before: the number
of workers does not change a run, and a resumed run sees what the undisturbed one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

# Share of the side that evaluation leaves out on each side when training cuts random parts: the customary 224 of 256.
CROP_MARGIN = (1 - 224 / 256) / 2


def mix(*numbers: int) -> int:
    """A seed of 63 bits from several numbers, such as (seed, epoch, index); equal only where all are equal."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def drawing_from(*numbers: int) -> Iterator[None]:
    """Within the block, torch's CPU generator is seeded by `numbers`; afterwards it is as it was before."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(mix(*numbers))
    try:
        yield
    finally:
        generator.set_state(state)


class RightAngleRotation(nn.Module):
    """Turn an image [..., height, width] by 0, 90, 180 or 270 degrees, equally often."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.rot90(image, int(torch.randint(4, ())), (-2, -1))


def build_augmentation(name: str, size: int) -> Callable[[Any], Any]:
    """The augmentation `name`; ``crop`` takes a whole PIL image, the others a square one or its tensor."""
    if name == "none":
        return nn.Identity()
    if name == "flip":
        return v2.RandomHorizontalFlip()
    if name == "dihedral":  # a flip and the four rotations reach all eight symmetries of the square
        return v2.Compose([v2.RandomHorizontalFlip(), RightAngleRotation()])
    if name == "crop":
        return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    raise ValueError(f"unknown augmentation {name!r}")
