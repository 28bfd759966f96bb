"""How numbers look in tables: short, and a dash where there is none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

NOTHING = "-"


def shown(value: float | None, pattern: str = ".3f") -> str:
    """A number by a format's pattern; a dash for None, and nan or inf as they are."""
    if value is None:
        return NOTHING
    return format(value, pattern) if math.isfinite(value) else str(value)


def magnitude(value: float | None) -> str:
    """Three digits, whatever the size: 0.0123, 8.05, 1.2e+04."""
    return shown(value, ".3g")


def percent(value: float | None) -> str:
    return shown(value, ".0%")


def short_duration(seconds: float | None) -> str:
    """One unit or two, in five characters: 12s, 3m05, 2h10, 4d03."""
    if seconds is None:
        return NOTHING
    seconds = round(seconds)
    for size, part, unit, digits in ((86400, 3600, "d", 2), (3600, 60, "h", 2), (60, 1, "m", 2)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part:0{digits}}"
    return f"{seconds}s"


def short_age(seconds: float | None) -> str:
    """One unit, in three or four characters: 12s, 3m, 2h, 4d."""
    if seconds is None:
        return NOTHING
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def ellipsis(text: str, width: int) -> str:
    """At most `width` characters, the middle left out: where names differ is their beginning and their end."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def data_name(value: Any) -> str:
    """A data set by the last part of its path."""
    return Path(str(value)).name or str(value)
