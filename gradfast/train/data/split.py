"""A split into training and held-out images that depends on the seed only and keeps proportions."""

from __future__ import annotations

import random
from collections import defaultdict

from gradfast.errors import UserError
from gradfast.train.data.listing import Listing


def stratified_split(listing: Listing, held_out: float, seed: int) -> tuple[Listing, Listing]:
    """Split each stratum at random in the same proportion.

    Args:
        held_out: share of the images in the second part, in (0, 1); each stratum gives the nearest whole number, and
            keeps at least one image on either side where it has two.
        seed: same seed, same split, on every machine.

    Returns:
        (training part, held-out part), both in the listing's order.

    Raises:
        UserError: a class has fewer than two images, so that it cannot be on both sides.
    """
    for name, count in zip(listing.classes, listing.counts(), strict=True):
        if count == 1:
            raise UserError(
                f"class {name!r} has one image, and a split into training and held-out images needs two; add images, "
                "or give the data as train/ and val/ folders"
            )
    strata: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, stratum in enumerate(listing.strata):
        strata[stratum].append(index)
    generator = random.Random(seed)
    train: list[int] = []
    evaluation: list[int] = []
    for stratum in sorted(strata):
        members = strata[stratum]
        generator.shuffle(members)
        count = round(held_out * len(members))
        if len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        evaluation += members[:count]
        train += members[count:]
    return listing.select(sorted(train)), listing.select(sorted(evaluation))
