"""Small COCO data for the tests of detection: made by hand, so that every box is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from gradfast.train.coco.categories import Categories
from gradfast.train.coco.listing import Box, Scene, SceneListing

WIDTH, HEIGHT = 40, 30
CATEGORIES = [{"id": 7, "name": "cell"}, {"id": 3, "name": "crack", "supercategory": "damage"}]


def box(number: int, image: int, bbox: Any, category: int = 3, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}


def content(count: int = 3, annotations: Any = (), categories: Any = CATEGORIES) -> dict[str, Any]:
    """An annotations file of images 1.png to `count`.png."""
    images = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(1, count + 1)]
    return {"images": images, "annotations": list(annotations), "categories": categories}


def write_coco(folder: Path, data: dict[str, Any], images: str = "", name: str = "annotations.json") -> Path:
    """The file and its images, noise, in the sub-folder `images`; returns the file."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(0)
    for image in data["images"]:
        pixels = generator.integers(0, 255, (image["height"], image["width"], 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / images / image["file_name"])
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data))
    return folder / name


def listing_of(*scenes: tuple[list[tuple[float, float, float, float]], list[int]], names: str = "ab") -> SceneListing:
    """Scenes of 200 x 200 pixels with these boxes and labels, ids from 11 on; a class for each letter of `names`."""
    built = []
    for number, (boxes, labels) in enumerate(scenes, start=11):
        edges = tuple(Box(*one) for one in boxes)
        areas = tuple(one.area for one in edges)
        built.append(Scene(Path(f"{number}.png"), number, 200, 200, edges, tuple(labels), areas))
    return SceneListing(tuple(built), Categories(tuple(names), tuple(range(5, 5 + len(names)))))
