"""Training and held-out images as one data set, seen as evaluation sees them."""

from __future__ import annotations

from typing import Any

import torch

from gradfast.train.coco.dataset import SceneDataset
from gradfast.train.coco.listing import SceneListing
from gradfast.train.data.batches import ImageDataset
from gradfast.train.data.listing import join_listings


def join_parts(learnt: Any, held_out: Any) -> Any:
    """The images of both parts, not changed at random; `learnt` first."""
    if isinstance(learnt, SceneDataset):
        return join_scenes(learnt, held_out)
    return join_images(learnt, held_out)


def join_images(learnt: ImageDataset, held_out: ImageDataset) -> ImageDataset:
    listing = join_listings([learnt.listing, held_out.listing], held_out.listing.classes)
    memories = [part.memory for part in (learnt, held_out) if part.memory is not None]
    memory = torch.cat(memories) if len(memories) == 2 else None  # else from the files, which are always there
    return ImageDataset(listing, held_out.size, held_out.seed, margin=held_out.margin, memory=memory)


def join_scenes(learnt: SceneDataset, held_out: SceneDataset) -> SceneDataset:
    """Two annotation files may both begin to count at 1: their images are numbered anew."""
    scenes = [*learnt.listing.scenes, *held_out.listing.scenes]
    listing = SceneListing(
        tuple(scene._replace(image_id=number) for number, scene in enumerate(scenes, start=1)),
        held_out.listing.categories,
    )
    memories = [part.memory for part in (learnt, held_out) if part.memory is not None]
    memory = memories[0] + memories[1] if len(memories) == 2 else None
    return SceneDataset(listing, held_out.seed, None, memory)
