"""One annotation of a file to a box that can be learnt from, or to the reason why it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradfast.train.coco.listing import Box

THINNEST = 0.01  # pixels: a side below this vanishes when float32 edges are scaled, and detectors refuse such boxes


def whole_number(value: object) -> int | None:
    """An id or size as an int: 3, and 3.0, which some tools write; None for anything else, a bool among them."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else None


def check_numbers(values: object) -> list[float] | str:
    """The four numbers of a ``bbox``, or what is wrong with them."""
    if not isinstance(values, (list, tuple)):
        return f"its bbox is no list of four numbers but {shorten(values)}"
    if len(values) != 4:
        return f"its bbox has {len(values)} numbers, where left, top, width and height are wanted"
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return f"its bbox {shorten(values)} holds something that is no number"
    if not all(math.isfinite(value) for value in values):
        return f"its bbox {shorten(values)} is not finite"
    return [float(value) for value in values]


def check_box(values: object, width: int, height: int) -> Box | str:
    """A box of left, top, width and height, cut to the image.

    Args:
        values: what the file has as ``bbox``, in pixels.
        width, height: of the image.

    Returns:
        The part of the box inside the image; or, in words, why there is none: not four finite numbers, no width or
        height, or wholly outside (a sliver below `THINNEST` counts as outside).
    """
    numbers = check_numbers(values)
    if isinstance(numbers, str):
        return numbers
    left, top, wide, high = numbers
    if wide <= 0 or high <= 0:
        missing = "width" if wide <= 0 else "height"
        return f"its bbox {shorten(values)} has no {missing}"
    box = Box(max(left, 0.0), max(top, 0.0), min(left + wide, float(width)), min(top + high, float(height)))
    if box.x2 - box.x1 < THINNEST or box.y2 - box.y1 < THINNEST:
        return f"its bbox {shorten(values)} lies outside the image of {width} x {height}"
    return box


def object_area(annotation: Mapping[str, Any], box: Box, uncut: bool) -> float:
    """What COCO's small, medium and large go by: the file's ``area`` where it is one and the box was not cut."""
    area = annotation.get("area")
    if uncut and isinstance(area, (int, float)) and not isinstance(area, bool) and math.isfinite(area) and area > 0:
        return float(area)
    return box.area


def shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
