"""The data sets that ``--data`` knows by name: which class of torchvision reads each, and which files it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradfast.errors import UserError

Parts = tuple[dict[str, Any], ...]

_TRAIN: Parts = ({"train": True},)
_TEST: Parts = ({"train": False},)


def _splits(*names: str) -> Parts:
    return tuple({"split": name} for name in names)


@dataclass(frozen=True)
class DataSet:
    """A data set of torchvision.

    Attributes:
        reader: its class in torchvision.datasets.
        train: arguments of the class, for each official part that is trained on.
        held_out: the same of what is measured on; none where there is no official split.
        needs: what must be in the root: files and folders, relative to it.
        augment: what ``--augment auto`` means for such images.
        package: a package that reading it takes, besides torchvision.
        licence: why torchvision cannot download it; None where it can.
    """

    reader: str
    train: Parts
    held_out: Parts
    needs: tuple[str, ...]
    augment: str = "crop"
    package: str | None = None
    licence: str | None = field(default=None, kw_only=True)


def _digits(folder: str) -> tuple[str, ...]:
    kinds = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(f"{folder}/raw/{kind}-ubyte" for kind in kinds)


_CIFAR10 = tuple(f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"))
_CIFAR100 = tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta"))
_STL10 = tuple(f"stl10_binary/{name}.bin" for name in ("train_X", "train_y", "test_X", "test_y", "unlabeled_X"))

# A digit, a letter or a traffic sign may not be mirrored; a field seen from above may be turned as well.
DATA_SETS = {
    "cifar10": DataSet("CIFAR10", _TRAIN, _TEST, (*_CIFAR10, "cifar-10-batches-py/batches.meta"), "shift-flip"),
    "cifar100": DataSet("CIFAR100", _TRAIN, _TEST, _CIFAR100, "shift-flip"),
    "stl10": DataSet("STL10", _splits("train"), _splits("test"), _STL10, "shift-flip"),
    "svhn": DataSet(
        "SVHN", _splits("train"), _splits("test"), ("train_32x32.mat", "test_32x32.mat"), "shift", package="scipy"
    ),
    "mnist": DataSet("MNIST", _TRAIN, _TEST, _digits("MNIST"), "shift"),
    "fashion-mnist": DataSet("FashionMNIST", _TRAIN, _TEST, _digits("FashionMNIST"), "shift-flip"),
    "kmnist": DataSet("KMNIST", _TRAIN, _TEST, _digits("KMNIST"), "shift"),
    "imagenet": DataSet(
        "",
        (),
        (),
        ("imagenet/train", "imagenet/val"),
        licence="ImageNet is given out by https://image-net.org to those who register: unpack it there, a folder of "
        "images per class in train/ and in val/",
    ),
    "imagenette": DataSet("Imagenette", _splits("train"), _splits("val"), ("imagenette2/train", "imagenette2/val")),
    "food101": DataSet("Food101", _splits("train"), _splits("test"), ("food-101/meta", "food-101/images")),
    "flowers102": DataSet(
        "Flowers102",
        _splits("train", "val"),
        _splits("test"),
        ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        package="scipy",
    ),
    "oxford-pets": DataSet(
        "OxfordIIITPet",
        _splits("trainval"),
        _splits("test"),
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"),
    ),
    "fgvc-aircraft": DataSet(
        "FGVCAircraft", _splits("trainval"), _splits("test"), ("fgvc-aircraft-2013b/data/images",)
    ),
    "dtd": DataSet("DTD", _splits("train", "val"), _splits("test"), ("dtd/dtd/images", "dtd/dtd/labels")),
    "eurosat": DataSet("EuroSAT", ({},), (), ("eurosat/2750",), "dihedral"),
    "gtsrb": DataSet(
        "GTSRB",
        _splits("train"),
        _splits("test"),
        ("gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
        "shift",
    ),
}


def require_files(name: str, root: Path) -> None:
    """Raises:
    UserError: what the data set is made of is not all below `root`.
    """
    missing = [root / need for need in DATA_SETS[name].needs if not (root / need).exists()]
    if not missing:
        return
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    licence = DATA_SETS[name].licence
    raise UserError(
        f"--data {name}: there is no {missing[0]}{others}; give --data-root the folder that holds "
        f"{DATA_SETS[name].needs[0].partition('/')[0]}" + (f". {licence}" if licence else ", or --download to fetch it")
    )
