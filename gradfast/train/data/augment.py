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

from gradfast.train.data.images import to_tensor

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


class AsTensor(nn.Module):
    """[3, height, width] uint8 of a PIL image; a tensor as it is."""

    def forward(self, image: Any) -> Tensor:
        return image if isinstance(image, Tensor) else to_tensor(image)


AUTOMATIC: dict[str, Callable[[], nn.Module]] = {
    "trivial": v2.TrivialAugmentWide,  # Mueller and Hutter 2021
    "rand": v2.RandAugment,  # Cubuk et al. 2020
    "augmix": v2.AugMix,  # Hendrycks et al. 2020
}


def build_augmentation(name: str, size: int, automatic: str = "none", erase: float = 0.0) -> Callable[[Any], Any]:
    """What is done to each training image; ``crop`` takes a whole PIL image, the others a square one or its tensor.

    Args:
        automatic: one of `AUTOMATIC`, after the augmentation `name`; or none.
        erase: probability of a random rectangle of zeros, last of all (Zhong et al. 2020).
    """
    stages: list[Callable[[Any], Any]] = [build_geometry(name, size)]
    if automatic != "none":
        stages.append(AUTOMATIC[automatic]())
    if erase > 0:
        stages += [AsTensor(), v2.RandomErasing(p=erase)]
    return stages[0] if len(stages) == 1 else v2.Compose(stages)


def build_geometry(name: str, size: int) -> Callable[[Any], Any]:
    if name == "none":
        return nn.Identity()
    if name == "flip":
        return v2.RandomHorizontalFlip()
    if name == "dihedral":  # a flip and the four rotations reach all eight symmetries of the square
        return v2.Compose([v2.RandomHorizontalFlip(), RightAngleRotation()])
    if name in ("shift", "shift-flip"):  # He et al. 2016, for CIFAR: four pixels of 32, with zeros around
        shift = v2.RandomCrop(size, padding=max(1, size // 8))
        return shift if name == "shift" else v2.Compose([shift, v2.RandomHorizontalFlip()])
    if name == "crop":
        return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    raise ValueError(f"unknown augmentation {name!r}")
