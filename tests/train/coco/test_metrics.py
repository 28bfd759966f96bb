"""COCO's metrics against numbers computed by hand."""

from __future__ import annotations

import math
import pickle

import pytest

pytest.importorskip("torchvision", exc_type=Exception)
pytest.importorskip("pycocotools")

import torch
from torch import Tensor
from train.coco.cases import listing_of

from gradfast.train.coco.listing import Crowd, SceneListing
from gradfast.train.coco.metrics import NAMES, CocoEvaluation, CocoResults

Boxes = list[tuple[float, float, float, float]]
LARGE = (0.0, 0.0, 100.0, 100.0)  # 10,000 pixels; large begins at 96^2 = 9,216
MOST = (0.0, 0.0, 77.0, 100.0)  # IoU 0.77 with LARGE: found at the thresholds 0.5 to 0.75, not at 0.8 to 0.95
ELSEWHERE = (100.0, 100.0, 200.0, 200.0)


def found(boxes: Boxes, labels: list[int], scores: list[float]) -> dict[str, Tensor]:
    edges = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": edges, "labels": torch.tensor(labels, dtype=torch.int64), "scores": torch.tensor(scores)}


NOTHING = found([], [], [])


def measure(listing: SceneListing, *predictions: dict[str, Tensor]) -> CocoResults:
    evaluation = CocoEvaluation(listing)
    evaluation.add([scene.image_id for scene in listing.scenes], predictions)
    return evaluation.results()


def test_against_numbers_computed_by_hand() -> None:
    """One class, three objects. By falling score: one found exactly, a false alarm, one found with an IoU of 0.77.

    At the thresholds 0.5 to 0.75 (six of ten) precision is 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3; made non-increasing
    it is 1 at the 34 recalls 0 to 0.33, 2/3 at the 33 recalls 0.34 to 0.66, and 0 at the other 34: (34 + 22) / 101.
    At 0.8 to 0.95 (four of ten) the third is a false alarm, too: 34 / 101.
    """
    listing = listing_of(([LARGE], [1]), ([LARGE, ELSEWHERE], [1, 1]), names="a")
    results = measure(listing, found([LARGE, ELSEWHERE], [1, 1], [0.9, 0.8]), found([MOST], [1], [0.7]))
    expected = (6 * 56 + 4 * 34) / 1010
    recall = (6 * 2 / 3 + 4 * 1 / 3) / 10
    metrics = results.metrics
    assert tuple(metrics) == NAMES
    assert metrics["AP"] == metrics["APl"] == pytest.approx(expected, rel=1e-12)
    assert metrics["AP50"] == metrics["AP75"] == pytest.approx(56 / 101, rel=1e-12)
    for name in ("AR1", "AR10", "AR100", "ARl"):
        assert metrics[name] == pytest.approx(recall, rel=1e-12)
    assert all(math.isnan(metrics[name]) for name in ("APs", "APm", "ARs", "ARm"))
    assert results.per_class == {"a": pytest.approx(expected, rel=1e-12)}
    assert (results.images, results.predictions) == (2, 3)


def test_every_class_has_its_ap() -> None:
    listing = listing_of(([LARGE, ELSEWHERE], [1, 3]), names="abc")
    results = measure(listing, found([LARGE, LARGE, LARGE], [1, 2, 3], [0.9, 0.8, 0.7]))
    assert results.per_class["a"] == pytest.approx(1.0)  # the label found where it is
    assert math.isnan(results.per_class["b"])  # no object of this class, so its false alarm does not count
    assert results.per_class["c"] == 0.0
    assert results.metrics["AP"] == pytest.approx(0.5)


def test_sizes_go_by_the_area() -> None:
    boxes = [(0.0, 0.0, 31.0, 31.0), (50.0, 50.0, 83.0, 83.0), (100.0, 100.0, 197.0, 197.0)]
    listing = listing_of((boxes, [1, 1, 1]), names="a")
    metrics = measure(listing, found(boxes[1:], [1, 1], [0.9, 0.9])).metrics
    assert [metrics[name] for name in ("ARs", "ARm", "ARl")] == pytest.approx([0, 1, 1])


def test_nothing_found() -> None:
    listing = listing_of(([LARGE], [1]), ([], []))
    for evaluation_ids in ([11, 12], []):
        evaluation = CocoEvaluation(listing)
        evaluation.add(evaluation_ids, [NOTHING] * len(evaluation_ids))
        results = evaluation.results()
        assert results.metrics["AP"] == results.metrics["AR100"] == 0.0
        assert results.per_class["a"] == 0.0 and math.isnan(results.per_class["b"])
        assert results.images == len(evaluation_ids)


def test_nothing_to_find() -> None:
    results = measure(listing_of(([], [])), found([LARGE], [1], [0.9]))
    assert all(math.isnan(value) for value in (*results.metrics.values(), *results.per_class.values()))
    assert results.predictions == 1


def test_a_diverged_model_finds_nothing() -> None:
    nan = float("nan")
    listing = listing_of(([LARGE], [1]))
    bad = found([LARGE, (nan, 0, 1, 1), LARGE], [1, 1, 1], [nan, 0.9, math.inf])
    assert measure(listing, bad).metrics["AP"] == 0.0


def test_detections_in_a_crowd_are_not_held_against_it() -> None:
    """A false alarm before the find halves the precision at every recall, unless it lies in a crowd."""
    listing = listing_of(([LARGE], [1]), names="a")
    predictions = found([ELSEWHERE, LARGE], [1, 1], [0.9, 0.8])
    assert measure(listing, predictions).metrics["AP"] == pytest.approx(0.5)
    crowd = Crowd(1, (90, 90, 110, 110), 12_100)
    crowded = SceneListing((listing.scenes[0]._replace(crowds=(crowd,)),), listing.categories)
    assert measure(crowded, predictions).metrics["AP"] == pytest.approx(1.0)


def test_shards_count_no_image_twice() -> None:
    listing = listing_of(([LARGE], [1]), ([LARGE, ELSEWHERE], [1, 2]), ([ELSEWHERE], [2]))
    predictions = [
        found([LARGE, ELSEWHERE], [1, 1], [0.9, 0.8]),
        found([MOST], [1], [0.7]),
        found([ELSEWHERE], [2], [0.6]),
    ]
    whole = measure(listing, *predictions)
    shards = [CocoEvaluation(listing) for _ in range(2)]
    shards[0].add([12], [predictions[1]])
    shards[1].add([11, 13, 12], [predictions[0], predictions[2], predictions[1]])  # 12 fills up the last batch
    gathered = CocoEvaluation(listing)
    gathered.merge(pickle.loads(pickle.dumps([shard.state() for shard in shards])))
    results = gathered.results()
    assert results.metrics == pytest.approx(whole.metrics, nan_ok=True, rel=0, abs=0)
    assert results.per_class == whole.per_class
    assert (results.images, results.predictions) == (3, 4)


def test_an_unknown_image_is_refused() -> None:
    with pytest.raises(KeyError, match="no scene of the listing has the image id 1"):
        CocoEvaluation(listing_of(([], []))).add([1], [NOTHING])


def test_it_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    measure(listing_of(([LARGE], [1])), NOTHING)
    assert capsys.readouterr() == ("", "")
