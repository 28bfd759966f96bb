"""Which images a run learns from, and how they reach the model."""

from __future__ import annotations

import dataclasses

from gradfast.train import parse
from gradfast.train.data.data_sets import DATA_SETS
from gradfast.train.options.field import choice, option, switch


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The settings of the group `data`."""

    data: str = option(
        "elpv",
        parse.text,
        "data",
        "a folder with train/ and val/, each with one folder of images per class; or one folder of classes, which is "
        "split by --seed; or a data set by name: elpv, the photographs of solar cells of the extra gradfast[demo], or "
        f"one of torchvision's below --data-root ({', '.join(DATA_SETS)}); ./elpv is a folder of such a name",
        "PATH|NAME",
    )
    data_root: str = option(
        "data",
        parse.text,
        "data",
        "folder that holds torchvision's data sets, unpacked as torchvision does it",
        "FOLDER",
    )
    download: bool = switch("data", "let torchvision fetch the data set of --data into --data-root, if it is not there")
    val_split: float = option(
        0.2,
        parse.open_fraction,
        "data",
        "share of the images held out for evaluation where the data has no val/ folder",
        "SHARE",
    )
    img_size: int = option(64, parse.positive_int, "data", "side of the square images, in pixels", "PIXELS")
    augment: str = choice(
        "auto",
        "data",
        "random changes of the training images: flip (left-right), dihedral (flips and right-angle rotations), crop "
        "(a random part at a random size, flipped), shift (by an eighth at most), shift-flip; auto takes dihedral for "
        "elpv and eurosat, shift-flip for small photographs such as cifar10, shift for digits and signs, else crop",
        "auto",
        "none",
        "flip",
        "dihedral",
        "shift",
        "shift-flip",
        "crop",
    )
    auto_augment: str = choice(
        "none",
        "data",
        "a learned or random choice of strong changes besides --augment, by torchvision: trivial (TrivialAugment, "
        "wide), rand (RandAugment), augmix",
        "none",
        "trivial",
        "rand",
        "augmix",
    )
    sampler: str = choice(
        "shuffle",
        "data",
        "the images of an epoch: each one once, in random order (shuffle), or drawn so that every class comes equally "
        "often (balanced)",
        "shuffle",
        "balanced",
    )
    cache: str = choice(
        "auto",
        "data",
        "keep the decoded, resized images in memory; auto does so up to 1 GiB where --augment allows it (not for crop, "
        "which cuts from the whole image)",
        "auto",
        "on",
        "off",
    )
    workers: int | None = option(
        None,
        parse.natural,
        "data",
        "processes that read and augment images; 0 does it in the main one (default: 0 for images in memory, else one "
        "per core, at most 8); the result does not depend on it",
        "N",
    )
    strict: bool = switch("data", "refuse the data if any image cannot be read, instead of skipping and counting it")
