"""What the tests of training share: generated photographs, a quick command, and tables without their timings."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

# Small and quick, with batch normalisation and dropout: a run of it draws from torch's generator all the time.
MODEL = "mobilenet_v3_small"
STEPS = 5  # of an epoch of `arguments` on the fixture `photos`

# Multiplies the loss of each batch by a function of its number, counted from 0 over the run.
Break = Callable[[Callable[[int], float]], None]


def draw_image(kind: str, generator: numpy.random.Generator, width: int = 30, height: int = 24) -> numpy.ndarray:
    """A noisy [height, width, 3] uint8 picture of dots or of stripes."""
    import numpy

    rows, columns = numpy.mgrid[:height, :width]
    shift = generator.integers(8)
    pattern = (columns + shift) % 8 < 4
    if kind == "dots":
        pattern = pattern & ((rows + shift) % 8 < 4)
    pixels = 60 + 120 * pattern[..., None] + generator.normal(0, 12, (height, width, 3))
    return pixels.clip(0, 255).astype(numpy.uint8)


def write_images(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """A folder of classes with so many PNG images each."""
    import numpy
    from PIL import Image

    generator = numpy.random.default_rng(seed)
    for kind, count in counts.items():
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(draw_image(kind, generator)).save(folder / kind / f"{number:03}.png")
    return folder


def arguments(data: Path, *more: object) -> list[str]:
    """A training command of a second or two; later flags override earlier ones."""
    command = ["train", "--data", data, "--model", MODEL, "--img-size", 32, "--batch-size", 4, "--epochs", 2]
    command += ["--augment", "dihedral", "--val-split", 0.25, "--device", "cpu", *more]
    return [str(argument) for argument in command]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def untimed(path: Path) -> list[dict[str, str]]:
    """The rows of a table without the columns that depend on the clock; text, so that equal means equal to the bit."""
    return [
        {name: value for name, value in row.items() if not name.endswith(("images_per_s", "seconds", "_share"))}
        for row in read_rows(path)
    ]
