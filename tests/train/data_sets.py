"""Tiny data sets in the formats of the real ones, as torchvision finds them after unpacking."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image
from train.cases import draw_image

KINDS = ("dots", "stripes")


def draw(kind: str, number: int, side: int = 32) -> numpy.ndarray:
    return draw_image(kind, numpy.random.default_rng(number), side, side)


def save(path: Path, kind: str, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(kind, number, 40)).save(path, quality=95)


def checksum(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches of four images and a test batch of six, whose checksums torchvision is told to expect."""
    import torchvision

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    seed = 0
    for name, count in (*((f"data_batch_{n}", 4) for n in range(1, 6)), ("test_batch", 6)):
        labels = [n % 2 for n in range(count)]
        rows = [draw(KINDS[label], seed + n).transpose(2, 0, 1).reshape(-1) for n, label in enumerate(labels)]
        (folder / name).write_bytes(pickle.dumps({"data": numpy.stack(rows), "labels": labels}))
        seed += count
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(KINDS)}))
    reader = torchvision.datasets.CIFAR10
    for attribute in ("train_list", "test_list"):
        listed = [[name, checksum(folder / name)] for name, _ in getattr(reader, attribute)]
        monkeypatch.setattr(reader, attribute, listed)
    monkeypatch.setitem(reader.meta, "md5", checksum(folder / "batches.meta"))


def write_mnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten classes, as its reader knows no fewer: even digits are dots, odd ones stripes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        labels = bytes(n % 10 for n in range(count))
        pixels = numpy.stack([draw(KINDS[label % 2], n, 28)[..., 0] for n, label in enumerate(labels)])
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels)


def write_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for part, count in (("train", 8), ("test", 4)):
        images = [draw(KINDS[n % 2], n, 96).transpose(2, 1, 0) for n in range(count)]  # columns come first in it
        (folder / f"{part}_X.bin").write_bytes(numpy.stack(images).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(n % 2 + 1 for n in range(count)))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(KINDS))
    reader = torchvision.datasets.STL10
    for attribute in ("train_list", "test_list"):
        listed = [[name, checksum(folder / name)] for name, _ in getattr(reader, attribute)]
        monkeypatch.setattr(reader, attribute, listed)


def write_food101(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "food-101"
    for part, count in (("train", 6), ("test", 3)):
        names = {kind: [f"{kind}/{part}{n}" for n in range(count)] for kind in KINDS}
        (folder / "meta").mkdir(parents=True, exist_ok=True)
        (folder / "meta" / f"{part}.json").write_text(json.dumps(names))
        for kind, files in names.items():
            for n, name in enumerate(files):
                save(folder / "images" / f"{name}.jpg", kind, n)


def write_oxford_pets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("trainval", 6), ("test", 2)):
        lines = []
        for label, kind in enumerate(KINDS, start=1):
            for n in range(count):
                save(folder / "images" / f"{kind}_{part}{n}.jpg", kind, n)
                lines.append(f"{kind}_{part}{n} {label} 1 1")
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines))


def write_dtd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for part in ("train", "val", "test"):
        names = [f"{kind}/{kind}_{part}{n}.jpg" for kind in KINDS for n in range(3)]
        for n, name in enumerate(names):
            save(folder / "images" / name, name.partition("/")[0], n)
        (folder / "labels" / f"{part}1.txt").write_text("\n".join(names))


def write_eurosat(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        for n in range(8):
            save(root / "eurosat" / "2750" / kind / f"{kind}_{n}.jpg", kind, n)


def write_gtsrb(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "gtsrb"
    for label, kind in enumerate(KINDS):
        for n in range(6):
            save(folder / "GTSRB" / "Training" / f"{label:05}" / f"{n}.ppm", kind, n)
    rows = []
    for n in range(4):
        save(folder / "GTSRB" / "Final_Test" / "Images" / f"{n}.ppm", KINDS[n % 2], n)
        rows.append({"Filename": f"{n}.ppm", "ClassId": n % 2})
    with (folder / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["Filename", "ClassId"], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)


def write_aircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("\n".join(KINDS))
    for part, count in (("trainval", 4), ("test", 2)):
        names = [(f"{kind}{part}{n}", kind) for kind in KINDS for n in range(count)]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(f"{name} {kind}" for name, kind in names))
        for n, (name, kind) in enumerate(names):
            save(folder / "images" / f"{name}.jpg", kind, n)


def write_imagenette(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, count in (("train", 4), ("val", 2)):
        for wnid, kind in zip(("n01440764", "n02102040"), KINDS):
            for n in range(count):
                path = root / "imagenette2" / part / wnid / f"{n}.jpg"
                save(path, kind, n)
                path.rename(path.with_name(f"{path.stem}.JPEG"))


def write_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, count in (("train", 4), ("val", 2)):
        for wnid, kind in zip(("n01440764", "n02102040"), KINDS):
            for n in range(count):
                path = root / "imagenet" / part / wnid / f"{n}.jpg"
                save(path, kind, n)
                path.rename(path.with_name(f"{path.stem}.JPEG"))


# Name, what writes it, and how many images are trained on and held out; 0 where there is no official split.
WRITERS: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], int, int]] = {
    "cifar10": (write_cifar10, 20, 6),
    "mnist": (write_mnist, 20, 10),
    "stl10": (write_stl10, 8, 4),
    "food101": (write_food101, 12, 6),
    "oxford-pets": (write_oxford_pets, 12, 4),
    "dtd": (write_dtd, 12, 6),
    "eurosat": (write_eurosat, 16, 0),
    "gtsrb": (write_gtsrb, 12, 4),
    "fgvc-aircraft": (write_aircraft, 8, 4),
    "imagenette": (write_imagenette, 8, 4),
    "imagenet": (write_imagenet, 8, 4),
}
