"""Classification: one class to an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.train.config import TrainConfig
from gradfast.train.data.batches import Batch
from gradfast.train.data.build import Data, build_data
from gradfast.train.data.mixing import Mixing, build_mixing
from gradfast.train.machine.place import Place, normaliser
from gradfast.train.machine.processes import World
from gradfast.train.model.build import build_model
from gradfast.train.model.criterion import ClassificationLoss, balanced_weights
from gradfast.train.results.metrics import Confusion, majority_share
from gradfast.train.tasks.task import Evaluation, Panel

CLASSES_SHOWN = 8


class Classify:
    """``--task classify``: cross entropy; the best epoch is the one of the highest balanced accuracy."""

    columns = ("eval_loss", "eval_acc1", "eval_balanced_acc")  # the last two as shares, 0 to 1
    score = "eval_balanced_acc"
    score_key = "balanced_accuracy"
    panels = (
        Panel("loss", (("train_loss", "training"), ("eval_loss", "held out"))),
        Panel("accuracy on held-out images", (("eval_acc1", "accuracy"), ("eval_balanced_acc", "balanced accuracy"))),
    )

    def build_data(self, config: TrainConfig, report: Callable[[str], None]) -> Data:
        return build_data(config, report)

    def build_model(self, config: TrainConfig, data: Data) -> nn.Module:
        return build_model(config, len(data.classes))

    def build_objective(self, config: TrainConfig, data: Data, place: Place) -> ClassObjective:
        counts = data.train.listing.counts()
        criterion = ClassificationLoss(
            balanced_weights(counts) if config.class_weights == "balanced" else None, config.label_smoothing
        )
        mixing = build_mixing(len(data.classes), config.mixup, config.cutmix, config.seed)
        return ClassObjective(criterion.to(place.device), len(data.classes), place, mixing)

    def describe_data(self, config: TrainConfig, data: Data) -> str:
        train, held_out = data.train.listing.counts(), data.evaluation.listing.counts()
        classes = list(zip(data.classes, train, held_out))
        shown = ", ".join(f"{name} {n} + {m}" for name, n, m in classes[:CLASSES_SHOWN])
        return (
            f"{sum(train)} training + {sum(held_out)} held-out images of {len(classes)} classes "
            f"({shown}{' ...' if len(classes) > CLASSES_SHOWN else ''})"
        )

    def describe_evaluation(self, row: Mapping[str, Any]) -> str:
        return f"loss {row['eval_loss']:.3f}  accuracy {row['eval_acc1']:.3f}  balanced {row['eval_balanced_acc']:.3f}"

    def describe_result(self, summary: Sequence[Mapping[str, Any]], best: tuple[int, float], data: Data) -> list[str]:
        last = summary[-1]
        counts = data.evaluation.listing.counts()
        commonest = data.classes[counts.index(max(counts))]
        return [
            f"last       accuracy {last['eval_acc1']:.3f}, balanced accuracy {last['eval_balanced_acc']:.3f}",
            f"best       balanced accuracy {best[1]:.3f} in epoch {best[0]} (chosen on the held-out images themselves, "
            "so a little flattering)",
            f"guessing   accuracy {majority_share(counts):.3f} (always {commonest!r}), balanced accuracy "
            f"{1 / len(counts):.3f}",
        ]


class ClassObjective:
    """Cross entropy of a batch, and loss and accuracies over held-out images.

    Args:
        classes: outputs of the model.
        mixing: makes mixtures of a training batch's images, or None.
    """

    components = ()
    fewest = 2  # over one image, left over when its neighbours could not be read, there is no variance

    def __init__(self, criterion: ClassificationLoss, classes: int, place: Place, mixing: Mixing | None = None) -> None:
        self.criterion = criterion
        self.classes = classes
        self.place = place
        self.mixing = mixing
        self.normalise = normaliser(place.device)
        self.class_weights = None if criterion.weights is None else criterion.weights.double().cpu()

    @property
    def mixes(self) -> bool:
        return self.mixing is not None

    def weight(self, batch: Batch) -> float:
        """The sum of the weights of its images' classes; mixed images have none."""
        if self.class_weights is None or self.mixes:
            return float(batch.size)
        return float(self.class_weights[batch.targets].sum())

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        images, targets = self.to_device(batch)
        if self.mixing is not None and batch.size:
            images, targets = self.mixing(images, targets, batch.number)
            images, targets = images[batch.guests :], targets[batch.guests :]
        logits = self.logits(model, images)
        if not batch.size:
            return 0.0 * logits.sum(), {}
        return self.criterion(logits, targets), {}

    def meter(self) -> ClassMeter:
        return ClassMeter(self)

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(images [n, 3, height, width] float32, classes [n] int64)"""
        images = batch.images.to(self.place.device, non_blocking=True)
        targets = batch.targets.to(self.place.device, non_blocking=True)
        return self.normalise(images).contiguous(memory_format=self.place.memory_format), targets

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        with self.place.autocast():
            logits: Tensor = model(images)
        return logits


class ClassMeter:
    """Loss, accuracy and balanced accuracy; the sums stay on the device until `result`."""

    def __init__(self, objective: ClassObjective) -> None:
        device = objective.place.device
        self.objective = objective
        self.confusion = Confusion(objective.classes, device)
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, model: nn.Module, batch: Batch) -> None:
        images, targets = self.objective.to_device(batch)
        logits = self.objective.logits(model, images)
        self.sums += torch.stack(self.objective.criterion.sums(logits, targets)).double()
        self.confusion.add(logits, targets)

    def join(self, world: World) -> None:
        world.add_up(self.sums)
        world.add_up(self.confusion.counts)

    def result(self) -> Evaluation:
        loss = float(self.sums[0] / self.sums[1])
        values = (loss, self.confusion.accuracy(), self.confusion.balanced_accuracy())
        return Evaluation(dict(zip(Classify.columns, values, strict=True)), loss)
