"""From an image of any size to what a trained model takes: the same steps as those of evaluation during training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gradfast.errors import UserError
from gradfast.train.data.augment import CROP_MARGIN
from gradfast.train.data.images import BadImage, read_image, to_rgb, to_square, to_tensor
from gradfast.train.machine.place import normaliser


def evaluation_margin(augment: str) -> float:
    """Share of the side that evaluation leaves out on each side, where training took random parts of the image."""
    return CROP_MARGIN if augment == "crop" else 0.0


def load_rgb(image: Image.Image | Path | str) -> Image.Image:
    """An image from its file, or as it is, in 8-bit RGB.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    found = read_image(Path(image))
    if isinstance(found, BadImage):
        raise UserError(f"cannot use {found.path}: {found.reason}")
    return found


class ClassifierTransform:
    """The largest centred square of an image, less a margin, at `size` pixels; then (x / 255 - mean) / deviation.

    Args:
        size: side of the square, in pixels.
        margin: share of the side that is left out on each side.
    """

    def __init__(self, size: int, margin: float) -> None:
        self.size = size
        self.margin = margin
        self._normalise: Callable[[Tensor], Tensor] = normaliser(torch.device("cpu"))

    def pixels(self, image: Image.Image) -> Tensor:
        """[3, size, size] uint8."""
        return to_tensor(to_square(image, self.size, self.margin))

    def __call__(self, image: Image.Image | Path | str) -> Tensor:
        """[3, size, size] float32 of a PIL image or an image file: a stack of them is what the model takes.

        Raises:
            UserError: the file cannot be read.
        """
        normal: Tensor = self._normalise(self.pixels(load_rgb(image))[None])[0]
        return normal


class DetectorTransform:
    """Pixels to [0, 1]; a detector resizes and normalises images by itself, and puts boxes back into their size."""

    def pixels(self, image: Image.Image) -> Tensor:
        """[3, height, width] uint8."""
        return to_tensor(image)

    def __call__(self, image: Image.Image | Path | str) -> Tensor:
        """[3, height, width] float32 of a PIL image or an image file: a list of them is what the model takes.

        Raises:
            UserError: the file cannot be read.
        """
        return self.pixels(load_rgb(image)).float() / 255


Transform = ClassifierTransform | DetectorTransform
