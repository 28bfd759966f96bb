"""From the text of a flag or a YAML value to a checked value; a bad one says what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value", int, float)


def _number(convert: Callable[[str], Value], what: str, accept: Callable[[Value], bool]) -> Callable[[str], Value]:
    def parse(text: str) -> Value:
        try:
            value = convert(text)
        except ValueError:
            raise ValueError(f"expected {what}, got {text!r}") from None
        if not (math.isfinite(value) and accept(value)):
            raise ValueError(f"expected {what}, got {text!r}")
        return value

    return parse


positive_int = _number(int, "a whole number of at least 1", lambda value: value >= 1)
natural = _number(int, "a whole number of at least 0", lambda value: value >= 0)
seed = _number(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
positive = _number(float, "a number above 0", lambda value: value > 0)
non_negative = _number(float, "a number of at least 0", lambda value: value >= 0)
fraction = _number(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)
share = _number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
open_fraction = _number(float, "a number between 0 and 1, both excluded", lambda value: 0 < value < 1)


def text(value: str) -> str:
    if not value.strip():
        raise ValueError("expected some text, got nothing")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {value!r}")
        return value

    return parse


def clip_limit(value: str) -> float | None:
    """A norm, or None for ``0``, ``off`` and ``none``: do not clip."""
    if value.strip().lower() in ("off", "none"):
        return None
    return non_negative(value) or None


def milestones(value: str) -> str:
    """Epochs as rising whole numbers with commas between them, such as ``30,60,80``."""
    try:
        epochs = [int(part) for part in value.split(",")]
    except ValueError:
        epochs = []
    if not epochs or epochs[0] < 1 or epochs != sorted(set(epochs)):
        raise ValueError(f"expected rising whole numbers such as 30,60,80, got {value!r}")
    return ",".join(map(str, epochs))


def epochs_or_all(value: str) -> int | str:
    """A whole number of at least 0, or ``all``; ``off`` is 0."""
    word = value.strip().lower()
    if word in ("off", "none"):
        return 0
    if word == "all":
        return word
    try:
        return natural(value)
    except ValueError:
        raise ValueError(f"expected a number of epochs or all, got {value!r}") from None


def some_of(*choices: str) -> Callable[[str], str]:
    """Names between commas; the first of `choices` is always among them, and the order is theirs."""

    def parse(value: str) -> str:
        wanted = [word.strip() for word in value.split(",") if word.strip() not in ("", "off", "none")]
        unknown = [word for word in wanted if word not in choices]
        if unknown:
            raise ValueError(f"expected {', '.join(choices)} with commas between, got {unknown[0]!r}")
        return ",".join(choice for choice in choices if choice == choices[0] or choice in wanted)

    return parse
