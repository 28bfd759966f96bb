"""One epoch of training, and one pass of evaluation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from gradfast.train.batches import Batch
from gradfast.train.images import BadImage
from gradfast.train.metrics import Confusion, Evaluation
from gradfast.train.schedule import Schedule
from gradfast.train.step import Learner
from gradfast.train.tally import Tally

OnBad = Callable[[Iterable[BadImage]], None]


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` consecutive batches, the last one as long as what is left."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def train_epoch(
    learner: Learner,
    batches: Iterable[Batch],
    schedule: Schedule,
    first_step: int,
    accumulate: int,
    tally: Tally,
    on_bad: OnBad,
    after_step: Callable[[int], bool],
) -> None:
    """Train on the batches of an epoch, or of the rest of one.

    Args:
        first_step: number of the first optimiser step, counted over the whole run.
        accumulate: batches per step.
        tally: takes one row per step.
        after_step: called with the number of batches done here; a true answer ends the epoch early.
    """
    learner.model.train()
    seconds_before = tally.seconds
    start = time.perf_counter()
    done = 0
    for number, group in enumerate(grouped(batches, accumulate)):
        for batch in group:
            on_bad(batch.bad)
        rate = schedule.apply(learner.optimizer, first_step + number)
        result = learner.step(group)
        if result is not None:
            tally.add(result.loss, result.grad_norm, result.clip_coef, rate, result.images)
        tally.seconds = seconds_before + time.perf_counter() - start
        done += len(group)
        if after_step(done):
            break
    tally.seconds = seconds_before + time.perf_counter() - start


@torch.inference_mode()
def evaluate(
    learner: Learner, batches: Iterable[Batch], classes: int, on_bad: OnBad, stopped: Callable[[], bool]
) -> Evaluation | None:
    """Loss, accuracy and balanced accuracy over the held-out images; None where `stopped` said so on the way."""
    learner.measured.eval()
    confusion = Confusion(classes, learner.device)
    sums = torch.zeros(2, dtype=torch.float64, device=learner.device)
    images = 0
    for batch in batches:
        on_bad(batch.bad)
        if len(batch.targets):
            logits, targets = learner.forward(batch, training=False)
            sums += torch.stack(learner.criterion.sums(logits, targets)).double()
            confusion.add(logits, targets)
            images += len(targets)
        if stopped():
            return None
    loss = float(sums[0] / sums[1])
    return Evaluation(loss, confusion.accuracy(), confusion.balanced_accuracy(), images)
