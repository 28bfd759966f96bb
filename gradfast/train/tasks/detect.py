"""Detection: boxes around objects, each with a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.train.coco.dataset import SceneBatch
from gradfast.train.coco.listing import SceneListing
from gradfast.train.coco.metrics import NAMES, CocoEvaluation
from gradfast.train.coco.pictures import draw_predictions
from gradfast.train.config import TrainConfig
from gradfast.train.machine.place import Place, unit_range
from gradfast.train.machine.processes import World
from gradfast.train.tasks.detect_data import DetectionData, build_detection_data
from gradfast.train.tasks.detectors import DETECTORS, build_detector
from gradfast.train.tasks.task import Evaluation, Panel

PREFIX = "eval_"
PICTURES = "predictions.png"
PICTURED = 9  # held-out images, the first ones
CLASSES_SHOWN = 8

# A blank image without a box, through which a process that has no image takes part in a step.
NOTHING = SceneBatch(
    [torch.zeros(3, 64, 64, dtype=torch.uint8)],
    [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": -1}],
    [],
)


class Detect:
    """``--task detect``: torchvision's detectors and COCO's metrics; the best epoch is the one of the highest AP."""

    columns = tuple(PREFIX + name for name in NAMES)
    score = "eval_AP"
    score_key = "AP"
    panels = (
        Panel("loss", (("train_loss", "training"),)),
        Panel("COCO's AP on held-out images", (("eval_AP", "AP"), ("eval_AP50", "AP50"), ("eval_AP75", "AP75"))),
    )

    def build_data(self, config: TrainConfig, report: Callable[[str], None]) -> DetectionData:
        return build_detection_data(config, report)

    def build_model(self, config: TrainConfig, data: DetectionData) -> nn.Module:
        return build_detector(config, len(data.classes))

    def build_objective(self, config: TrainConfig, data: DetectionData, place: Place) -> BoxObjective:
        return BoxObjective(DETECTORS[config.model], data.evaluation.listing, place)

    def describe_data(self, config: TrainConfig, data: DetectionData) -> str:
        parts = data.train.listing, data.evaluation.listing
        train, held_out = (listing.counts() for listing in parts)
        classes = list(zip(data.classes, train, held_out))
        shown = ", ".join(f"{name} {n} + {m}" for name, n, m in classes[:CLASSES_SHOWN])
        empty = sum(listing.empty_scenes() for listing in parts)
        return (
            f"{len(parts[0])} training + {len(parts[1])} held-out images, {sum(train)} + {sum(held_out)} boxes of "
            f"{len(classes)} classes ({shown}{' ...' if len(classes) > CLASSES_SHOWN else ''})"
            + (f"; {empty} images without a box" if empty else "")
        )

    def describe_evaluation(self, row: Mapping[str, Any]) -> str:
        return f"AP {row['eval_AP']:.3f}  AP50 {row['eval_AP50']:.3f}  AP75 {row['eval_AP75']:.3f}"

    def describe_result(
        self, summary: Sequence[Mapping[str, Any]], best: tuple[int, float], data: DetectionData
    ) -> list[str]:
        return [
            f"last       {self.describe_evaluation(summary[-1])}",
            f"best       AP {best[1]:.3f} in epoch {best[0]} (chosen on the held-out images themselves, so a little "
            f"flattering); drawn in {PICTURES}",
        ]


class BoxObjective:
    """The sum of a detector's losses, and COCO's metrics over held-out images.

    Args:
        components: names of the losses.
        held_out: the ground truth.
    """

    fewest = 1  # one image has many places to take a mean over
    mixes = False

    def __init__(self, components: Sequence[str], held_out: SceneListing, place: Place) -> None:
        self.components = components
        self.held_out = held_out
        self.place = place

    def weight(self, batch: SceneBatch) -> float:
        return float(batch.size)

    def losses(self, model: nn.Module, batch: SceneBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        if not batch.size:
            total, named = self.losses(model, NOTHING)
            return 0.0 * total, {name: 0.0 * part for name, part in named.items()}
        targets = [
            {name: target[name].to(self.place.device, non_blocking=True) for name in ("boxes", "labels")}
            for target in batch.targets
        ]
        with self.place.autocast():
            parts: dict[str, Tensor] = model(self.to_device(batch), targets)
        return torch.stack([part.float() for part in parts.values()]).sum(), parts

    def meter(self) -> BoxMeter:
        return BoxMeter(self)

    def to_device(self, batch: SceneBatch) -> list[Tensor]:
        return unit_range(batch.images, self.place.device)


class BoxMeter:
    """COCO's twelve numbers, and pictures of the first images.

    Attributes:
        coco: what was predicted so far.
    """

    def __init__(self, objective: BoxObjective) -> None:
        self.objective = objective
        self.coco = CocoEvaluation(objective.held_out)
        self.pictured: list[tuple[Tensor, Mapping[str, Any], Mapping[str, Tensor]]] = []

    def add(self, model: nn.Module, batch: SceneBatch) -> None:
        with self.objective.place.autocast():
            predictions: list[dict[str, Tensor]] = model(self.objective.to_device(batch))
        self.coco.add([target["image_id"] for target in batch.targets], predictions)
        room = PICTURED - len(self.pictured)
        self.pictured += list(zip(batch.images, batch.targets, predictions))[:room]

    def join(self, world: World) -> None:
        if world.size > 1:
            self.coco.merge(world.gather(self.coco.state()))

    def result(self) -> Evaluation:
        values = {PREFIX + name: value for name, value in self.coco.results().metrics.items()}
        return Evaluation(values, 1.0 - values["eval_AP"], self.illustrate if self.pictured else None)

    def illustrate(self, folder: Path) -> None:
        """Draw the first held-out images, what is in them and what was found."""
        images, targets, predictions = zip(*self.pictured)
        draw_predictions(folder / PICTURES, images, targets, predictions, self.objective.held_out.classes)
