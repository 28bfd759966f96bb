"""Listing, splitting, decoding, augmenting and batching of images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from PIL import Image
from train.cases import write_images

from gradfast.errors import UserError
from gradfast.train.config import TrainConfig
from gradfast.train.data import build as data_module
from gradfast.train.data.augment import RightAngleRotation, build_augmentation, drawing_from, mix
from gradfast.train.data.batches import BatchLoader, EpochBatches, ImageDataset, Key, collate
from gradfast.train.data.build import Data, build_data
from gradfast.train.data.elpv import CLASSES, read_labels
from gradfast.train.data.folder import list_folder
from gradfast.train.data.images import BadImage, read_image, to_square, to_tensor
from gradfast.train.data.listing import Listing
from gradfast.train.data.split import stratified_split
from gradfast.train.machine.processes import World


def listing_of(**strata: int) -> Listing:
    """A listing with so many images in each stratum; the stratum's first letter is its class."""
    names = [name for name, count in strata.items() for _ in range(count)]
    classes = tuple(sorted({name[0] for name in names}))
    paths = tuple(Path(name, str(number)) for number, name in enumerate(names))
    return Listing(paths, tuple(classes.index(name[0]) for name in names), classes, tuple((name,) for name in names))


# ---------------------------------------------------------------- splitting


def test_split_keeps_the_proportions_of_every_stratum() -> None:
    train, held_out = stratified_split(listing_of(a1=50, a2=30, b1=20), 0.2, seed=3)
    assert Counter(held_out.strata) == {("a1",): 10, ("a2",): 6, ("b1",): 4}
    assert Counter(train.strata) == {("a1",): 40, ("a2",): 24, ("b1",): 16}
    assert set(train.paths).isdisjoint(held_out.paths)


def test_split_depends_on_the_seed_alone() -> None:
    listing = listing_of(a=40, b=40)
    first, again, other = (stratified_split(listing, 0.25, seed)[1].paths for seed in (1, 1, 2))
    assert first == again and first != other


def test_split_leaves_an_image_on_either_side() -> None:
    train, held_out = stratified_split(listing_of(a=2, b=2), 0.01, seed=0)
    assert train.counts() == held_out.counts() == [1, 1]
    train, held_out = stratified_split(listing_of(a=2, b=2), 0.99, seed=0)
    assert train.counts() == held_out.counts() == [1, 1]


def test_split_of_a_single_image_is_refused() -> None:
    with pytest.raises(UserError, match="class 'b' has one image"):
        stratified_split(listing_of(a=5, b=1), 0.2, seed=0)


def test_fingerprint_tells_other_images_and_labels() -> None:
    listing = listing_of(a=3, b=3)
    assert listing.fingerprint() == listing_of(a=3, b=3).fingerprint()
    changed = [listing.select([0, 1, 3, 4]), Listing(listing.paths, (0,) * 5 + (1,), listing.classes, listing.strata)]
    assert len({listing.fingerprint(), *(other.fingerprint() for other in changed)}) == 3


# ---------------------------------------------------------------- listing


def test_folder_of_classes(photos: Path) -> None:
    listing, held_out, bad = list_folder(photos)
    assert held_out is None and bad == []
    assert listing.classes == ("dots", "stripes") and listing.counts() == [12, 16]
    assert listing.paths[0] == photos / "dots" / "000.png"


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_train_and_val_folders(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "train", {"dots": 3, "stripes": 2})
    write_images(tmp_path / name, {"dots": 1, "stripes": 2})
    write_images(tmp_path / "test", {"dots": 1})  # is nobody's, as yet
    train, held_out, _ = list_folder(tmp_path)
    assert held_out is not None
    assert (train.counts(), held_out.counts()) == ([3, 2], [1, 2])


def test_images_are_found_at_any_depth_and_hidden_files_are_not(own_photos: Path) -> None:
    deep = own_photos / "dots" / "more" / "yet more"
    deep.mkdir(parents=True)
    (own_photos / "dots" / "000.png").rename(deep / "A.PNG")
    (own_photos / "dots" / ".DS_Store").write_bytes(b"")
    (own_photos / ".cache").mkdir()
    listing, _, bad = list_folder(own_photos)
    assert listing.counts() == [5, 5] and bad == []


def test_files_that_are_no_images_by_name_are_reported(own_photos: Path) -> None:
    (own_photos / "dots" / "notes.txt").write_text("x")
    _, _, bad = list_folder(own_photos)
    assert [(Path(file.path).name, file.reason) for file in bad] == [("notes.txt", "not an image file by its name")]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "is empty; expected one folder of images per class"),
        (["train/a", "train/b"], r"has no val/ folder beside train/"),
        (["train/a", "train/b", "test/a", "test/b"], r"has no val/ folder beside test/ and train/"),
        (["validation/a", "validation/b"], r"has no train/ folder beside validation/"),
        (["train/a", "train/b", "val/a", "val/c"], r"differ in their classes \(b, c\)"),
        (["a"], "has 1 folder of images; expected at least two classes"),
        (["a", "b"], "class 'b' has no image"),
    ],
)
def test_folders_of_another_shape_are_refused(tmp_path: Path, folders: list[str], message: str) -> None:
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
        if name != "b":
            Image.new("L", (4, 4)).save(tmp_path / name / "1.png")
    with pytest.raises(UserError, match=message):
        list_folder(tmp_path)


def test_elpv_labels(tmp_path: Path) -> None:
    lines = ["images/1.png  1.0                 mono", "images/2.png  0.3333333333333333  poly"]
    lines += ["images/3.png  0.0  poly", "images/4.png  0.6666666666666666  mono"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    listing = read_labels(tmp_path / "labels.csv")
    assert listing.paths == (tmp_path / "images/1.png", tmp_path / "images/3.png")
    assert listing.targets == (1, 0) and listing.classes == CLASSES
    assert listing.strata == (("defective", "mono"), ("functional", "poly"))


@pytest.mark.parametrize("line", ["images/1.png 1.0", "images/1.png much mono"])
def test_elpv_labels_of_another_form_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "labels.csv").write_text("images/0.png 0.0 mono\n" + line)
    with pytest.raises(UserError, match=r"labels\.csv, line 2 is not 'path probability kind'"):
        read_labels(tmp_path / "labels.csv")


def test_elpv_as_it_is_installed() -> None:
    pytest.importorskip("elpv_dataset")
    from gradfast.train.data.elpv import list_elpv

    listing = list_elpv()
    assert listing.counts() == [1508, 715]
    image = read_image(listing.paths[0])
    assert not isinstance(image, BadImage) and image.size == (300, 300)


# ---------------------------------------------------------------- decoding


def test_image_is_decoded_to_bytes(tmp_path: Path) -> None:
    pixels = numpy.arange(24, dtype=numpy.uint8).reshape(2, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert not isinstance(image, BadImage)
    tensor = to_tensor(image)
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 2, 4)
    assert torch.equal(tensor.permute(1, 2, 0), torch.from_numpy(pixels))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (5, 4)).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    image = read_image(next(tmp_path.iterdir()))
    assert not isinstance(image, BadImage) and to_tensor(image).shape == (3, 4, 5)


def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path) -> None:
    Image.fromarray(numpy.array([[0, 255, 256, 65535]], dtype=numpy.uint16)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert not isinstance(image, BadImage)
    assert to_tensor(image)[0].tolist() == [[0, 0, 1, 255]]


def test_orientation_of_the_camera_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (10, 4)).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert not isinstance(image, BadImage) and image.size == (4, 10)


def test_square_is_the_middle_of_the_image() -> None:
    pixels = numpy.zeros((4, 8, 3), dtype=numpy.uint8)
    pixels[:, 2:6] = 200
    square = to_tensor(to_square(Image.fromarray(pixels), 4))
    assert square.shape == (3, 4, 4) and bool((square == 200).all())


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that look like images by name: kind -> (path, pattern of the reason)."""
    source = folder / "source"
    write_images(source, {"dots": 1})
    whole = (source / "dots" / "000.png").read_bytes()
    jpeg = folder / "whole.jpg"
    Image.open(source / "dots" / "000.png").resize((200, 200)).save(jpeg)
    contents = {
        "truncated.png": (whole[: len(whole) // 2], "truncated"),
        "header.png": (whole[:20], "truncated|not an image|cannot"),
        "truncated.jpg": (jpeg.read_bytes()[:2000], "truncated"),
        "text.png": (b"this is no image\n" * 100, "not an image"),
        "empty.png": (b"", "not an image"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: (folder / name, reason) for name, (_, reason) in contents.items()}


@pytest.mark.parametrize("kind", ["truncated.png", "header.png", "truncated.jpg", "text.png", "empty.png"])
def test_damage_is_found_and_named(tmp_path: Path, kind: str) -> None:
    path, reason = damaged_files(tmp_path)[kind]
    found = read_image(path)
    assert isinstance(found, BadImage) and found.path == str(path)
    assert re.search(reason, found.reason, re.IGNORECASE), found.reason


def test_vanished_file_is_named(tmp_path: Path) -> None:
    assert read_image(tmp_path / "gone.png") == BadImage(str(tmp_path / "gone.png"), "No such file or directory")


# ---------------------------------------------------------------- augmentation


def test_augmentation_depends_on_its_numbers_only() -> None:
    def draw(*numbers: int) -> list[float]:
        with drawing_from(*numbers):
            return torch.rand(3).tolist()

    first = draw(1, 2, 3)
    torch.rand(7)
    assert draw(1, 2, 3) == first
    assert len({tuple(draw(*numbers)) for numbers in [(1, 2, 3), (1, 3, 2), (2, 2, 3), (12, 3)]}) == 4


def test_augmentation_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2).tolist()
    torch.manual_seed(5)
    with drawing_from(1):
        torch.rand(100)
    assert torch.rand(2).tolist() == expected


def test_mix_separates_neighbours() -> None:
    seeds = {mix(seed, epoch, index) for seed in range(5) for epoch in range(20) for index in range(50)}
    assert len(seeds) == 5000 and all(0 <= seed < 2**63 for seed in seeds)


def test_dihedral_reaches_all_eight_symmetries_equally_often() -> None:
    image = torch.arange(9, dtype=torch.uint8).reshape(1, 3, 3)
    augment = build_augmentation("dihedral", 3)
    seen: Counter[tuple[int, ...]] = Counter()
    for index in range(4000):
        with drawing_from(0, 0, index):
            seen[tuple(augment(image).flatten().tolist())] += 1
    assert len(seen) == 8
    # 500 expected of each; six standard deviations of a binomial count with p = 1/8 are 126
    assert max(abs(count - 500) for count in seen.values()) < 126


def test_rotation_keeps_a_right_angle() -> None:
    image = torch.arange(6).reshape(1, 2, 3)
    torch.manual_seed(0)
    shapes = {tuple(RightAngleRotation()(image).shape) for _ in range(20)}
    assert shapes == {(1, 2, 3), (1, 3, 2)}


# ---------------------------------------------------------------- batches


def indices(batches: Iterable[list[Key]]) -> list[int]:
    return [index for batch in batches for _, index in batch]


def test_order_of_an_epoch_is_a_permutation_of_its_own() -> None:
    batches = EpochBatches(10, 3, seed=1, training=True)
    first = list(batches)
    assert len(first) == len(batches) == 3  # the tenth image waits for another epoch
    batches.epoch = 1
    second = list(batches)
    assert indices(first) != indices(second)
    batches.epoch = 0
    assert list(batches) == first
    assert len(set(indices(first))) == 9


def test_half_an_epoch_goes_on_where_it_stopped() -> None:
    batches = EpochBatches(12, 3, seed=1, training=True)
    whole = list(batches)
    batches.start = 2
    assert list(batches) == whole[2:]


def test_evaluation_sees_every_image_once_in_order() -> None:
    assert indices(EpochBatches(10, 4, seed=0, training=False)) == list(range(10))


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    batches = EpochBatches(3, 32, seed=0, training=True)
    assert len(batches) == 1 and len(next(iter(batches))) == 3


@pytest.fixture
def folder_data(photos: Path) -> Data:
    return build_data(TrainConfig(data=str(photos), img_size=16, augment="dihedral").resolve(), lambda text: None)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("spoilt", [(), (2,), (3,), (2, 3), (6,), (5, 6), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5)])
def test_each_process_finds_the_partners_of_the_whole_batch(size: int, spoilt: tuple[int, ...]) -> None:
    class Numbered(Listing):
        def read(self, index: int) -> Image.Image | BadImage:
            value = self.targets[index]
            return BadImage(str(value), "spoilt") if value in spoilt else Image.new("RGB", (2, 2), (value,) * 3)

    numbers = tuple(range(7))
    listing = Numbered(tuple(Path(str(n)) for n in numbers), numbers, tuple(map(str, numbers)), ())
    found: dict[int, list[tuple[int, int]]] = {}
    named = []
    for ranks in (1, size):
        found[ranks] = []
        for rank in range(ranks):
            world = World()
            world.rank, world.size = rank, ranks
            loader = BatchLoader(ImageDataset(listing, 2, 0), EpochBatches(7, 7, 0, training=False), 0, False)
            loader.split(world, guests=1)
            (batch,) = loader.epoch(0)
            assert (batch.images[:, 0, 0, 0] == batch.targets).all()
            pairs = list(zip(batch.targets.tolist(), batch.targets.roll(1).tolist()))
            found[ranks] += pairs[batch.guests :]
            named += [bad.path for bad in batch.bad]
    assert found[size] == found[1] and len(found[1]) == 7 - len(spoilt)
    assert sorted(named) == sorted(2 * [str(number) for number in spoilt])  # each by one process only


def test_workers_change_nothing(folder_data: Data) -> None:
    def batches(workers: int) -> list[list[object]]:
        loader = BatchLoader(folder_data.train, EpochBatches(len(folder_data.train), 5, 3, True), workers, False)
        return [[batch.images.tolist(), batch.targets.tolist()] for epoch in (0, 1) for batch in loader.epoch(epoch)]

    alone = batches(0)
    assert alone == batches(2)
    assert alone[0] != alone[len(alone) // 2]  # the second epoch is another one


def test_memory_and_files_give_the_same_images(photos: Path) -> None:
    config = TrainConfig(data=str(photos), img_size=16, augment="dihedral").resolve()

    kept, read = (build_data(replace(config, cache=cache), lambda text: None) for cache in ("on", "off"))
    assert kept.in_memory and not read.in_memory
    for one, other in ((kept.train, read.train), (kept.evaluation, read.evaluation)):
        for index in range(len(one)):
            (a, target_a), (b, target_b) = one[0, index], other[0, index]
            assert torch.equal(a, b) and target_a == target_b


def test_targets_follow_their_images(folder_data: Data) -> None:
    for dataset in (folder_data.train, folder_data.evaluation):
        for index, path in enumerate(dataset.listing.paths):
            square = to_tensor(to_square(Image.open(path), 16))
            assert torch.equal(dataset.load(index), square)
            assert dataset.listing.classes[dataset.listing.targets[index]] == path.parent.name


def test_crop_reads_whole_images_each_time(photos: Path) -> None:
    data = build_data(TrainConfig(data=str(photos), img_size=16).resolve(), lambda text: None)
    assert not data.in_memory and data.train.whole and data.train.margin > 0
    image, _ = data.train[0, 0]
    again, _ = data.train[0, 0]
    other, _ = data.train[1, 0]
    assert image.shape == (3, 16, 16) and torch.equal(image, again) and not torch.equal(image, other)
    assert torch.equal(data.evaluation[0, 0][0], data.evaluation[1, 0][0])


def test_cache_of_random_parts_is_refused(photos: Path) -> None:
    with pytest.raises(UserError, match="--cache on does not go with --augment crop"):
        build_data(TrainConfig(data=str(photos), cache="on").resolve(), lambda text: None)


def test_large_sets_are_checked_as_they_come(own_photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "CHECK_LIMIT", 3)
    (own_photos / "dots" / "000.png").write_bytes(b"x")
    config = TrainConfig(data=str(own_photos), img_size=16, cache="off", val_split=0.5).resolve()
    data = build_data(config, lambda text: None)
    assert data.bad == []
    items = [dataset[0, index] for dataset in (data.train, data.evaluation) for index in range(len(dataset))]
    batch = collate(items)
    assert [Path(bad.path).name for bad in batch.bad] == ["000.png"]
    assert batch.images.shape == (9, 3, 16, 16) and batch.targets.shape == (9,)


def test_collate_of_nothing_but_bad_images() -> None:
    batch = collate([BadImage("a", "b")])
    assert len(batch.targets) == 0 and batch.bad == [BadImage("a", "b")]


def test_dataset_is_as_long_as_its_listing() -> None:
    assert len(ImageDataset(listing_of(a=2, b=3), 8, seed=0)) == 5
