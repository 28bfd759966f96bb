"""Small scenes for the tests of detection's training: light squares and discs on noise, some images without any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from PIL import Image
from torch import nn
from torchvision.models.detection import faster_rcnn, retinanet
from torchvision.models.resnet import BasicBlock, ResNet

SIDE = 64
KINDS = ("disc", "square")


def draw_scene(generator: numpy.random.Generator, objects: int) -> tuple[numpy.ndarray, list[tuple[int, list[int]]]]:
    """A [SIDE, SIDE, 3] uint8 picture, and (kind, [left, top, width, height]) of what is in it."""
    pixels = generator.normal(60, 8, (SIDE, SIDE, 3))
    rows, columns = numpy.mgrid[:SIDE, :SIDE]
    found = []
    for corner in generator.choice(4, objects, replace=False):  # one to a quarter: none hides another
        side = int(generator.integers(16, 29))
        left, top = (int(generator.integers(0, 32 - side)) + 32 * int(half) for half in (corner % 2, corner // 2))
        kind = int(generator.integers(2))
        middle = (side - 1) / 2
        disc = (rows - top - middle) ** 2 + (columns - left - middle) ** 2 <= (side / 2) ** 2
        square = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        pixels[square if KINDS[kind] == "square" else disc] += 120
        found.append((kind, [left, top, side, side]))
    return pixels.clip(0, 255).astype(numpy.uint8), found


class SlimResNet(ResNet):
    """A ResNet of four narrow blocks."""

    def _make_layer(self, block: Any, planes: int, *more: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *more, **options)


class SlimHead(nn.Sequential):
    """In the place of Faster R-CNN's two wide layers, which are half of its weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, outputs), nn.ReLU())


def build_slim_resnet(
    weights: None, progress: bool, norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d
) -> SlimResNet:
    return SlimResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)


def slim_down(set_attribute: Callable[[Any, str, Any], object] = setattr) -> None:
    """From now on torchvision builds detectors of a tenth of the weights: for tests of what does not depend on them.

    Args:
        set_attribute: such as `MonkeyPatch.setattr`, which takes it back.
    """
    set_attribute(faster_rcnn, "resnet50", build_slim_resnet)
    set_attribute(faster_rcnn, "TwoMLPHead", SlimHead)
    set_attribute(retinanet, "resnet50", build_slim_resnet)


def write_scenes(folder: Path, count: int, seed: int = 0, empty: int = 1) -> Path:
    """Images with one to three objects each, the last `empty` without any, and annotations.json beside them."""
    generator = numpy.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        objects = 0 if number > count - empty else 1 + number % 3
        pixels, found = draw_scene(generator, objects)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        images.append({"id": number, "file_name": f"{number:03}.png", "width": SIDE, "height": SIDE})
        for kind, box in found:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 10 * (kind + 1),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 10 * (kind + 1), "name": name} for kind, name in enumerate(KINDS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def detect_arguments(data: Path, *more: object) -> list[str]:
    """A training command of some seconds: 10 scenes in 5 steps an epoch, on a few proposals."""
    command = ["train", "--task", "detect", "--data", data, "--img-size", 64, "--batch-size", 2, "--epochs", 2]
    command += ["--proposals", 40, "--proposal-batch", 16, "--box-batch", 16, "--boxes-per-image", 20]
    command += ["--device", "cpu", *more]
    return [str(argument) for argument in command]
