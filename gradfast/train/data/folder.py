"""Image folders: ``train/`` and ``val/`` with a folder per class in each, or one folder of classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from gradfast.errors import UserError
from gradfast.train.data.images import BadImage
from gradfast.train.data.listing import Listing

HELD_OUT = ("val", "valid", "validation")  # what the folder beside train/ is called
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def list_folder(root: Path) -> tuple[Listing, Listing | None, list[BadImage]]:
    """What an image folder holds.

    Classes are the sub-folders in alphabetical order; images are found below them at any depth, in a fixed order.
    Hidden files are passed over; files that are not images by their suffix are reported.

    Returns:
        (training images, held-out images or None where there is no val/ folder, files that are no images)

    Raises:
        UserError: the folder is missing, empty, of another shape, has one class only, or a class without images.
    """
    if not root.exists():
        raise UserError(f"--data {root}: there is no such folder")
    if not root.is_dir():
        raise UserError(f"--data {root}: this is a file; give the folder that holds the classes' folders")
    folders = {path.name: path for path in sub_folders(root)}
    if not folders:
        held = "is empty" if not any(root.iterdir()) else "has no folders in it"
        raise UserError(f"--data {root} {held}; expected one folder of images per class, or train/ and val/")
    held_out = next((name for name in HELD_OUT if name in folders), None)
    if "train" not in folders or held_out is None:
        if set(folders) <= {"train", "test", *HELD_OUT}:  # parts of a data set, and no classes
            half = "train" if "train" not in folders else "val"
            raise UserError(f"--data {root} has no {half}/ folder beside {'/ and '.join(folders)}/")
        listing, bad = list_classes(root)
        return listing, None, bad
    train, bad_train = list_classes(folders["train"])
    evaluation, bad_evaluation = list_classes(folders[held_out])
    if train.classes != evaluation.classes:
        odd = sorted(set(train.classes) ^ set(evaluation.classes))
        raise UserError(f"--data {root}: train/ and {held_out}/ differ in their classes ({', '.join(odd)})")
    return train, evaluation, bad_train + bad_evaluation


def list_classes(root: Path) -> tuple[Listing, list[BadImage]]:
    classes = sub_folders(root)
    if len(classes) < 2:
        raise UserError(
            f"{root} has {len(classes)} folder{'s' * (len(classes) != 1)} of images; expected at least two classes, "
            "one folder each"
        )
    paths: list[Path] = []
    targets: list[int] = []
    bad: list[BadImage] = []
    for target, folder in enumerate(classes):
        for path in files_below(folder):
            if path.suffix.lower() in SUFFIXES:
                paths.append(path)
                targets.append(target)
            else:
                bad.append(BadImage(str(path), "not an image file by its name"))
    names = tuple(folder.name for folder in classes)
    listing = Listing(tuple(paths), tuple(targets), names, tuple((names[target],) for target in targets))
    listing.require_every_class(str(root))
    return listing, bad


def sub_folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        refuse_folder(error)


def files_below(folder: Path) -> list[Path]:
    """The files at any depth that are not hidden, in a fixed order.

    Raises:
        UserError: a folder cannot be read: what is in it would be missed without a word.
    """
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return found


def refuse_folder(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from None
