"""One scene: photographs of solar cells at random places, sizes and right-angle rotations, with their boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from numpy import ndarray
from numpy.random import Generator
from PIL import Image

from gradfast.data.texture import ground, random_phase

LARGEST_OVERLAP = 0.1  # of the smaller of two boxes: a cell is never hidden by more than this by another
TRIES = 50  # at a free place, before a cell is left out
MOST_CLUTTER = 2  # rectangles of texture in a scene: not everything with an edge is a cell


@dataclass(frozen=True)
class Design:
    """What scenes are like.

    Attributes:
        size: side of the square scenes, in pixels.
        cells: the fewest and the most cells of a scene.
        scales: the smallest and the largest side of a cell, as a share of the scene's.
    """

    size: int = 224
    cells: tuple[int, int] = (2, 6)
    scales: tuple[float, float] = (0.2, 0.45)


@dataclass(frozen=True)
class Placed:
    """A photograph in a scene: its index, its left and top edge and side in pixels, and quarter turns made."""

    photograph: int
    left: int
    top: int
    side: int
    turns: int


def compose(
    design: Design, classes: Sequence[Sequence[int]], load: Callable[[int], ndarray], generator: Generator
) -> tuple[ndarray, list[Placed]]:
    """Draw a scene.

    Each cell is of a class drawn with equal chances, and no photograph comes twice in a scene. Later ones lie on top.
    Where a scene is so full that a cell finds no place, it has fewer cells, but one at least.

    Args:
        classes: the indices of the photographs of each class.
        load: a photograph by its index, [height, width] uint8.

    Returns:
        ([size, size] uint8, the cells in it)
    """
    every = [index for members in classes for index in members]
    canvas = ground(load(int(generator.choice(every))), design.size, generator)
    for _ in range(int(generator.integers(MOST_CLUTTER + 1))):
        add_clutter(canvas, design, load(int(generator.choice(every))), generator)
    placed: list[Placed] = []
    for _ in range(int(generator.integers(design.cells[0], design.cells[1] + 1))):
        members = classes[int(generator.integers(len(classes)))]
        photograph = int(generator.choice(members))
        place = find_place(design, placed, generator)
        if place is None or any(photograph == other.photograph for other in placed):
            continue
        cell = Placed(photograph, *place, turns=int(generator.integers(4)))
        light = generator.uniform(0.85, 1.15)
        pixels = resize(load(photograph), cell.side, cell.side)
        put(canvas, numpy.rot90(pixels, cell.turns) * light, cell.left, cell.top)
        placed.append(cell)
    canvas += generator.normal(0, 2, canvas.shape)  # the camera's noise, the same over seams and all
    return canvas.round().clip(0, 255).astype(numpy.uint8), placed


def find_place(design: Design, placed: Sequence[Placed], generator: Generator) -> tuple[int, int, int] | None:
    """(left, top, side), inside the scene and nearly clear of the other cells; sides are log-uniform."""
    for _ in range(TRIES):
        side = draw_side(design, generator)
        left, top = (int(edge) for edge in generator.integers(design.size - side + 1, size=2))
        if all(overlap((left, top, side), (o.left, o.top, o.side)) <= LARGEST_OVERLAP for o in placed):
            return left, top, side
    return None


def draw_side(design: Design, generator: Generator) -> int:
    low, high = numpy.log(design.scales)
    return max(1, round(float(numpy.exp(generator.uniform(low, high))) * design.size))


def overlap(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """The common area of two squares (left, top, side), as a share of the smaller."""
    width, height = (max(0, min(a + one[2], b + other[2]) - max(a, b)) for a, b in zip(one[:2], other[:2], strict=True))
    return width * height / min(one[2], other[2]) ** 2


def add_clutter(canvas: ndarray, design: Design, photograph: ndarray, generator: Generator) -> None:
    """Put a rectangle of a photograph's texture, with sharp edges, somewhere."""
    width, height = draw_side(design, generator), draw_side(design, generator)
    left, top = int(generator.integers(design.size - width + 1)), int(generator.integers(design.size - height + 1))
    texture = random_phase(photograph, generator).clip(0, 255)
    put(canvas, resize(texture.astype(numpy.uint8), width, height), left, top)


def put(canvas: ndarray, pixels: ndarray, left: int, top: int) -> None:
    height, width = pixels.shape
    canvas[top : top + height, left : left + width] = pixels


def resize(pixels: ndarray, width: int, height: int) -> ndarray:
    """At another size, each pixel the mean of what it covers where it is made smaller."""
    return numpy.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS), numpy.float64)
