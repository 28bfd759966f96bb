"""Images read in threads, as decoders release the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gradfast.train.data.images import BadImage

Part = TypeVar("Part", bound=Any)  # of a data set: has a length, and `select(indices)` makes a smaller one
Track = Callable[[Iterable[Any], int], Iterable[Any]]  # passes on what there are so many of, and may show how far it is


def usable_cores() -> int:
    """The cores that this process may use, shared with the others that torchrun started on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def read_every(
    part: Part, read: Callable[[int], Any], track: Track = lambda results, total: results
) -> tuple[Part, list[Any], list[BadImage]]:
    """Read every image of a listing, and part the sound ones from the others.

    Args:
        read: the image of a number as it is to be kept, or a `BadImage`.

    Returns:
        (the listing of the sound images, what `read` gave for each of them, the others)
    """
    with ThreadPoolExecutor(usable_cores()) as pool:
        results = list(track(pool.map(read, range(len(part))), len(part)))
    sound = [index for index, result in enumerate(results) if not isinstance(result, BadImage)]
    bad = [result for result in results if isinstance(result, BadImage)]
    return part.select(sound), [results[index] for index in sound], bad
