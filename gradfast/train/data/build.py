"""From the setting ``--data`` to what a run learns from and is measured on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradfast.errors import UserError
from gradfast.train.config import TrainConfig
from gradfast.train.data.augment import build_augmentation
from gradfast.train.data.batches import BatchLoader, ImageDataset, collate
from gradfast.train.data.data_sets import DATA_SETS
from gradfast.train.data.elpv import list_elpv
from gradfast.train.data.folder import list_folder
from gradfast.train.data.images import BadImage, to_square, to_tensor
from gradfast.train.data.listing import Listing
from gradfast.train.data.parts import Parts
from gradfast.train.data.preprocess import evaluation_margin
from gradfast.train.data.reading import read_every, usable_cores
from gradfast.train.data.split import stratified_split
from gradfast.train.data.torchvision_sets import list_named

CACHE_LIMIT = 2**30  # bytes of decoded images that --cache auto keeps in memory
CHECK_LIMIT = 10_000  # up to so many images are all decoded before the first step; more are checked as they come


@dataclass
class Data(Parts):
    """Photographs and their classes.

    Attributes:
        in_memory: whether decoded images are held in memory.
    """

    train: ImageDataset
    evaluation: ImageDataset
    in_memory: bool

    def loaders(self, config: TrainConfig, pin_memory: bool) -> tuple[BatchLoader, BatchLoader]:
        """(training, evaluation) loaders."""
        balance = self.train.listing.targets if config.sampler == "balanced" else None
        return self.make_loaders(config, pin_memory, functools.partial(collate, size=config.img_size), balance)


def build_data(config: TrainConfig, report: Callable[[str], None]) -> Data:
    """List, check, split and (where it pays) decode the images of ``--data``.

    Raises:
        UserError: no usable data there; or, with ``--strict``, a file that is not a sound image.
    """
    if config.data == "elpv":
        listing, held_out = list_elpv(), None
        bad: list[BadImage] = []
    elif config.data in DATA_SETS:
        listing, held_out, bad = list_named(config.data, Path(config.data_root), config.download)
    else:
        listing, held_out, bad = list_folder(Path(config.data))
    refuse_if_strict(bad, config.strict)

    whole = config.augment == "crop"
    margin = evaluation_margin(config.augment)
    total = len(listing) + (len(held_out) if held_out else 0)
    in_memory = choose_cache(config, total)
    memory: list[Tensor | None] = [None, None]
    parts = [listing] if held_out is None else [listing, held_out]
    if in_memory or total <= CHECK_LIMIT:
        report(f"reading {total} images of {config.data}")
        for number, part in enumerate(parts):
            keep = (config.img_size, margin) if in_memory else None
            parts[number], memory[number], unreadable = read_all(part, keep)
            bad = bad + unreadable
        refuse_if_strict(bad, config.strict)
    for part in parts:
        part.require_every_class(f"{config.data}, bad images left out," if bad else config.data)

    if held_out is None:
        whole_listing, whole_memory = parts[0], memory[0]
        parts = list(stratified_split(whole_listing, config.val_split, config.seed))
        if whole_memory is not None:
            row = {path: index for index, path in enumerate(whole_listing.paths)}
            memory = [whole_memory[[row[path] for path in part.paths]] for part in parts]
        parts[1].require_every_class("the held-out part; raise --val-split or add images")
    augmentation = build_augmentation(config.augment, config.img_size, config.auto_augment, config.random_erase)
    train = ImageDataset(parts[0], config.img_size, config.seed, augmentation, whole, margin, memory[0])
    evaluation = ImageDataset(parts[1], config.img_size, config.seed, margin=margin, memory=memory[1])
    return Data(train, evaluation, bad, choose_workers(config.workers, in_memory), in_memory)


def choose_cache(config: TrainConfig, images: int) -> bool:
    if config.augment == "crop":
        if config.cache == "on":
            raise UserError("--cache on does not go with --augment crop, which cuts from the whole image each time")
        return False
    return config.cache == "on" or (config.cache == "auto" and images * 3 * config.img_size**2 <= CACHE_LIMIT)


def choose_workers(wanted: int | None, in_memory: bool) -> int:
    if wanted is not None:
        return wanted
    return 0 if in_memory else min(8, usable_cores())


def read_all(listing: Listing, keep: tuple[int, float] | None) -> tuple[Listing, Tensor | None, list[BadImage]]:
    """Decode every image of a listing.

    Args:
        keep: (size, margin) of the squares to return; None only checks.

    Returns:
        (the sound images, their squares [n, 3, size, size] uint8 or None, the others)
    """
    if keep and listing.pixels is not None and tuple(listing.pixels.shape[1:3]) == (keep[0],) * 2 and keep[1] == 0:
        return listing, squares_of(listing.pixels), []

    def read(index: int) -> Tensor | BadImage | None:
        image = listing.read(index)
        if isinstance(image, BadImage):
            return image
        return to_tensor(to_square(image, *keep)) if keep else None

    sound, squares, bad = read_every(listing, read)
    return sound, torch.stack(squares) if keep and squares else None, bad


def squares_of(pixels: Tensor) -> Tensor:
    """[n, 3, size, size] of square images [n, size, size, 3] or [n, size, size]."""
    if pixels.ndim == 3:
        return pixels[:, None].expand(-1, 3, -1, -1).contiguous()
    return pixels.permute(0, 3, 1, 2).contiguous()


def refuse_if_strict(bad: Iterable[BadImage], strict: bool) -> None:
    bad = list(bad)
    if bad and strict:
        others = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"--strict: {bad[0].path} cannot be used ({bad[0].reason}){others}; mend or remove, or leave out --strict "
            "to skip and count such files"
        )
