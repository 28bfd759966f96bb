"""One image file to one square of bytes, or to a sentence that says why not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gradfast.extras import first_line


class BadImage(NamedTuple):
    """A file that could not be read as an image."""

    path: str
    reason: str


def read_image(path: Path) -> Image.Image | BadImage:
    """Decode an image whole, to 8-bit RGB, turned the way its camera was held.

    16-bit images keep their upper 8 bits; a grey image becomes three equal channels.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # such as odd metadata: what matters is whether the pixels come out
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders meet damage in every way there is: OSError, SyntaxError, struct.error ...
        return BadImage(str(path), describe(error))


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((numpy.asarray(image).clip(0, 65535) // 256).astype(numpy.uint8))
    return image.convert("RGB")


def describe(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def to_square(image: Image.Image, size: int, margin: float = 0.0) -> Image.Image:
    """The largest centred square of an image, less a margin (share of the side, on each side), at `size` pixels."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, bleed=margin)


def to_tensor(image: Image.Image) -> Tensor:
    """[3, height, width], uint8, contiguous."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()
