"""Scenes by (epoch, index): the image as bytes, its boxes, and both changed in the same way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from gradfast.train.coco.listing import Scene, SceneListing
from gradfast.train.data.augment import drawing_from
from gradfast.train.data.images import BadImage, describe, to_rgb, to_tensor

Target = dict[str, Any]


class SceneBatch(NamedTuple):
    """Images [3, h, w] uint8 of any sizes, a target for each, files that should have been in it, (epoch, number).

    A target holds `boxes` [n, 4] float32 (left, top, right, bottom, pixels), `labels` [n] int64 in 1 to K, and
    `image_id`, an int.
    """

    images: list[Tensor]
    targets: list[Target]
    bad: list[BadImage]
    number: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        return len(self.targets)

    def emptied(self) -> SceneBatch:
        """The same without its scenes."""
        return self._replace(images=[], targets=[])


class SceneDataset(Dataset):
    """The scenes of a listing, by (epoch, index).

    Args:
        listing: the scenes.
        augmentation: of `build_scene_augmentation`; applied with torch's generator seeded by (seed, epoch, index).
        memory: decoded images [3, h, w] uint8, one per scene; None reads files.
    """

    def __init__(
        self,
        listing: SceneListing,
        seed: int,
        augmentation: Callable[[Any, Any], Any] | None = None,
        memory: list[Tensor] | None = None,
    ) -> None:
        self.listing = listing
        self.seed = seed
        self.augmentation = augmentation
        self.memory = memory

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target] | BadImage:
        epoch, index = key
        scene = self.listing.scenes[index]
        image = read_scene(scene) if self.memory is None else self.memory[index]
        if isinstance(image, BadImage):
            return image
        boxes = torch.tensor(scene.boxes, dtype=torch.float32).reshape(-1, 4)
        if self.augmentation is not None:
            canvas = (image.shape[-2], image.shape[-1])
            wrapped: Any = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)
            with drawing_from(self.seed, epoch, index):
                changed, wrapped = self.augmentation(tv_tensors.Image(image), wrapped)
            image, boxes = changed.as_subclass(Tensor), wrapped.as_subclass(Tensor)
        labels = torch.tensor(scene.labels, dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "image_id": scene.image_id}


def read_scene(scene: Scene) -> Tensor | BadImage:
    """[3, height, width] uint8, of the size that the annotations say.

    Whether boxes were drawn before or after a camera's turn of the image was applied is not in COCO's format, but
    shows in the annotated size: the stored pixels are taken unless only the turned image has it.
    """
    try:
        with warnings.catch_warnings(), Image.open(scene.path) as image:
            warnings.simplefilter("ignore")  # such as odd metadata: what matters is whether the pixels come out
            image.load()
            turned = image if image.size == (scene.width, scene.height) else ImageOps.exif_transpose(image)
            if turned.size != (scene.width, scene.height):
                found = f"{image.size[0]} x {image.size[1]}"
                return BadImage(
                    str(scene.path), f"it has {found} pixels, where its annotations say {scene.width} x {scene.height}"
                )
            return to_tensor(to_rgb(turned))
    except Exception as error:  # decoders meet damage in every way there is: OSError, SyntaxError, struct.error ...
        return BadImage(str(scene.path), describe(error))


def collate_scenes(items: list[tuple[Tensor, Target] | BadImage]) -> SceneBatch:
    bad = [item for item in items if isinstance(item, BadImage)]
    good = [item for item in items if not isinstance(item, BadImage)]
    return SceneBatch([image for image, _ in good], [target for _, target in good], bad)


class TurnScene(nn.Module):
    """Turn an image and its boxes by 0, 90, 180 or 270 degrees counter-clockwise, equally often.

    In a frame of w x h pixels, a quarter turn takes (x, y) to (y, w - x): edges are whole or half pixels as before,
    where the general rotation of torchvision would round them.
    """

    def forward(self, image: Any, boxes: Any) -> Any:
        turns = int(torch.randint(4, ()))
        height, width = image.shape[-2:]
        edges = boxes.as_subclass(Tensor)
        for _ in range(turns):
            x1, y1, x2, y2 = edges.unbind(1)
            edges = torch.stack([y1, width - x2, y2, width - x1], dim=1)
            height, width = width, height
        turned = tv_tensors.Image(torch.rot90(image.as_subclass(Tensor), turns, (-2, -1)))
        return turned, tv_tensors.BoundingBoxes(edges, format="XYXY", canvas_size=(height, width))


def build_scene_augmentation(name: str) -> Callable[[Any, Any], Any] | None:
    """What is done to each training scene: none, flip (left-right), or dihedral (flips and right-angle rotations)."""
    if name == "none":
        return None
    if name == "flip":
        return v2.RandomHorizontalFlip()
    if name == "dihedral":
        return v2.Compose([v2.RandomHorizontalFlip(), TurnScene()])
    raise ValueError(f"unknown augmentation of scenes {name!r}")
