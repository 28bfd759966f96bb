"""COCO's twelve numbers, from predictions that may have been made by several processes.

AP is the mean, over the classes and over ten IoU thresholds from 0.5 to 0.95, of the precision averaged over 101
recalls; AP50 and AP75 are at one threshold; s, m and l count objects below 32^2, up to 96^2 and above 96^2 pixels. AR1,
AR10 and AR100 are the recalls, averaged likewise, of so many detections an image. The arithmetic is pycocotools'; see
https://cocodataset.org/#detection-eval.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from gradfast.extras import require
from gradfast.train.coco.listing import SceneListing

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# Per image id, rows of (left, top, width, height, score, label), float64: all that the numbers depend on.
State = dict[int, numpy.ndarray]


@dataclass(frozen=True)
class CocoResults:
    """What the predictions are worth.

    Attributes:
        metrics: the twelve numbers by the names in `NAMES`, in [0, 1]; nan where there is no ground truth to find,
            such as no large object.
        per_class: AP of each class that has ground truth, nan of the others.
        images: how many were predicted on.
        predictions: how many boxes, of all scores.
    """

    metrics: dict[str, float]
    per_class: dict[str, float]
    images: int
    predictions: int


class CocoEvaluation:
    """Gathers predictions image by image, and measures them against a listing's boxes and crowds.

    Args:
        listing: the ground truth.

    Raises:
        UserError: pycocotools is not installed.
    """

    def __init__(self, listing: SceneListing) -> None:
        require("pycocotools.cocoeval", "train", "COCO's metrics")
        self.listing = listing
        self._known = {scene.image_id for scene in listing.scenes}
        self._rows: State = {}

    def add(self, image_ids: Sequence[int], predictions: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Predictions on some images; of an image given before, those given first stand.

        Args:
            image_ids: of the listing's scenes.
            predictions: one per image, as torchvision's detectors return them: `boxes` [n, 4] (left, top, right,
                bottom) in pixels of the image as it is in its file, `labels` [n] in 1 to K, `scores` [n].
                Predictions that hold a NaN or an infinity are not counted, as a model that diverged may give.

        Raises:
            KeyError: an image that the listing does not have.
        """
        for image_id, prediction in zip(image_ids, predictions, strict=True):
            if image_id not in self._known:
                raise KeyError(f"no scene of the listing has the image id {image_id}")
            boxes = prediction["boxes"].detach().double().cpu().reshape(-1, 4)
            scores = prediction["scores"].detach().double().cpu().reshape(-1, 1)
            labels = prediction["labels"].detach().double().cpu().reshape(-1, 1)
            rows = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels], dim=1)
            self._rows.setdefault(image_id, rows[rows.isfinite().all(dim=1)].numpy())

    def state(self) -> State:
        """What was gathered, to be sent to another process (it can be pickled) or kept."""
        return dict(self._rows)

    def merge(self, states: Iterable[State]) -> None:
        """Take over what other processes gathered. An image that several predicted on, as a sampler that fills up its
        last batch makes them, counts once: the first given stands.
        """
        for state in states:
            for image_id, rows in state.items():
                self._rows.setdefault(image_id, rows)

    def results(self) -> CocoResults:
        """Measure. Images that nothing was added for count as images on which nothing was found."""
        count = sum(len(rows) for rows in self._rows.values())
        names = self.listing.classes
        if not any(self.listing.counts()):
            nothing = dict.fromkeys(NAMES, math.nan)
            return CocoResults(nothing, dict.fromkeys(names, math.nan), len(self._rows), count)
        evaluator = self._evaluate()
        values = [math.nan if value < 0 else float(value) for value in evaluator.stats]  # -1: no ground truth
        precision = evaluator.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, classes], all areas
        per_class = {name: mean_of_known(precision[:, :, index]) for index, name in enumerate(names)}
        return CocoResults(dict(zip(NAMES, values, strict=True)), per_class, len(self._rows), count)

    def _evaluate(self) -> Any:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
            truth = COCO()
            truth.dataset = self.listing.to_coco()
            truth.createIndex()
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": self._detections()}
            found.createIndex()
            evaluator = COCOeval(truth, found, iouType="bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return evaluator

    def _detections(self) -> list[dict[str, Any]]:
        """In COCO's form, in the order of the image ids, so that ties of scores fall the same whoever predicted."""
        detections: list[dict[str, Any]] = []
        for image_id in sorted(self._rows):
            for left, top, width, height, score, label in self._rows[image_id].tolist():
                detections.append(
                    {
                        "id": len(detections) + 1,
                        "image_id": image_id,
                        "category_id": self.listing.categories.category_id(int(label)),
                        "bbox": [left, top, width, height],
                        "area": width * height,
                        "score": score,
                        "iscrowd": 0,
                    }
                )
        return detections


def mean_of_known(precision: numpy.ndarray) -> float:
    """The mean of a class's precisions; nan where all are -1, which says that there is no ground truth."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else math.nan
