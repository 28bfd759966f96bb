"""What a trained model says about images: classes with probabilities, or boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.errors import UserError
from gradfast.train.data.folder import SUFFIXES, files_below
from gradfast.train.data.images import BadImage, read_image
from gradfast.train.data.preprocess import Transform
from gradfast.train.data.reading import usable_cores
from gradfast.train.machine.place import Place, normaliser, unit_range
from gradfast.train.trained.load import Trained


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Attributes:
        path: the image file.
        number: its place among those that were given, from 1.
        probabilities: [K] float32, of a classifier; else None.
        boxes: [n, 4] float32 (x1, y1, x2, y2) in pixels of the image as it is shown, of a detector; else None.
        labels: [n] int64, 1 to K.
        scores: [n] float32, falling.
        pixels: the image [3, height, width] uint8, as the model was given it.
    """

    path: Path
    number: int
    pixels: Tensor
    probabilities: Tensor | None = None
    boxes: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None


def find_images(names: Sequence[str]) -> list[Path]:
    """Image files: those given, whatever their names, and those below the folders given, by their names.

    Raises:
        UserError: a folder holds none.
    """
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if not path.is_dir():
            paths.append(path)
            continue
        found = [file for file in files_below(path) if file.suffix.lower() in SUFFIXES]
        if not found:
            raise UserError(f"the folder {path} holds no image ({', '.join(SUFFIXES)})")
        paths += found
    return paths


def read_batches(
    paths: Sequence[Path], transform: Transform, size: int
) -> Iterator[tuple[list[tuple[int, Tensor]], list[tuple[int, BadImage]]]]:
    """Batches of decoded images with their places among the paths, and those that cannot be decoded.

    Threads decode one batch ahead (decoders release the interpreter's lock), so that the memory of a batch or two is
    all that a million images take.
    """

    def read(path: Path) -> Tensor | BadImage:
        image = read_image(path)
        return image if isinstance(image, BadImage) else transform.pixels(image)

    with ThreadPoolExecutor(usable_cores()) as pool:

        def start(first: int) -> list[Future[Tensor | BadImage]]:
            return [pool.submit(read, path) for path in paths[first : first + size]]

        waiting = start(0)
        for first in range(0, len(paths), size):
            current, waiting = waiting, start(first + size)
            results = [(first + offset, future.result()) for offset, future in enumerate(current)]
            yield (
                [(index, result) for index, result in results if isinstance(result, Tensor)],
                [(index, result) for index, result in results if isinstance(result, BadImage)],
            )


def predict(
    trained: Trained, place: Place, paths: Sequence[Path], batch_size: int
) -> Iterator[list[Prediction | BadImage]]:
    """Predict image by image, a list for each batch, in the order of the paths.

    The steps from file to tensor and the precision are those of evaluation; a batch's size changes only rounding.
    """
    model = trained.model.to(place.device).to(memory_format=place.memory_format)
    answer = boxes_of if trained.config.task == "detect" else classes_of
    for good, bad in read_batches(paths, trained.transform, batch_size):
        found: list[tuple[int, Prediction | BadImage]] = list(bad)
        if good:
            with torch.inference_mode():
                answers = answer(model, place, [pixels for _, pixels in good])
            found += [
                (index, Prediction(paths[index], index + 1, pixels, **one))
                for (index, pixels), one in zip(good, answers, strict=True)
            ]
        yield [one for _, one in sorted(found, key=lambda pair: pair[0])]


def classes_of(model: nn.Module, place: Place, images: Sequence[Tensor]) -> Iterable[dict[str, Any]]:
    batch = normaliser(place.device)(torch.stack(list(images)).to(place.device))
    with place.autocast():
        logits = model(batch.contiguous(memory_format=place.memory_format))
    return [{"probabilities": row} for row in logits.float().softmax(dim=1).cpu()]


def boxes_of(model: nn.Module, place: Place, images: Sequence[Tensor]) -> Iterable[dict[str, Any]]:
    with place.autocast():
        found = model(unit_range(images, place.device))
    return [
        {name: one[name].float().cpu() for name in ("boxes", "scores")} | {"labels": one["labels"].cpu()}
        for one in found
    ]
