"""How many bytes a step has to move: the floor that a time is held against."""

from __future__ import annotations

STATES = {"SGD": 1, "Adam": 2, "AdamW": 2, "Lion": 1}  # SGD with momentum


def floor_bytes(optimizer: str, element_size: int, elements: int) -> int:
    """Bytes of one clipped step: the gradient read twice; the parameter and each state read and written once.

    fp32: 24 a parameter for SGD with momentum and Lion, 32 for Adam and AdamW. Gradients that stay on the chip between
    the two reads need less.
    """
    return elements * element_size * (2 + 2 + 2 * STATES[optimizer])
