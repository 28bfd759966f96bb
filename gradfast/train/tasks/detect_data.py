"""From ``--data`` to the scenes that a detector learns from and is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gradfast.errors import UserError
from gradfast.train.coco.dataset import SceneDataset, build_scene_augmentation, collate_scenes, read_scene
from gradfast.train.coco.layout import list_coco
from gradfast.train.coco.listing import SceneListing
from gradfast.train.coco.split import split_scenes
from gradfast.train.config import TrainConfig
from gradfast.train.data.batches import BatchLoader
from gradfast.train.data.build import CACHE_LIMIT, CHECK_LIMIT, choose_workers, refuse_if_strict
from gradfast.train.data.images import BadImage
from gradfast.train.data.parts import Parts
from gradfast.train.data.reading import read_every


@dataclass
class DetectionData(Parts):
    """Scenes and the boxes in them."""

    train: SceneDataset
    evaluation: SceneDataset

    def loaders(self, config: TrainConfig, pin_memory: bool) -> tuple[BatchLoader, BatchLoader]:
        """(training, evaluation) loaders."""
        return self.make_loaders(config, pin_memory, collate_scenes)


def build_detection_data(config: TrainConfig, report: Callable[[str], None]) -> DetectionData:
    """List, check, split and (where they fit) decode the scenes of ``--data``.

    Raises:
        UserError: no usable scenes there; or, with ``--strict``, a bad box or image.
    """
    learnt, measured, bad = find_scenes(config)
    refuse_if_strict(bad, config.strict)
    total = len(learnt) + (len(measured) if measured else 0)
    in_memory = config.cache == "on" or (config.cache == "auto" and size_of(learnt, measured) <= CACHE_LIMIT)
    images: dict[Path, Tensor] = {}
    if in_memory or total <= CHECK_LIMIT:
        report(f"reading {total} images of {config.data}")
        learnt, unreadable = read_scenes(learnt, images if in_memory else None)
        bad = bad + unreadable
        if measured is not None:
            measured, unreadable = read_scenes(measured, images if in_memory else None)
            bad = bad + unreadable
        refuse_if_strict(bad, config.strict)
    if measured is None:
        learnt, measured = split_scenes(learnt, config.val_split, config.seed)
    for part, listing in (("training", learnt), ("held-out", measured)):
        if not any(listing.counts()):
            raise UserError(f"--data {config.data}: none of the {len(listing)} {part} images has a box; add some")

    def dataset(listing: SceneListing, augment: str) -> SceneDataset:
        memory = [images[scene.path] for scene in listing.scenes] if in_memory else None
        return SceneDataset(listing, config.seed, build_scene_augmentation(augment), memory)

    workers = choose_workers(config.workers, in_memory)
    return DetectionData(dataset(learnt, config.augment), dataset(measured, "none"), bad, workers)


def find_scenes(config: TrainConfig) -> tuple[SceneListing, SceneListing | None, list[BadImage]]:
    root = Path(config.data)
    if root.name == "scenes" and not root.exists():
        raise UserError(
            f"--data {root}: there is no such folder; gradfast data make-scenes {root.name} writes the built-in "
            "scenes, or give the folder of your own annotations.json"
        )
    return list_coco(root)


def size_of(*listings: SceneListing | None) -> int:
    """Bytes of all images, decoded."""
    return sum(3 * scene.width * scene.height for listing in listings if listing for scene in listing.scenes)


def read_scenes(listing: SceneListing, keep: dict[Path, Tensor] | None) -> tuple[SceneListing, list[BadImage]]:
    """Decode every image of a listing; returns those that can be, and the others.

    Args:
        keep: takes the decoded images; None only checks.
    """

    def read(index: int) -> Tensor | BadImage | None:
        image = read_scene(listing.scenes[index])
        return None if keep is None and isinstance(image, Tensor) else image

    sound, images, bad = read_every(listing, read)
    if keep is not None:
        keep.update(zip((scene.path for scene in sound.scenes), images, strict=True))
    return sound, bad
