"""Predictions as lines: CSV or JSON Lines, of classes or of boxes; or COCO's list of results."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gradfast.errors import UserError
from gradfast.train.trained.predict import Prediction


class Format(Protocol):
    """How predictions are written."""

    def begin(self) -> str:
        """What stands before the first."""

    def one(self, prediction: Prediction) -> str:
        """What is written of one image."""

    def end(self) -> str:
        """What stands behind the last."""


class _Lines:
    def begin(self) -> str:
        return ""

    def end(self) -> str:
        return ""


class ClassLines(_Lines):
    """A classifier's answers: ``file,rank,class,probability``, or an object per image with its `predictions`.

    Args:
        top: how many classes of each image, the most probable first.
        kind: csv or jsonl.
    """

    def __init__(self, classes: Sequence[str], top: int, kind: str) -> None:
        self.classes = classes
        self.top = min(top, len(classes))
        self.kind = kind

    def begin(self) -> str:
        return _csv([["file", "rank", "class", "probability"]]) if self.kind == "csv" else ""

    def one(self, prediction: Prediction) -> str:
        assert prediction.probabilities is not None
        best = prediction.probabilities.topk(self.top)
        pairs = [(self.classes[index], value) for index, value in zip(best.indices.tolist(), best.values.tolist())]
        if self.kind == "csv":
            file = str(prediction.path)
            return _csv([[file, rank, name, f"{value:.6f}"] for rank, (name, value) in enumerate(pairs, start=1)])
        answers = [{"class": name, "probability": value} for name, value in pairs]
        return json.dumps({"file": str(prediction.path), "predictions": answers}) + "\n"


class BoxLines(_Lines):
    """A detector's answers: ``file,class,score,x,y,width,height``, or an object per image with its `boxes`.

    Boxes are (left, top, width, height) in pixels, as in COCO.

    Args:
        score: boxes below it are left out.
        kind: csv or jsonl.
    """

    def __init__(self, classes: Sequence[str], score: float, kind: str) -> None:
        self.classes = classes
        self.score = score
        self.kind = kind

    def begin(self) -> str:
        return _csv([["file", "class", "score", "x", "y", "width", "height"]]) if self.kind == "csv" else ""

    def one(self, prediction: Prediction) -> str:
        boxes = boxes_above(prediction, self.score)
        if self.kind == "csv":
            rows = [
                (self.classes[label - 1], f"{score:.4f}", *(f"{x:.2f}" for x in box)) for label, score, box in boxes
            ]
            return _csv([[str(prediction.path), *row] for row in rows])
        found = [{"class": self.classes[label - 1], "bbox": box, "score": score} for label, score, box in boxes]
        return json.dumps({"file": str(prediction.path), "boxes": found}) + "\n"


class CocoResults:
    """COCO's list of results, one object per box: `image_id`, `category_id`, `bbox`, `score`, and `file_name`.

    Args:
        image_ids: by the names of files; None numbers the images from 1 in the order in which they were given.
        category_ids: by the names of classes; None takes the labels 1 to K.
    """

    def __init__(
        self,
        classes: Sequence[str],
        score: float,
        image_ids: Mapping[str, int] | None = None,
        category_ids: Mapping[str, int] | None = None,
    ) -> None:
        self.classes = classes
        self.score = score
        self.image_ids = image_ids
        self.category_ids = category_ids or {name: number for number, name in enumerate(classes, start=1)}
        self._separator = ""

    def begin(self) -> str:
        return "["

    def one(self, prediction: Prediction) -> str:
        name = prediction.path.name
        if self.image_ids is not None and name not in self.image_ids:
            raise UserError(f"--annotations: {name} is not one of its images; leave it out, or leave out --annotations")
        image_id = prediction.number if self.image_ids is None else self.image_ids[name]
        text = ""
        for label, score, box in boxes_above(prediction, self.score):
            category = self.category_ids[self.classes[label - 1]]
            entry = {"image_id": image_id, "category_id": category, "bbox": box, "score": score, "file_name": name}
            text += self._separator + "\n" + json.dumps(entry)
            self._separator = ","
        return text

    def end(self) -> str:
        return "\n]\n"


def boxes_above(prediction: Prediction, score: float) -> list[tuple[int, float, list[float]]]:
    """(label, score, [left, top, width, height]) of each box that is sure enough."""
    assert prediction.boxes is not None and prediction.labels is not None and prediction.scores is not None
    rows = zip(prediction.labels.tolist(), prediction.scores.tolist(), prediction.boxes.tolist(), strict=True)
    return [(label, sure, [x1, y1, x2 - x1, y2 - y1]) for label, sure, (x1, y1, x2, y2) in rows if sure >= score]


def read_ids(path: Path, classes: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """(image ids by file name, category ids by class name) of a COCO annotations file.

    Raises:
        UserError: it is not one, or lacks a class.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        images = {Path(image["file_name"]).name: int(image["id"]) for image in content["images"]}
        categories = {str(category["name"]): int(category["id"]) for category in content["categories"]}
    except OSError as error:
        raise UserError(f"--annotations {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--annotations {path} is not a COCO annotations file ({error!r})") from None
    missing = [name for name in classes if name not in categories]
    if missing:
        raise UserError(f"--annotations {path} has no category {missing[0]!r}, which the model was trained on")
    return images, categories


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
