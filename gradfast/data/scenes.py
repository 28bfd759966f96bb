"""A detection data set in COCO's format, composed from the photographs of solar cells of ``elpv-dataset``.

    FOLDER/train/annotations.json, FOLDER/train/images/000001.png ...    and the same in FOLDER/val/
    FOLDER/LICENSE.txt

Two classes: functional and defective, by the labels that `gradfast.train.data.elpv` takes. The photographs are split as
``gradfast train`` splits them with the same seed, and training and held-out scenes are made, ground and clutter
included, of photographs of their own side only. A scene is a function of (seed, part, number): more scenes leave the
first ones as they were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from gradfast.data.compose import Design, Placed, compose
from gradfast.errors import UserError
from gradfast.files import atomic_folder, atomic_write
from gradfast.train.data.augment import mix
from gradfast.train.data.images import BadImage, read_image
from gradfast.train.data.listing import Listing
from gradfast.train.data.split import stratified_split

HELD_OUT = 0.2  # of the photographs: what `gradfast train` holds out, too

SOURCE = (
    "Photographs of solar cells: Buerhop-Lutz et al., A Benchmark for Visual Identification of Defective Solar Cells "
    "in Electroluminescence Imagery, EU PVSEC 2018; Deitsch et al., Automatic classification of defective photovoltaic "
    "module cells in electroluminescence images, Solar Energy 185, 2019; Deitsch et al., Segmentation of photovoltaic "
    "module cells in uncalibrated electroluminescence images, Machine Vision and Applications 32, 2021. "
    "https://github.com/zae-bayern/elpv-dataset"
)
LICENCE_NAME = "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International"
LICENCE_URL = "https://creativecommons.org/licenses/by-nc-sa/4.0/"
LICENCE = f"""\
The scenes in this folder were composed by gradfast from photographs that were resized, turned, brightened and put on a
generated ground. Like the photographs they are licensed {LICENCE_NAME}
({LICENCE_URL}): not for commercial use.

{SOURCE}
"""


def make_scenes(
    folder: Path,
    photographs: Listing,
    counts: tuple[int, int],
    design: Design,
    seed: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda names, total: names,
) -> None:
    """Write a data set.

    Args:
        folder: takes its name when all of it is written; it must not exist.
        photographs: with their classes, which become the categories 1, 2 ...
        counts: training scenes, held-out scenes.
        progress: given the file names as they are written and their number, passes them on.

    Raises:
        UserError: the folder exists or cannot be written, or a photograph cannot be read.
    """
    parts = dict(zip(("train", "val"), stratified_split(photographs, HELD_OUT, seed), strict=True))
    with atomic_folder(folder) as temporary:
        (temporary / "LICENSE.txt").write_text(LICENCE, encoding="utf-8")

        def write() -> Iterator[str]:
            for (name, part), count in zip(parts.items(), counts, strict=True):
                yield from write_part(temporary / name, part, count, design, seed)

        for _ in progress(write(), sum(counts)):
            pass


def write_part(folder: Path, photographs: Listing, count: int, design: Design, seed: int) -> Iterator[str]:
    """Write ``train/`` or ``val/``; yields the name of each image when it is written."""
    (folder / "images").mkdir(parents=True)
    classes = [
        [index for index, target in enumerate(photographs.targets) if target == number]
        for number in range(len(photographs.classes))
    ]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        generator = numpy.random.default_rng(mix(seed, ("train", "val").index(folder.name), number))
        pixels, placed = compose(design, classes, lambda index: load(photographs.paths[index]), generator)
        name = f"{number:06}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": design.size, "height": design.size, "license": 1})
        annotations += [annotate(cell, photographs, number, len(annotations) + n) for n, cell in enumerate(placed, 1)]
        yield name
    content = {
        "info": {
            "description": f"Composed scenes of solar cells ({folder.name}), made by gradfast data make-scenes",
            "version": "1.0",
            "url": "https://github.com/zae-bayern/elpv-dataset",
            "contributor": SOURCE,
            "seed": seed,
        },
        "licenses": [{"id": 1, "name": LICENCE_NAME, "url": LICENCE_URL}],
        "categories": [
            {"id": number, "name": name, "supercategory": "solar cell"}
            for number, name in enumerate(photographs.classes, start=1)
        ],
        "images": images,
        "annotations": annotations,
    }
    with atomic_write(folder / "annotations.json") as file:
        file.write(json.dumps(content, indent=1).encode())


def annotate(cell: Placed, photographs: Listing, image: int, number: int) -> dict[str, Any]:
    """A cell in COCO's form; `photograph` and `rotation`, degrees counter-clockwise, are beyond the format."""
    side = cell.side
    return {
        "id": number,
        "image_id": image,
        "category_id": photographs.targets[cell.photograph] + 1,
        "bbox": [cell.left, cell.top, side, side],
        "area": side * side,
        "segmentation": [],
        "iscrowd": 0,
        "photograph": photographs.paths[cell.photograph].name,
        "rotation": 90 * cell.turns,
    }


def load(path: Path) -> numpy.ndarray:
    """[height, width] uint8, grey."""
    image = read_image(path)
    if isinstance(image, BadImage):
        raise UserError(f"cannot read the photograph {path}: {image.reason}; reinstall elpv-dataset")
    return numpy.asarray(image.convert("L"))
