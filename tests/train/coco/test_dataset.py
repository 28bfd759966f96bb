"""Scenes by (epoch, index): pixels, boxes, and both after the same change."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import numpy
import torch
from PIL import Image
from train.coco.cases import HEIGHT, WIDTH, box, content, write_coco

from gradfast.train.coco.dataset import SceneDataset, build_scene_augmentation, collate_scenes, read_scene
from gradfast.train.coco.layout import list_coco
from gradfast.train.coco.listing import Scene, SceneListing
from gradfast.train.data.images import BadImage


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> SceneListing:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, content(2, [box(1, 1, [3, 5, 8, 4]), box(2, 1, [30, 20, 10, 10], 7)]))
    return list_coco(folder)[0]


def test_a_scene_and_its_target(listing: SceneListing) -> None:
    dataset = SceneDataset(listing, seed=0)
    image, target = dataset[0, 0]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.uint8
    pixels = numpy.asarray(Image.open(listing.scenes[0].path))
    assert torch.equal(image.permute(1, 2, 0), torch.tensor(pixels))
    assert target["boxes"].tolist() == [[3, 5, 11, 9], [30, 20, 40, 30]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 2] and target["labels"].dtype == torch.int64
    assert target["image_id"] == 1


def test_a_scene_without_boxes_has_an_empty_target(listing: SceneListing) -> None:
    for name in ("none", "flip", "dihedral"):
        _, target = SceneDataset(listing, 0, build_scene_augmentation(name))[0, 1]
        assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


@pytest.mark.parametrize("name", ["flip", "dihedral"])
def test_boxes_turn_with_the_image(name: str) -> None:
    """What is inside the box is painted; after any change, the same pixels and no others are."""
    scene = Scene(Path("a.png"), 1, WIDTH, HEIGHT, ((3, 5, 11, 9), (20, 0, 40, 2)), (1, 1), (32, 40))  # type: ignore[arg-type]
    listing = SceneListing((scene,), None)  # type: ignore[arg-type]
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    for x1, y1, x2, y2 in ((3, 5, 11, 9), (20, 0, 40, 2)):
        image[:, y1:y2, x1:x2] = 255
    dataset = SceneDataset(listing, 0, build_scene_augmentation(name), memory=[image])
    seen = set()
    for epoch in range(40):
        changed, target = dataset[epoch, 0]
        painted = torch.zeros_like(changed)
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            painted[:, y1:y2, x1:x2] = 255
        assert torch.equal(changed, painted)
        assert type(changed) is torch.Tensor and type(target["boxes"]) is torch.Tensor
        seen.add(tuple(target["boxes"].flatten().tolist()))
    assert len(seen) == {"flip": 2, "dihedral": 8}[name]


def test_a_change_is_a_function_of_seed_epoch_and_index(listing: SceneListing) -> None:
    augmentation = build_scene_augmentation("dihedral")
    torch.manual_seed(1)
    first = [SceneDataset(listing, 5, augmentation)[epoch, 0][1]["boxes"].tolist() for epoch in range(12)]
    torch.manual_seed(2)
    again = [SceneDataset(listing, 5, augmentation)[epoch, 0][1]["boxes"].tolist() for epoch in range(12)]
    other = [SceneDataset(listing, 6, augmentation)[epoch, 0][1]["boxes"].tolist() for epoch in range(12)]
    assert first == again != other


def test_unknown_augmentations_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown augmentation of scenes 'crop'"):
        build_scene_augmentation("crop")


def test_unreadable_scenes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "1.png"
    scene = Scene(file, 1, WIDTH, HEIGHT)
    assert read_scene(scene) == BadImage(str(file), "No such file or directory")
    file.write_bytes(b"text")
    assert read_scene(scene) == BadImage(str(file), "not an image")
    Image.new("RGB", (7, 9)).save(file)
    assert read_scene(scene) == BadImage(
        str(file), f"it has 7 x 9 pixels, where its annotations say {WIDTH} x {HEIGHT}"
    )


def test_a_camera_held_sideways(tmp_path: Path) -> None:
    """The annotated size tells whether boxes were drawn on the stored pixels or on the turned ones."""
    file = tmp_path / "1.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.new("L", (WIDTH, HEIGHT)).save(file, exif=exif)
    for width, height in ((WIDTH, HEIGHT), (HEIGHT, WIDTH)):
        image = read_scene(Scene(file, 1, width, height))
        assert isinstance(image, torch.Tensor) and image.shape == (3, height, width)


def test_batches_keep_sizes_and_count_bad_files(listing: SceneListing) -> None:
    dataset = SceneDataset(listing, seed=0)
    bad = BadImage("a.png", "gone")
    batch = collate_scenes([dataset[0, 0], bad, dataset[0, 1]])
    assert len(batch.images) == 2 and [target["image_id"] for target in batch.targets] == [1, 2]
    assert batch.bad == [bad]
    assert collate_scenes([bad]) == ([], [], [bad], (0, 0))
