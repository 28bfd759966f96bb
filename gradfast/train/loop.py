"""One epoch of training, and one pass of evaluation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from gradfast.train.data.images import BadImage
from gradfast.train.results.tally import Tally
from gradfast.train.schedule import Schedule
from gradfast.train.step import Learner
from gradfast.train.tasks.task import AnyBatch, Evaluation

OnBad = Callable[[Iterable[BadImage]], None]


def grouped(batches: Iterable[AnyBatch], size: int) -> Iterator[list[AnyBatch]]:
    """Lists of `size` consecutive batches, the last one as long as what is left."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def train_epoch(
    learner: Learner,
    batches: Iterable[AnyBatch],
    schedule: Schedule,
    epoch: int,
    first_step: int,
    accumulate: int,
    tally: Tally,
    on_bad: OnBad,
    after_step: Callable[[int], bool],
) -> None:
    """Train on the batches of an epoch, or of the rest of one.

    Args:
        epoch: its number, from 0.
        first_step: number of the first optimiser step, counted over the whole run.
        accumulate: batches per step.
        tally: takes one row per step.
        after_step: called with the number of batches done here; a true answer ends the epoch early.
    """
    learner.begin_epoch(epoch)
    seconds_before = tally.seconds
    start = time.perf_counter()
    done = 0
    stopwatch = learner.stopwatch
    stopwatch.begin()
    for number, group in enumerate(grouped(batches, accumulate)):
        stopwatch.lap("data")
        for batch in group:
            on_bad(batch.bad)
        rate = schedule.apply(learner.optimizer, first_step + number) * learner.rate_factor
        result = learner.step(group)
        if result is not None:
            measured = result.loss, result.grad_norm, result.clip_coef
            tally.add(*measured, rate, result.images, result.components, stopwatch.take())
        tally.seconds = seconds_before + time.perf_counter() - start
        done += len(group)
        if after_step(done):
            break
        stopwatch.lap("other")
    tally.seconds = seconds_before + time.perf_counter() - start


def evaluate(
    learner: Learner, batches: Iterable[AnyBatch], on_bad: OnBad, stopped: Callable[[], bool]
) -> Evaluation | None:
    """Measure the held-out images, of which each process has a part; None where `stopped` said so on the way."""
    learner.measured.eval()
    meter = learner.objective.meter()
    # FSDP2 keeps what it gathers in one pass for the next, and a tensor of inference mode cannot be trained.
    with torch.no_grad() if learner.spread.sharded else torch.inference_mode():
        for batch in batches:
            on_bad(batch.bad)
            if batch.size or learner.spread.sharded:
                meter.add(learner.measured, batch)
            if stopped():
                return None
        meter.join(learner.spread.world)
        return meter.result()
