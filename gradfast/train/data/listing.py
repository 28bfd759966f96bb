"""What a data set is before any image is decoded: paths, targets, class names, and strata for a fair split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gradfast.errors import UserError
from gradfast.train.data.images import BadImage, read_image, to_rgb


@dataclass(frozen=True)
class Listing:
    """Images and their classes.

    Attributes:
        paths: one per image; names of no files where there are `pixels`.
        targets: index into `classes`, one per image.
        classes: class names, in the order of the model's outputs.
        strata: anything sortable and hashable, one per image; a split keeps the proportions of these.
        pixels: [n, h, w, 3] or (grey) [n, h, w] uint8, the images of a data set that is one array; None for files.
    """

    paths: tuple[Path, ...]
    targets: tuple[int, ...]
    classes: tuple[str, ...]
    strata: tuple[tuple[str, ...], ...]
    pixels: Tensor | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: Sequence[int]) -> Listing:
        return Listing(
            tuple(self.paths[i] for i in indices),
            tuple(self.targets[i] for i in indices),
            self.classes,
            tuple(self.strata[i] for i in indices),
            None if self.pixels is None else self.pixels[list(indices)],
        )

    def read(self, index: int) -> Image.Image | BadImage:
        """The whole image of this number, in RGB."""
        if self.pixels is None:
            return read_image(self.paths[index])
        return to_rgb(Image.fromarray(self.pixels[index].numpy()))

    def counts(self) -> list[int]:
        """Images per class, in the order of `classes`."""
        counts = [0] * len(self.classes)
        for target in self.targets:
            counts[target] += 1
        return counts

    def require_every_class(self, where: str) -> None:
        """Raises:
        UserError: a class has no image in this listing.
        """
        for name, count in zip(self.classes, self.counts(), strict=True):
            if count == 0:
                raise UserError(f"class {name!r} has no image in {where}; add images or remove the class")

    def fingerprint(self) -> str:
        """A digest of file names, targets and classes, by which a resumed run knows that its data is the same."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for path, target in zip(self.paths, self.targets, strict=True):
            digest.update(f"\0{path.parent.name}/{path.name}\0{target}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def join_listings(listings: Sequence[Listing], classes: tuple[str, ...]) -> Listing:
    """Several parts as one listing."""
    pixels = [listing.pixels for listing in listings if listing.pixels is not None]
    return Listing(
        tuple(path for listing in listings for path in listing.paths),
        tuple(target for listing in listings for target in listing.targets),
        classes,
        tuple(stratum for listing in listings for stratum in listing.strata),
        torch.cat(pixels) if len(pixels) > 1 else pixels[0] if pixels else None,
    )
