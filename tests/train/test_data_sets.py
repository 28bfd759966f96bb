"""Data sets by name: read by torchvision from files in their own formats, their official parts kept apart."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from PIL import Image
from train.cases import arguments, read_rows, untimed
from train.data_sets import KINDS, WRITERS, draw, write_cifar10, write_food101, write_mnist

from gradfast.cli import main
from gradfast.errors import UserError
from gradfast.train.config import TrainConfig
from gradfast.train.data.augment import build_augmentation, drawing_from
from gradfast.train.data.build import build_data
from gradfast.train.data.data_sets import DATA_SETS
from gradfast.train.data.images import BadImage
from gradfast.train.data.torchvision_sets import list_named
from gradfast.train.settings import read_yaml


def named(name: str, root: Path, *more: object) -> list[str]:
    """A training command on a data set by name; `arguments` would make its augmentation and split their own."""
    command = arguments(Path("unused"), *more)
    command[command.index("--data") + 1] = name
    del command[command.index("--augment") : command.index("--augment") + 2]
    return [*command, "--data-root", str(root)]


@pytest.mark.parametrize("name", WRITERS)
def test_parts_classes_and_pixels(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, trained, held = WRITERS[name]
    write(tmp_path, monkeypatch)
    train, held_out, bad = list_named(name, tmp_path, download=False)
    assert (len(train), len(held_out) if held_out else 0, bad) == (trained, held, [])
    classes = 10 if name == "mnist" else 2
    assert len(train.classes) == classes and train.counts() == [trained // classes] * classes
    for listing in (train, held_out or train):
        assert len({str(path) for path in listing.paths}) == len(listing)
        for index in range(len(listing)):
            image = listing.read(index)
            assert not isinstance(image, BadImage) and image.mode == "RGB"
            # Dots cover a quarter of the picture and stripes half of it.
            bright = (numpy.asarray(image).mean(2) > 120).mean()
            low, high = ((0.15, 0.35), (0.4, 0.6))[listing.targets[index] % 2]
            assert low < bright < high
    if held_out is not None:
        assert held_out.classes == train.classes
    data = build_data(TrainConfig(data=name, data_root=str(tmp_path), img_size=32).resolve(), lambda text: None)
    assert len(data.train) == (trained if held else 12) and len(data.evaluation) == (held or 4)


def test_arrays_are_the_pixels_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    train, held_out, _ = list_named("cifar10", tmp_path, download=False)
    assert numpy.array_equal(numpy.asarray(train.read(5)), draw("stripes", 5))
    assert held_out is not None and numpy.array_equal(numpy.asarray(held_out.read(2)), draw("dots", 22))
    config = TrainConfig(data="cifar10", data_root=str(tmp_path), img_size=32).resolve()
    data = build_data(config, lambda text: None)
    assert config.augment == "shift-flip" and data.in_memory and data.workers == 0
    assert torch.equal(data.train.load(5), torch.from_numpy(draw("stripes", 5)).permute(2, 0, 1))
    larger = build_data(TrainConfig(data="cifar10", data_root=str(tmp_path), img_size=48).resolve(), lambda text: None)
    assert larger.train.load(5).shape == (3, 48, 48)
    # The same pixels by way of the decoder's thread pool, for a size that is not the array's own.
    again = Image.fromarray(draw("stripes", 5)).resize((48, 48), Image.Resampling.BILINEAR)
    assert numpy.array_equal(larger.train.load(5).permute(1, 2, 0).numpy(), numpy.asarray(again))


def test_grey_arrays_become_three_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, monkeypatch)
    data = build_data(TrainConfig(data="mnist", data_root=str(tmp_path), img_size=28).resolve(), lambda text: None)
    image = data.train.load(1)
    assert image.shape == (3, 28, 28) and torch.equal(image[0], image[2])
    assert numpy.array_equal(image[1].numpy(), draw("stripes", 1, 28)[..., 0])


def test_a_shift_moves_by_an_eighth_at_most() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 16, 16] = 255
    seen = set()
    for number in range(200):
        with drawing_from(0, 0, number):
            row, column = (build_augmentation("shift", 32)(image)[0] == 255).nonzero()[0].tolist()
        seen.add((row - 16, column - 16))
    assert {abs(move) for pair in seen for move in pair} == {0, 1, 2, 3, 4}
    mirrored = 0
    image[:, 16, :16] = 255
    for number in range(60):
        with drawing_from(0, 0, number):
            moved = build_augmentation("shift-flip", 32)(image)[0]
        mirrored += int(moved[:, 24:].any())
    assert 18 <= mirrored <= 42  # 30 are expected; within three standard deviations


# ---------------------------------------------------------------- runs


def test_a_run_on_cifar10_and_its_resumption(tmp_path: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "sets", monkeypatch)
    assert main(named("cifar10", tmp_path / "sets", "--epochs", 2, "--output", "whole")) == 0
    saved = read_yaml(Path("whole/config.yaml"))
    assert (saved["data"], saved["augment"]) == ("cifar10", "shift-flip")
    assert saved["data_root"] == str(tmp_path / "sets")
    assert main(named("cifar10", tmp_path / "sets", "--epochs", 1, "--output", "half", "--sched", "constant")) == 0
    assert main(["train", "--resume", "half", "--epochs", "2"]) == 0
    assert main(named("cifar10", tmp_path / "sets", "--epochs", 2, "--output", "flat", "--sched", "constant")) == 0
    assert untimed(Path("half/steps.csv")) == untimed(Path("flat/steps.csv"))
    # Shifted anew each time: read in workers, from the array, the images of an epoch are the same.
    more = ["--workers", 2, "--cache", "off", "--output", "workers"]
    assert main(named("cifar10", tmp_path / "sets", "--epochs", 2, *more)) == 0
    assert untimed(Path("workers/steps.csv")) == untimed(Path("whole/steps.csv"))


def test_a_run_on_files_of_which_one_is_damaged_and_one_vanishes(
    tmp_path: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_food101(tmp_path, monkeypatch)
    (tmp_path / "food-101/images/dots/train3.jpg").write_bytes(b"not an image")
    (tmp_path / "food-101/images/stripes/train2.jpg").unlink()
    assert main(named("food101", tmp_path, "--output", "run")) == 0
    out = capsys.readouterr().out
    assert "train3.jpg: not an image" in out and "train2.jpg: No such file" in out and "10 training + 6 held-out" in out
    assert len((Path("run") / "skipped_images.txt").read_text().splitlines()) == 2
    assert read_yaml(Path("run/config.yaml"))["augment"] == "crop"
    assert len(read_rows(Path("run/summary.csv"))) == 2


# ---------------------------------------------------------------- what is not there


def test_what_is_missing_is_named_with_where_it_was_looked_for(
    tmp_path: Path, in_tmp: Path, refused: Callable[[list[str], str], str]
) -> None:
    refused(
        named("cifar10", tmp_path / "sets"),
        r"--data cifar10: there is no .*/sets/cifar-10-batches-py/data_batch_1 and 6 more; give --data-root the folder "
        r"that holds cifar-10-batches-py, or --download to fetch it",
    )
    refused(named("imagenet", tmp_path), r"there is no .*/imagenet/train and 1 more; .*image-net\.org")
    refused(named("imagenet", tmp_path, "--download"), r"--download: imagenet cannot be fetched\. .*image-net\.org")
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize("name", ["svhn", "flowers102"])
def test_files_of_matlab_want_a_package_of_an_extra_of_its_own(
    name: str, tmp_path: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[list[str], str], str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    refused(named(name, tmp_path), rf"--data {name}, of MATLAB files, needs the package 'scipy'.*'gradfast\[scipy\]'")


def test_damage_is_told_from_absence(
    tmp_path: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[list[str], str], str]
) -> None:
    write_cifar10(tmp_path, monkeypatch)
    with (tmp_path / "cifar-10-batches-py/data_batch_3").open("ab") as file:
        file.write(b"x")
    refused(named("cifar10", tmp_path), r"--data cifar10: what is in .* is damaged or incomplete \(.*corrupted")


def test_parts_with_other_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_food101(tmp_path, monkeypatch)
    text = (tmp_path / "food-101/meta/test.json").read_text()
    (tmp_path / "food-101/meta/test.json").write_text(text.replace('"dots"', '"bites"'))
    with pytest.raises(UserError, match=r"its parts differ in their classes \(bites, dots\)"):
        list_named("food101", tmp_path, download=False)


def test_a_download_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def download(self: torchvision.datasets.MNIST) -> None:
        write_mnist(tmp_path / "sets", monkeypatch)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: None)
    with pytest.raises(UserError, match=r"--download: mnist could not be fetched into .*sets \(Dataset not found"):
        list_named("mnist", tmp_path / "sets", download=True)
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: self._check_exists() or download(self))
    train, held_out, _ = list_named("mnist", tmp_path / "sets", download=True)
    assert held_out is not None and (len(train), len(held_out)) == (20, 10)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a single one first"):
        list_named("mnist", tmp_path / "sets", download=True)


def test_a_folder_of_a_known_name_is_given_as_a_path(in_tmp: Path) -> None:
    assert TrainConfig(data="cifar10").resolve().data == "cifar10"
    assert TrainConfig(data="./cifar10").resolve().data == str(in_tmp / "cifar10")


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_table_fits_torchvision(name: str) -> None:
    import inspect

    import torchvision

    described = DATA_SETS[name]
    if described.reader:
        parameters = inspect.signature(getattr(torchvision.datasets, described.reader)).parameters
        if "kwargs" not in parameters:
            assert all(set(part) <= set(parameters) for part in (*described.train, *described.held_out))
    assert described.augment in ("crop", "shift", "shift-flip", "dihedral") and described.needs and KINDS
