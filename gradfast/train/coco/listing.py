"""What a detection data set is before any image is read: scenes, their boxes, and the classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gradfast.train.coco.categories import Categories


class Box(NamedTuple):
    """Left, top, right and bottom edge in pixels, x to the right and y down."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)


class Crowd(NamedTuple):
    """A region of many objects that nobody counted: not learnt from, and detections in it are not held against a model.

    `box` is in COCO's own form, (left, top, width, height) in pixels, and not cut to the image.
    """

    label: int
    box: tuple[float, float, float, float]
    area: float


class Scene(NamedTuple):
    """One image and what is in it.

    Attributes:
        path: the image file.
        image_id: its id in the annotations file.
        width, height: in pixels, as the annotations file says.
        boxes: of the objects, inside the image, none without area.
        labels: 1 to K, one per box.
        areas: of the objects, which COCO's small, medium and large go by: that of the outline where there is one.
        crowds: regions that are not learnt from.
    """

    path: Path
    image_id: int
    width: int
    height: int
    boxes: tuple[Box, ...] = ()
    labels: tuple[int, ...] = ()
    areas: tuple[float, ...] = ()
    crowds: tuple[Crowd, ...] = ()


@dataclass(frozen=True)
class SceneListing:
    """Scenes and their classes."""

    scenes: tuple[Scene, ...]
    categories: Categories

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; ``classes[i]`` has label i + 1."""
        return self.categories.names

    def select(self, indices: Sequence[int]) -> SceneListing:
        return SceneListing(tuple(self.scenes[i] for i in indices), self.categories)

    def counts(self) -> list[int]:
        """Boxes per class, in the order of `classes`; crowds are not counted."""
        counts = [0] * len(self.categories)
        for scene in self.scenes:
            for label in scene.labels:
                counts[label - 1] += 1
        return counts

    def empty_scenes(self) -> int:
        """Scenes without a box to learn from."""
        return sum(not scene.boxes for scene in self.scenes)

    def fingerprint(self) -> str:
        """A digest of file names, sizes, boxes and classes, by which a resumed run knows that its data is the same."""
        digest = hashlib.sha256(repr(self.categories).encode())
        for scene in self.scenes:
            name = f"{scene.path.parent.name}/{scene.path.name}"
            digest.update(name.encode("utf-8", "surrogateescape"))
            digest.update(repr([tuple(part) for part in scene.boxes] + [scene[1:4], scene.labels]).encode())
        return digest.hexdigest()

    def to_coco(self) -> dict[str, Any]:
        """The scenes as COCO's ground truth, with the file's own ids: crowds included, what was refused left out."""
        annotations: list[dict[str, Any]] = []
        for scene in self.scenes:
            for box, label, area in zip(scene.boxes, scene.labels, scene.areas, strict=True):
                edges = [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1]
                annotations.append(self._annotation(scene, label, edges, area, crowd=0))
            for crowd in scene.crowds:
                annotations.append(self._annotation(scene, crowd.label, list(crowd.box), crowd.area, crowd=1))
        for number, annotation in enumerate(annotations, start=1):  # never 0, which pycocotools takes for "no match"
            annotation["id"] = number
        names = zip(self.categories.ids, self.categories.names, strict=True)
        return {
            "images": [
                {"id": scene.image_id, "file_name": scene.path.name, "width": scene.width, "height": scene.height}
                for scene in self.scenes
            ],
            "annotations": annotations,
            "categories": [{"id": category, "name": name} for category, name in names],
        }

    def _annotation(self, scene: Scene, label: int, box: list[float], area: float, crowd: int) -> dict[str, Any]:
        category = self.categories.category_id(label)
        return {"image_id": scene.image_id, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
