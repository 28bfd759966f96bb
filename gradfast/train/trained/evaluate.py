"""Measure a trained model anew: on the images that its run held out, or on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradfast.errors import UserError
from gradfast.train.config import TrainConfig, make_config
from gradfast.train.data.images import BadImage
from gradfast.train.data.joined import join_parts
from gradfast.train.machine.place import Place, choose_device
from gradfast.train.trained.class_scores import class_scores
from gradfast.train.trained.load import Trained

SPLITS = ("val", "all")


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        values: the columns that evaluation has in summary.csv.
        per_class: class -> its figures.
        confusion: [K, K] int64 counts of (true, predicted) class, of a classifier; None of a detector.
        images: how many were measured.
        bad: files that were left out.
        same_data: whether these are the images, in the split, that the model was trained with.
    """

    values: dict[str, float]
    per_class: dict[str, dict[str, float]]
    confusion: Tensor | None
    images: int
    bad: list[BadImage]
    same_data: bool


def evaluation_config(trained: Trained, changes: dict[str, Any]) -> TrainConfig:
    """The settings of the run with some changed; whatever a setting depends on is decided anew."""
    settings = dataclasses.asdict(trained.config) | changes
    return make_config(settings | {"resume": None, "output": None})


def measure(
    trained: Trained,
    config: TrainConfig,
    split: str,
    report: Callable[[str], None],
    watch: Callable[[Iterable[Any], int], Iterator[Any]],
) -> Measured:
    """Measure a model.

    Args:
        config: of `evaluation_config`: data, device, precision, batch size, workers.
        split: val for the held-out images, all for the training images too.
        report: told what is going on.
        watch: passes batches on, and shows how far they are; the second argument is how many there are.

    Raises:
        UserError: the data cannot be used, or has other classes.
    """
    device = choose_device(config.device)
    data = trained.task.build_data(config, report)
    if tuple(data.classes) != trained.classes:
        raise UserError(
            f"--data {config.data} has the classes {', '.join(data.classes)}, and {trained.path} was trained on "
            f"{', '.join(trained.classes)}"
        )
    same_data = data.fingerprint() == trained.fingerprint
    if split == "all":
        data = dataclasses.replace(data, evaluation=join_parts(data.train, data.evaluation))
    place = Place.of(device, config.amp, config.channels_last)
    model = trained.model.to(device).to(memory_format=place.memory_format)
    meter: Any = trained.task.build_objective(config, data, place).meter()
    _, loader = data.loaders(config, pin_memory=device.type == "cuda")
    images, bad = 0, list(data.bad)
    try:
        with torch.inference_mode():
            for batch in watch(loader.epoch(0), len(loader)):
                bad += batch.bad
                images += batch.size
                if batch.size:
                    meter.add(model, batch)
    finally:
        loader.close()
    if images == 0:
        raise UserError(f"none of the images of {config.data} can be read")
    values = dict(meter.result().values)
    if hasattr(meter, "confusion"):
        counts = meter.confusion.counts.cpu()
        return Measured(values, class_scores(counts, trained.classes), counts, images, bad, same_data)
    return Measured(values, box_scores(meter, data), None, images, bad, same_data)


def box_scores(meter: Any, data: Any) -> dict[str, dict[str, float]]:
    """AP of each class of a detector, and how many boxes there are to find."""
    counts = data.evaluation.listing.counts()
    found = meter.coco.results().per_class
    return {name: {"boxes": count, "AP": found[name]} for name, count in zip(data.classes, counts, strict=True)}
