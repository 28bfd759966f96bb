"""Where a COCO data set keeps its annotations and images: the arrangements that are in use."""

from __future__ import annotations

import os
from pathlib import Path

from gradfast.errors import UserError
from gradfast.train.coco.listing import SceneListing
from gradfast.train.coco.read import read_annotations
from gradfast.train.data.folder import HELD_OUT
from gradfast.train.data.images import BadImage

# The first name is ours and most people's; the second is that of a well-known annotation service's exports.
FILES = ("annotations.json", "_annotations.coco.json")
EXPECTED = (
    "annotations.json with its images beside it or in images/; train/ and val/, each like that; or COCO's own "
    "annotations/instances_train*.json and instances_val*.json beside their folders of images"
)


def list_coco(root: Path) -> tuple[SceneListing, SceneListing | None, list[BadImage]]:
    """What a folder of COCO data holds.

    Returns:
        (training scenes, held-out scenes or None where the folder has one annotations file, what was left out)

    Raises:
        UserError: the folder is missing or of another shape, an annotations file is unusable, or training and
            held-out scenes differ in their categories or share an image file.
    """
    if not root.exists():
        raise UserError(f"--data {root}: there is no such folder")
    if not root.is_dir():
        raise UserError(f"--data {root}: this is a file; give the folder that holds {FILES[0]}")
    official = find_official(root)
    if official is not None:
        return read_both(root, official[0], official[1])
    single = find_file(root)
    if single is not None:
        listing, bad = read_annotations(single, [root / "images", root])
        return listing, None, bad
    train = find_file(root / "train")
    held_out = next((file for name in HELD_OUT if (file := find_file(root / name))), None)
    if train is None and held_out is None:
        raise UserError(f"--data {root} is no COCO data; expected {EXPECTED}")
    if train is None or held_out is None:
        half, there = ("train", held_out) if train is None else ("val", train)
        raise UserError(f"--data {root} has no {half}/{FILES[0]} beside {there}")
    return read_both(root, (train, folders_of(train.parent)), (held_out, folders_of(held_out.parent)))


def looks_like_coco(root: Path) -> bool:
    """Whether a folder has annotations where `list_coco` would look for them."""
    parts = (root, root / "train", *(root / name for name in HELD_OUT))
    return any(find_file(part) for part in parts) or any((root / "annotations").glob("instances_*.json"))


def folders_of(folder: Path) -> list[Path]:
    return [folder / "images", folder]


def find_file(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def find_official(root: Path) -> tuple[tuple[Path, list[Path]], tuple[Path, list[Path]]] | None:
    """COCO's own arrangement: (file, folders of its images) for training and for held-out scenes."""
    found = {}
    for part in ("train", "val"):
        files = sorted((root / "annotations").glob(f"instances_{part}*.json"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"--data {root}: annotations/ has several of instances_{part}*.json ({names}); leave one")
        if files:
            name = files[0].stem.removeprefix("instances_")
            found[part] = (files[0], [root / name, root / "images" / name])
    if not found:
        return None
    if len(found) == 1:
        half = "val" if "train" in found else "train"
        raise UserError(f"--data {root}: annotations/ has no instances_{half}*.json")
    return found["train"], found["val"]


def read_both(
    root: Path, train: tuple[Path, list[Path]], held_out: tuple[Path, list[Path]]
) -> tuple[SceneListing, SceneListing, list[BadImage]]:
    learnt, bad = read_annotations(*train)
    measured, more = read_annotations(*held_out)
    if learnt.categories != measured.categories:
        pairs = [set(zip(part.categories.ids, part.categories.names, strict=True)) for part in (learnt, measured)]
        odd = ", ".join(f"{number} {name!r}" for number, name in sorted(pairs[0] ^ pairs[1]))
        raise UserError(f"--data {root}: {train[0]} and {held_out[0]} differ in their categories ({odd})")
    shared = set(files_of(learnt)) & set(files_of(measured))
    if shared:
        raise UserError(f"--data {root}: {min(shared)} is among the training and among the held-out images")
    return learnt, measured, bad + more


def files_of(listing: SceneListing) -> list[str]:
    """The image files, each by one name whatever way round leads to it."""
    return [os.path.normpath(scene.path) for scene in listing.scenes]
