"""A split of scenes into training and held-out ones that depends on the seed only."""

from __future__ import annotations

import random

from gradfast.errors import UserError
from gradfast.train.coco.listing import SceneListing


def split_scenes(listing: SceneListing, held_out: float, seed: int) -> tuple[SceneListing, SceneListing]:
    """Split by image, all boxes of an image staying together.

    Scenes are gone through in groups, those with the same classes in them together and those without a box as one, and
    of each group as many are held out, at random, as make the share right so far: kinds of scenes come in proportion,
    and the whole is right to one scene however small the groups are.

    Args:
        held_out: share of the scenes in the second part, in (0, 1); either part has one scene at least.
        seed: same seed, same split, on every machine and whatever the order of the file.

    Returns:
        (training part, held-out part), both in the listing's order.

    Raises:
        UserError: there is one scene only.
    """
    if len(listing) < 2:
        raise UserError(
            "one image is not enough for training and held-out scenes; add images, or give the data as train/ and val/"
        )
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, scene in enumerate(listing.scenes):
        groups.setdefault(tuple(sorted(set(scene.labels))), []).append(index)
    generator = random.Random(seed)
    chosen: list[int] = []
    passed = 0
    for group in sorted(groups):
        members = sorted(groups[group], key=lambda index: listing.scenes[index].image_id)
        generator.shuffle(members)
        passed += len(members)
        due = round(held_out * passed) - len(chosen)
        chosen += members[: max(due, 0)]
    rest = sorted(set(range(len(listing))) - set(chosen))
    if not chosen:
        chosen, rest = rest[:1], rest[1:]
    elif not rest:
        chosen, rest = chosen[1:], chosen[:1]
    return listing.select(sorted(rest)), listing.select(sorted(chosen))
