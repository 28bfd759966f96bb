"""The arrangements of a COCO folder, and splits of one that has a single part."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

from train.coco.cases import box, content, listing_of, write_coco

from gradfast.errors import UserError
from gradfast.train.coco.layout import list_coco, looks_like_coco
from gradfast.train.coco.split import split_scenes

DATA = content(2, [box(1, 1, [1, 1, 5, 5])])


@pytest.mark.parametrize("images", ["", "images"])
@pytest.mark.parametrize("name", ["annotations.json", "_annotations.coco.json"])
def test_one_file(tmp_path: Path, images: str, name: str) -> None:
    write_coco(tmp_path, DATA, images, name)
    train, held_out, bad = list_coco(tmp_path)
    assert looks_like_coco(tmp_path)
    assert held_out is None and bad == []
    assert [scene.path for scene in train.scenes] == [tmp_path / images / "1.png", tmp_path / images / "2.png"]


@pytest.mark.parametrize("held_out_name", ["val", "valid"])
def test_train_and_val(tmp_path: Path, held_out_name: str) -> None:
    write_coco(tmp_path / "train", DATA)
    write_coco(tmp_path / held_out_name, content(3, [box(1, 9, [1, 1, 5, 5])]), "images")
    train, held_out, bad = list_coco(tmp_path)
    assert looks_like_coco(tmp_path)
    assert held_out is not None and (len(train), len(held_out)) == (2, 3)
    assert held_out.scenes[0].path == tmp_path / held_out_name / "images" / "1.png"
    assert [one.reason for one in bad] == ["there is no image with the id 9"]


def test_the_official_arrangement(tmp_path: Path) -> None:
    for part, count in (("train2017", 2), ("val2017", 1)):
        file = write_coco(tmp_path / part, content(count))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        file.rename(tmp_path / "annotations" / f"instances_{part}.json")
    train, held_out, bad = list_coco(tmp_path)
    assert looks_like_coco(tmp_path)
    assert held_out is not None and (len(train), len(held_out)) == (2, 1) and bad == []
    assert held_out.scenes[0].path == tmp_path / "val2017" / "1.png"


def refuse(root: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        list_coco(root)


def test_other_arrangements_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "there is no such folder")
    refuse(tmp_path, "is no COCO data; expected annotations.json")
    assert not looks_like_coco(tmp_path)
    file = write_coco(tmp_path / "train", DATA)
    refuse(file, "this is a file")
    refuse(tmp_path, r"has no val/annotations\.json beside")
    write_coco(tmp_path, DATA, "annotations", "annotations/instances_train2017.json")
    refuse(tmp_path, r"annotations/ has no instances_val\*\.json")
    write_coco(tmp_path, DATA, "annotations", "annotations/instances_train2014.json")
    refuse(tmp_path, r"has several of instances_train\*\.json \(instances_train2014.json, instances_train2017.json\)")


def test_parts_that_differ_in_their_categories_are_refused(tmp_path: Path) -> None:
    write_coco(tmp_path / "train", DATA)
    write_coco(tmp_path / "val", content(1, [], [{"id": 3, "name": "crack"}, {"id": 7, "name": "Cell"}]))
    refuse(tmp_path, r"differ in their categories \(7 'Cell', 7 'cell'\)")


def test_an_image_in_both_parts_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path / "train", DATA)
    data = content(1)
    file = write_coco(tmp_path / "val", data)
    file.write_text(file.read_text().replace("1.png", "../train/1.png"))
    refuse(tmp_path, r"1\.png is among the training and among the held-out images")


# ---------------------------------------------------------------- splitting


def many(**kinds: int) -> list[tuple[list[tuple[float, float, float, float]], list[int]]]:
    """So many scenes with an object of each class in a name."""
    return [
        ([(0.0, 0.0, 9.0, 9.0)] * len(kind.strip("_")), [" ab".index(letter) for letter in kind.strip("_")])
        for kind, count in kinds.items()
        for _ in range(count)
    ]


def test_a_split_keeps_the_kinds_in_proportion() -> None:
    train, held_out = split_scenes(listing_of(*many(a=50, ab=30, _=20)), 0.2, seed=3)
    assert Counter(scene.labels for scene in held_out.scenes) == {(1,): 10, (1, 2): 6, (): 4}
    assert Counter(scene.labels for scene in train.scenes) == {(1,): 40, (1, 2): 24, (): 16}
    assert {scene.image_id for scene in train.scenes}.isdisjoint(scene.image_id for scene in held_out.scenes)


def test_a_split_depends_on_the_seed_alone() -> None:
    listing = listing_of(*many(a=20, b=20))
    turned = listing.select(range(len(listing))[::-1])
    first, again, other = (split_scenes(listing, 0.25, seed)[1].scenes for seed in (1, 1, 2))
    assert first == again != other
    assert set(split_scenes(turned, 0.25, 1)[1].scenes) == set(first)


def test_a_split_of_few_scenes_is_right_to_one() -> None:
    train, held_out = split_scenes(listing_of(*many(a=1, b=1, ab=1, _=1)), 0.5, seed=0)
    assert (len(train), len(held_out)) == (2, 2)
    for share in (0.01, 0.99):
        train, held_out = split_scenes(listing_of(*many(a=2, b=1)), share, seed=0)
        assert min(len(train), len(held_out)) == 1


def test_one_scene_is_not_split() -> None:
    with pytest.raises(UserError, match="one image is not enough"):
        split_scenes(listing_of(*many(a=1)), 0.5, seed=0)
