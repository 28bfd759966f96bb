"""Parameters grouped by module, so that a board has twenty lines and not a hundred and sixty-one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def group_by_module(names: Sequence[str], most: int = 24) -> dict[str, list[int]]:
    """Module -> indices of its parameters: the deepest modules of one level that are no more than `most`.

    Level 1 of ResNet50 is conv1, bn1, layer1 to layer4, fc; level 2 has its 16 blocks and is what it gets by default.
    """
    modules = [name.split(".")[:-1] or [name] for name in names]
    chosen: dict[str, list[int]] = {}
    for level in range(1, max(map(len, modules), default=1) + 1):
        groups: dict[str, list[int]] = {}
        for index, parts in enumerate(modules):
            groups.setdefault(".".join(parts[:level]), []).append(index)
        if chosen and len(groups) > most:
            break
        chosen = groups
    return chosen


def add_watched(groups: dict[str, list[int]], names: Sequence[str], watch: Iterable[str]) -> dict[str, list[int]]:
    """Add groups asked for by name: a module with all below it, or one parameter.

    Raises:
        ValueError: no parameter is in it.
    """
    groups = dict(groups)
    for wanted in watch:
        groups[wanted] = inside(names, wanted)
    return groups


def inside(names: Sequence[str], module: str) -> list[int]:
    found = [index for index, name in enumerate(names) if name == module or name.startswith(module + ".")]
    if not found:
        raise ValueError(f"no parameter that the monitor sees is in {module!r}; the first is {names[0]!r}")
    return found


def join(norms: Sequence[float], indices: Iterable[int], power: float = 2.0) -> float:
    """The p-norm of several arrays together."""
    chosen = [norms[index] for index in indices]
    if not all(map(math.isfinite, chosen)):
        return math.nan
    return max(chosen) if power == math.inf else sum(norm**power for norm in chosen) ** (1 / power)
