"""Annotations files: what is read from them, and how each thing wrong with one is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

from train.coco.cases import HEIGHT, WIDTH, box, content, write_coco

from gradfast.errors import UserError
from gradfast.train.coco.listing import Box, SceneListing
from gradfast.train.coco.read import read_annotations
from gradfast.train.data.images import BadImage


def read(folder: Path, data: dict[str, Any]) -> tuple[SceneListing, list[BadImage]]:
    return read_annotations(write_coco(folder, data), [folder])


def test_ids_are_mapped_to_labels_and_back(tmp_path: Path) -> None:
    listing, bad = read(tmp_path, content(2, [box(1, 2, [1, 2, 3, 4], 7), box(2, 2, [5, 6, 7.5, 8], 3)]))
    assert bad == []
    assert listing.classes == ("crack", "cell")  # in the order of their ids, 3 and 7
    assert [listing.categories.label(number) for number in (3, 7, 1)] == [1, 2, None]
    assert [listing.categories.category_id(label) for label in (1, 2)] == [3, 7]
    assert listing.counts() == [1, 1]
    scene = listing.scenes[1]
    assert scene.boxes == ((1, 2, 4, 6), (5, 6, 12.5, 14)) and scene.labels == (2, 1)
    assert (scene.image_id, scene.width, scene.height, scene.path) == (2, WIDTH, HEIGHT, tmp_path / "2.png")


@pytest.mark.parametrize("label", [0, 3, -1])
def test_the_background_is_no_category(tmp_path: Path, label: int) -> None:
    listing, _ = read(tmp_path, content())
    with pytest.raises(IndexError, match="none of 1 to 2"):
        listing.categories.category_id(label)


def test_images_without_a_box_are_kept(tmp_path: Path) -> None:
    listing, bad = read(tmp_path, content(3, [box(1, 2, [1, 1, 5, 5])]))
    assert len(listing) == 3 and listing.empty_scenes() == 2 and bad == []


def test_crowds_are_kept_apart(tmp_path: Path) -> None:
    listing, bad = read(tmp_path, content(1, [box(1, 1, [-5, 0, 30, 10], iscrowd=1), box(2, 1, [0, 0, 9, 9])]))
    (scene,) = listing.scenes
    assert scene.boxes == (Box(0, 0, 9, 9),) and bad == []
    assert [(crowd.box, crowd.label) for crowd in scene.crowds] == [((-5, 0, 30, 10), 1)]
    truth = listing.to_coco()["annotations"]
    assert [(one["iscrowd"], one["bbox"], one["category_id"]) for one in truth] == [
        (0, [0, 0, 9, 9], 3),
        (1, [-5, 0, 30, 10], 3),
    ]


def test_a_box_partly_outside_is_cut(tmp_path: Path) -> None:
    listing, bad = read(tmp_path, content(1, [box(1, 1, [-4, 20, 10, 100], area=1000)]))
    assert listing.scenes[0].boxes == (Box(0, 20, 6, HEIGHT),) and bad == []
    assert listing.scenes[0].areas == (60,)  # of what is left of it


def test_the_area_of_an_outline_is_kept(tmp_path: Path) -> None:
    listing, _ = read(tmp_path, content(1, [box(1, 1, [1, 1, 10, 10], area=42.5), box(2, 1, [1, 1, 10, 10], area=-1)]))
    assert listing.scenes[0].areas == (42.5, 100)


@pytest.mark.parametrize(
    ("annotation", "problem"),
    [
        (box(9, 1, [1, 2, float("nan"), 4]), r"its bbox \[1, 2, nan, 4\] is not finite"),
        (box(9, 1, [1, 2, float("inf"), 4]), "is not finite"),
        (box(9, 1, [1, 2, 0, 4]), "has no width"),
        (box(9, 1, [1, 2, 3, -4]), "has no height"),
        (box(9, 1, [WIDTH, 2, 3, 4]), f"lies outside the image of {WIDTH} x {HEIGHT}"),
        (box(9, 1, [1, -8, 3, 4]), "lies outside the image"),
        (box(9, 1, [WIDTH - 1e-7, 2, 3, 4]), "lies outside the image"),
        (box(9, 1, [1, 2, 3]), "has 3 numbers"),
        (box(9, 1, [1, 2, 3, "4"]), "something that is no number"),
        (box(9, 1, [1, 2, 3, True]), "something that is no number"),
        (box(9, 1, None), "no list of four numbers but None"),
        (box(9, 1, [1, 2, 3, 4], 5), "no category with the id 5"),
        (box(9, 1, [1, 2, 3, 4], iscrowd=1, category_id=None), "no category with the id None"),
    ],
)
def test_a_bad_box_is_named_and_left_out(tmp_path: Path, annotation: dict[str, Any], problem: str) -> None:
    listing, bad = read(tmp_path, content(1, [box(1, 1, [1, 1, 5, 5]), annotation]))
    assert listing.counts() == [1, 0] and listing.scenes[0].crowds == ()
    ((where, reason),) = bad
    assert where == f"{tmp_path / 'annotations.json'}, annotation 9 of 1.png"
    assert re.search(problem, reason)


@pytest.mark.parametrize(
    ("annotation", "where", "problem"),
    [
        (box(9, 99, [1, 2, 3, 4]), "annotation 9", "no image with the id 99"),
        (box(9, "x", [1, 2, 3, 4]), "annotation 9", "no image with the id 'x'"),
        (box(1, 1, [2, 2, 3, 4]), "annotation 1 of 1.png", "another annotation before it has the id 1"),
        ("text", "annotation 2 of the list", "no object but 'text'"),
        ({"image_id": 1, "category_id": 3}, "annotation 2 of the list of 1.png", "no list of four numbers"),
    ],
)
def test_a_bad_annotation_is_named_and_left_out(tmp_path: Path, annotation: Any, where: str, problem: str) -> None:
    listing, bad = read(tmp_path, content(1, [box(1, 1, [1, 1, 5, 5]), annotation]))
    assert listing.counts() == [1, 0]
    assert [one.path for one in bad] == [f"{tmp_path / 'annotations.json'}, {where}"]
    assert problem in bad[0].reason


def test_an_absent_image_is_named_once_and_its_boxes_go_with_it(tmp_path: Path) -> None:
    data = content(2, [box(1, 1, [1, 1, 5, 5]), box(2, 2, [1, 1, 5, 5]), box(3, 2, [2, 2, 5, 5])])
    file = write_coco(tmp_path, data)
    (tmp_path / "2.png").unlink()
    listing, bad = read_annotations(file, [tmp_path / "images", tmp_path])
    assert [scene.image_id for scene in listing.scenes] == [1]
    assert bad == [
        BadImage(f"{file}, image 2 ('2.png')", f"there is no such file in {tmp_path / 'images'} or {tmp_path}")
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"id": 1}, "its id is that of 1.png, too"),
        ({"id": None}, "it has no whole number as id"),
        ({"width": 0}, f"its size, 0 x {HEIGHT}, is not that of an image"),
        ({"height": "tall"}, f"its size, {WIDTH} x 'tall', is not that of an image"),
        ({"file_name": ""}, "it has no file_name"),
    ],
)
def test_a_bad_image_entry_is_named_and_left_out(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    data = content(2, [box(1, 1, [1, 1, 5, 5])])
    file = write_coco(tmp_path, data)
    data["images"][1].update(change)
    file.write_text(json.dumps(data))
    listing, bad = read_annotations(file, [tmp_path])
    assert len(listing) == 1 and listing.counts() == [1, 0]
    assert [one.reason for one in bad] == [problem]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"images": [', "is not JSON"),
        ("[]", "expected an object with images, annotations and categories"),
        ('{"images": [], "annotations": []}', "'categories' is missing"),
        ('{"images": {}, "annotations": [], "categories": []}', "'images' is no list"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": "a", "name": "b"}]}', "needs a whole number as id"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "b"}]}', "names no image"),
        ("[" * 100_000, "nested too deep"),
        (b"\xff\xfe{", "is not JSON"),
    ],
)
def test_an_unusable_file_is_refused(tmp_path: Path, text: str | bytes, problem: str) -> None:
    file = tmp_path / "annotations.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=problem) as caught:
        read_annotations(file, [tmp_path])
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("categories", "problem"),
    [
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "'a' and 'b' have the same id, 1"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "two categories are called 'a'"),
        ([{"id": 1, "name": ""}], "needs a whole number as id and a name"),
    ],
)
def test_categories_that_contradict_each_other_are_refused(tmp_path: Path, categories: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read(tmp_path, content(1, [], categories))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*annotations\.json: No such file"):
        read_annotations(tmp_path / "annotations.json", [tmp_path])


def test_fingerprint_tells_other_boxes_and_classes(tmp_path: Path) -> None:
    variants = [
        content(2, [box(1, 1, [1, 1, 5, 5])]),
        content(2, [box(1, 1, [1, 1, 5, 6])]),
        content(2, [box(1, 1, [1, 1, 5, 5], 7)]),
        content(2, [box(1, 2, [1, 1, 5, 5])]),
        content(2, [box(1, 1, [1, 1, 5, 5])], [{"id": 3, "name": "crack"}]),
    ]
    prints = [read(tmp_path / str(number) / "same", data)[0].fingerprint() for number, data in enumerate(variants)]
    again = read(tmp_path / "again" / "same", variants[0])[0].fingerprint()
    assert len(set(prints)) == len(variants) and prints[0] == again
