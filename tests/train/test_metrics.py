"""Accuracy, balanced accuracy, loss and the numbers of an epoch, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gradfast.train.model.criterion import ClassificationLoss, balanced_weights
from gradfast.train.results.metrics import Confusion, majority_share
from gradfast.train.results.tally import Tally


def confusion_of(pairs: list[tuple[int, int]], classes: int) -> Confusion:
    """From (true, predicted) pairs, in batches of two."""
    confusion = Confusion(classes, torch.device("cpu"))
    for start in range(0, len(pairs), 2):
        targets, predicted = zip(*pairs[start : start + 2])
        confusion.add(torch.eye(classes)[list(predicted)], torch.tensor(targets))
    return confusion


def test_confusion_counts_true_by_predicted() -> None:
    confusion = confusion_of([(0, 0), (0, 1), (0, 0), (1, 1), (2, 0)], 3)
    assert confusion.counts.tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_accuracies_by_hand() -> None:
    confusion = confusion_of([(0, 0)] * 6 + [(0, 1)] * 2 + [(1, 0)] + [(1, 1)], 2)
    assert confusion.accuracy() == pytest.approx(7 / 10, rel=1e-15)
    assert confusion.balanced_accuracy() == pytest.approx((6 / 8 + 1 / 2) / 2, rel=1e-15)


def test_a_constant_guess_is_no_better_than_chance() -> None:
    confusion = confusion_of([(0, 0)] * 90 + [(1, 0)] * 10, 2)
    assert (confusion.accuracy(), confusion.balanced_accuracy()) == (0.9, 0.5)


def test_a_class_that_was_not_seen_does_not_count() -> None:
    assert confusion_of([(0, 0), (0, 2), (1, 1)], 3).balanced_accuracy() == pytest.approx(0.75)


def test_majority_share() -> None:
    assert majority_share([3, 9]) == 0.75


def test_balanced_weights_by_hand() -> None:
    assert balanced_weights([30, 10]).tolist() == pytest.approx([40 / 60, 2.0])


def test_balanced_weights_average_to_one_over_the_images() -> None:
    counts = [7, 11, 23]
    weights = balanced_weights(counts).double()
    assert float((weights * torch.tensor(counts)).sum() / sum(counts)) == pytest.approx(1.0, rel=1e-6)


def test_loss_of_batches_adds_up_to_the_loss_of_the_whole() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(10, 3, dtype=torch.float64), torch.randint(3, (10,))
    weights = torch.tensor([0.5, 1.0, 2.0])
    loss = ClassificationLoss(weights, smoothing=0.1)
    parts = [loss.sums(logits[i : i + 4], targets[i : i + 4]) for i in range(0, 10, 4)]
    total = float(sum(part[0] for part in parts) / sum(part[1] for part in parts))
    log_probability = logits - logits.logsumexp(1, keepdim=True)
    w = weights.double()[targets]
    expected = float(-(w * log_probability[torch.arange(10), targets]).sum() / w.sum())
    assert total == pytest.approx(expected, rel=1e-6)  # computed in float32


def test_loss_without_weights_counts_images() -> None:
    loss = ClassificationLoss(None, smoothing=0.0)
    total, count = loss.sums(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    assert float(total) == pytest.approx(4 * math.log(2)) and int(count) == 4


def tally_of(rows: list[tuple[float, float, float]], images: int = 4) -> Tally:
    tally = Tally()
    for loss, norm, coefficient in rows:
        tally.add(torch.tensor(loss), torch.tensor(norm), torch.tensor(coefficient), 0.1, images)
    tally.drain()
    return tally


def test_tally_by_hand() -> None:
    tally = tally_of([(1.0, 4.0, 0.25), (3.0, 0.5, 1.0), (2.0, 1.5, 0.5)])
    tally.add(torch.tensor(8.0), torch.tensor(2.0), torch.tensor(0.5), 0.1, 12)
    tally.drain()
    assert tally.loss() == pytest.approx((4 * 1 + 4 * 3 + 4 * 2 + 12 * 8) / 24)
    assert tally.grad_norm() == 2.0 and tally.grad_norm_max() == 4.0
    assert tally.clip_fraction() == 0.75 and tally.images() == 24
    assert tally.recent("loss", 2) == 5.0


def test_tally_leaves_non_finite_norms_out_of_its_statistics() -> None:
    tally = tally_of([(1.0, 3.0, 0.5), (1.0, math.inf, 0.0), (1.0, math.nan, math.nan), (1.0, 1.0, 1.0)])
    assert (tally.grad_norm(), tally.grad_norm_max(), tally.clip_fraction()) == (2.0, 3.0, 0.5)


def test_tally_keeps_values_though_the_optimiser_reuses_its_tensor() -> None:
    tally, norm = Tally(), torch.tensor(1.0)
    for value in (1.0, 2.0, 3.0):
        norm.fill_(value)
        tally.add(torch.tensor(0.0), norm, torch.tensor(1.0), 0.1, 1)
    assert tally.waiting == 3
    tally.drain()
    assert tally.waiting == 0 and tally.columns["grad_norm"] == [1.0, 2.0, 3.0]


def test_tally_survives_a_checkpoint() -> None:
    tally = tally_of([(1.5, 4.0, 0.25)])
    tally.seconds, tally.skipped_steps = 2.5, 1
    copy = Tally()
    copy.load_state_dict(tally.state_dict())
    assert copy.state_dict() == tally.state_dict() and copy.columns is not tally.columns


def test_tally_keeps_the_parts_of_the_loss_and_names_the_bad_one() -> None:
    tally = Tally(("classes", "boxes"))
    for classes, boxes in ((1.0, 2.0), (3.0, math.nan)):
        parts = {"boxes": torch.tensor(boxes), "classes": torch.tensor(classes)}
        tally.add(torch.tensor(classes + boxes), torch.tensor(1.0), torch.tensor(1.0), 0.1, 4, parts)
    tally.drain()
    assert tally.columns["classes"] == [1.0, 3.0] and tally.loss("classes") == 2.0
    assert tally.nonfinite_losses() == ["boxes"]
    copy = Tally(("classes", "boxes"))
    copy.load_state_dict(tally.state_dict())
    assert copy.columns["classes"] == [1.0, 3.0] and copy.nonfinite_losses() == ["boxes"]


def test_a_loss_without_parts_is_itself_the_bad_one() -> None:
    assert tally_of([(1.0, 1.0, 1.0)]).nonfinite_losses() == []
    assert tally_of([(math.inf, math.inf, 0.0)]).nonfinite_losses() == ["loss"]
