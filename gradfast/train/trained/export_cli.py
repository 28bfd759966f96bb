"""``gradfast export``: a trained model for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradfast.arguments import CommandParser
from gradfast.errors import UserError
from gradfast.extras import require
from gradfast.files import atomic_write
from gradfast.train.settings import check_value

if TYPE_CHECKING:
    from torch import Tensor

    from gradfast.train.trained.export import Difference
    from gradfast.train.trained.load import Trained

MOST_IMAGES = 16  # that outputs are compared on

DESCRIPTION = """\
Write a trained model in a form that runs without gradfast. What was made is loaded again and run beside the model; the
file gets its name only if the outputs agree.

  gradfast export resnet50-elpv-1 --format onnx --dynamic-batch
  gradfast export DETECTOR --format torchscript --output cells.ts
  gradfast export RUN --format torch-export                      for torch.export.load and AOTInductor
  gradfast export RUN --format safetensors                       the weights alone, named as in torchvision
  gradfast export RUN --format onnx --images photos/             compare on photographs instead of random images

A detector goes to torchscript (a list of images), onnx (one image of any size) and safetensors.

The exported graph takes RGB pixels as they are, uint8 from 0 to 255: the normalisation is inside. Cropping and resizing
are not. Class names, image size, the crop's margin, mean and std are in the file's metadata. A classifier returns
logits; a detector returns boxes in pixels, labels and scores."""


def build_parser() -> CommandParser:
    parser = CommandParser(prog="gradfast export", description=DESCRIPTION)
    parser.add_argument("checkpoint", metavar="RUN|CHECKPOINT", help="a run (its best checkpoint), or a checkpoint")
    parser.add_argument(
        "--format", metavar="FORMAT", required=True, help="torchscript, onnx, torch-export or safetensors"
    )
    parser.add_argument("--output", metavar="FILE", help="default: the run's name and the format's suffix, here")
    parser.add_argument("--img-size", metavar="PIXELS", help="side of the images of a classifier (default: the run's)")
    parser.add_argument(
        "--dynamic-batch",
        action="store_true",
        help="let the number of images of ONNX and torch.export vary (default: one; TorchScript takes any)",
    )
    parser.add_argument(
        "--images", metavar="PATH", nargs="+", help="compare on these images, up to 16 (default: random ones)"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """``gradfast export``; returns the exit code."""
    options = build_parser().parse_args(arguments)
    for package in ("numpy", "PIL", "torchvision"):
        require(package, "train", "gradfast export")
    from gradfast.train.trained.export import FORMATS, export
    from gradfast.train.trained.load import find_checkpoint, read_trained
    from gradfast.train.trained.watching import note

    if options.format not in FORMATS:
        raise UserError(f"--format: expected one of {', '.join(FORMATS)}, got {options.format!r}")
    checkpoint = find_checkpoint(options.checkpoint)
    trained = read_trained(checkpoint)
    size = choose_size(trained, options)
    output = Path(options.output or f"{checkpoint.resolve().parent.name}{FORMATS[options.format][0]}")
    content, difference = export(
        trained, options.format, choose_images(trained, options.images, size), size, options.dynamic_batch
    )
    with atomic_write(output) as file:
        file.write(content)
    if difference.boxes == 0:
        note("no box was found in any of the images, so that none could be compared: give --images with objects")
    print(describe(output, len(content), difference, "" if options.images else "random "))
    return 0


def choose_size(trained: Trained, options: Any) -> int:
    """Side of the images that the exported model is made for."""
    if options.img_size is None:
        return trained.config.img_size
    if trained.config.task == "detect":
        raise UserError("--img-size: a detector takes images of any size, and resizes them itself; leave it out")
    size = check_value("img_size", options.img_size, "--img-size")
    assert isinstance(size, int)
    return size


def choose_images(trained: Trained, names: Sequence[str] | None, size: int) -> list[Tensor]:
    """The images to compare on.

    Raises:
        UserError: one cannot be read.
    """
    from gradfast.train.data.preprocess import ClassifierTransform, load_rgb
    from gradfast.train.trained.export import random_images
    from gradfast.train.trained.predict import find_images

    if names is None and trained.config.task == "detect":
        first, second = random_images(size, count=2)
        return [first, second[:, : max(1, 3 * size // 4)]]  # of two shapes
    if names is None:
        return random_images(size)
    transform = trained.transform
    if isinstance(transform, ClassifierTransform):
        transform = ClassifierTransform(size, transform.margin)
    return [transform.pixels(load_rgb(path)) for path in find_images(names)[:MOST_IMAGES]]


def describe(output: Path, size: int, difference: Difference, kind: str) -> str:
    from gradfast.train.trained.export import TOLERANCE

    boxes = "" if difference.boxes is None else f" with {difference.boxes} boxes"
    return (
        f"{output}: {size / 1e6:.1f} MB; on {difference.images} {kind}images{boxes} it differs from the model by "
        f"{difference.largest:.2g} at most, {difference.relative:.2g} of the largest output ({TOLERANCE:g} is allowed)"
    )
