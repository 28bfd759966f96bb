"""A data set of torchvision, read into listings: official parts, from files or from one array of pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
from torch import Tensor

from gradfast.errors import UserError
from gradfast.extras import first_line, require
from gradfast.train.data.data_sets import DATA_SETS, require_files
from gradfast.train.data.folder import list_folder
from gradfast.train.data.images import BadImage
from gradfast.train.data.listing import Listing, join_listings


def list_named(name: str, root: Path, download: bool) -> tuple[Listing, Listing | None, list[BadImage]]:
    """The data set `name` below `root`.

    Returns:
        (training images, held-out images or None where there is no official split, files that are no images)

    Raises:
        UserError: it is not there, damaged, cannot be fetched, or takes a package that is not installed.
    """
    described = DATA_SETS[name]
    if described.package is not None:
        require(described.package, described.package, f"--data {name}, of MATLAB files,")
    if download:
        fetch(name, root)
    require_files(name, root)
    if not described.reader:
        return list_folder(root / name)
    train = [read_part(name, root, part) for part in described.train]
    held_out = [read_part(name, root, part) for part in described.held_out]
    classes = common_classes(name, [*train, *held_out])
    return join_listings(train, classes), join_listings(held_out, classes) if held_out else None, []


def common_classes(name: str, listings: Sequence[Listing]) -> tuple[str, ...]:
    """The classes of all parts; a part without images of the last of them may not know these.

    Raises:
        UserError: a class's number means something else in another part.
    """
    classes = max((listing.classes for listing in listings), key=len)
    for listing in listings:
        if listing.classes != classes[: len(listing.classes)]:
            odd = sorted(set(listing.classes) ^ set(classes))
            raise UserError(f"--data {name}: its parts differ in their classes ({', '.join(odd[:8])})")
    return classes


def fetch(name: str, root: Path) -> None:
    """Let torchvision download and unpack the data set, unless it is there."""
    described = DATA_SETS[name]
    if described.licence is not None:
        raise UserError(f"--download: {name} cannot be fetched. {described.licence}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--download: processes of a group would write over each other; fetch with a single one first")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for part in (*described.train, *described.held_out):
            getattr(torchvision.datasets, described.reader)(str(root), **part, download=True)
    except Exception as error:  # the network, the disk, checksums, archives
        raise UserError(f"--download: {name} could not be fetched into {root} ({first_line(error)})") from error


def read_part(name: str, root: Path, part: dict[str, Any]) -> Listing:
    try:
        data_set = getattr(torchvision.datasets, DATA_SETS[name].reader)(str(root), **part)
    except Exception as error:  # each reader has its own ways to meet damage
        raise UserError(
            f"--data {name}: what is in {root} is damaged or incomplete ({first_line(error)}); remove it, and fetch it "
            "again with --download"
        ) from error
    targets = targets_of(data_set)
    classes = class_names(data_set, targets)
    pixels = None
    if hasattr(data_set, "data"):
        pixels = to_pixels(data_set.data)
        label = part.get("split") or ("train" if part["train"] else "test")
        paths = [Path(name, f"{label}-{number}") for number in range(len(targets))]
    else:
        paths = files_of(data_set)
    strata = tuple((classes[target],) for target in targets)
    return Listing(tuple(paths), tuple(targets), classes, strata, pixels)


# torchvision's readers keep what they found under a few names, some of them private; the tests hold on to them.


def targets_of(data_set: Any) -> list[int]:
    for name in ("targets", "labels", "_labels"):
        if hasattr(data_set, name):
            return [int(target) for target in getattr(data_set, name)]
    return [int(target) for _, target in data_set._samples]


def files_of(data_set: Any) -> list[Path]:
    for name in ("_image_files", "_images"):
        if hasattr(data_set, name):
            return [Path(path) for path in getattr(data_set, name)]
    samples = data_set.samples if hasattr(data_set, "samples") else data_set._samples
    return [Path(path) for path, _ in samples]


def class_names(data_set: Any, targets: Sequence[int]) -> tuple[str, ...]:
    """One for each class; numbers where the reader has none."""
    names = [name if isinstance(name, str) else name[0] for name in getattr(data_set, "classes", [])]
    count = max(len(names), max(targets) + 1)
    return tuple(names) if len(names) == count else tuple(map(str, range(count)))


def to_pixels(data: Any) -> Tensor:
    """[n, h, w, 3] or [n, h, w] uint8 of an array with the channels second, last or not at all."""
    pixels = torch.from_numpy(numpy.ascontiguousarray(data)) if isinstance(data, numpy.ndarray) else data
    channels_second = pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3
    return pixels.permute(0, 2, 3, 1).contiguous() if channels_second else pixels
