"""The learning-rate range test: a short run with a rising rate, to see where the loss falls and where it bursts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradfast.errors import UserError
from gradfast.extras import require
from gradfast.files import atomic_write
from gradfast.train.config import TrainConfig
from gradfast.train.interrupt import StopRequest
from gradfast.train.loop import grouped
from gradfast.train.machine.drawing import random_state, set_random_state
from gradfast.train.results.claim import Claims
from gradfast.train.results.curves import FIRST, GUIDE, SECOND
from gradfast.train.results.history import to_csv
from gradfast.train.results.output import RANGE_TEST, make_output, run_name
from gradfast.train.results.progress import Progress
from gradfast.train.settings import to_command
from gradfast.train.step import Learner
from gradfast.train.tasks.task import AnyBatch, TaskData

TABLE, PICTURE = RANGE_TEST
LOWEST, HIGHEST = 1e-6, 10.0
SMOOTHING = 0.9  # what the running mean keeps at each step
DIVERGED = 4.0  # times the lowest smoothed loss
FEWEST = 10  # steps before anything is called divergence, and without which nothing is suggested


@dataclass
class RangeTest:
    """What the test saw, a value for each step.

    Attributes:
        smoothed: running mean of the losses, m_t = (0.9 m_{t-1} + 0.1 l_t) / (1 - 0.9^t), free of its start at zero.
        diverged: whether it ended before the highest rate.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool

    def lowest(self) -> int:
        """The step of the lowest smoothed loss."""
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    def suggestion(self) -> float | None:
        """A tenth of the rate at which the smoothed loss is lowest, to two digits; None where it never fell.

        At the lowest loss itself the rate is already at the edge: the running mean lags, and the loss of one step comes
        from the rates before. Smith (2017), "Cyclical Learning Rates for Training Neural Networks", reads the bounds
        off such a curve by eye; a tenth is the customary reading of a machine. The steepest descent is the other one,
        but it is the derivative of noisy losses.
        """
        if len(self.smoothed) < FEWEST or not min(self.smoothed) < 0.99 * self.smoothed[0]:
            return None
        where = self.lowest()
        return float(f"{self.rates[where] / 10:.2g}")

    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls fastest with the logarithm of the rate; for comparison."""
        slopes = {
            n: (self.smoothed[n + 1] - self.smoothed[n - 1]) / math.log(self.rates[n + 1] / self.rates[n - 1])
            for n in range(FEWEST // 2, self.lowest())
        }
        return float(f"{self.rates[min(slopes, key=slopes.__getitem__)]:.2g}") if slopes else None


def range_test(
    learner: Learner,
    epoch: Callable[[int], Iterable[AnyBatch]],
    accumulate: int = 1,
    steps: int = 100,
    stopped: Callable[[], bool] = lambda: False,
) -> RangeTest:
    """Train for `steps` optimiser steps at lr_t = LOWEST (HIGHEST / LOWEST)^(t / (steps - 1)), or until it diverges.

    Clipping, decay and precision are the run's own, since they decide which rates it stands. Afterwards the learner is
    as it was, to the bit: weights, statistics, the optimiser's state, random numbers.

    Args:
        epoch: the training batches of an epoch of this number; as many epochs are taken as are needed.
        accumulate: batches per step.
        stopped: a true answer ends the test.
    """
    guard, learner.guard = learner.guard, None  # which would draw the rate back
    before, rates = copy.deepcopy(learner.state_dict()), _rates_of(learner)
    random = random_state(learner.device)
    found = RangeTest([], [], [], False)
    mean = 0.0
    groups = grouped(_endless(epoch), accumulate)
    try:
        learner.begin_epoch(0)
        for number, group in enumerate(itertools.islice(groups, steps), start=1):
            rate = LOWEST * (HIGHEST / LOWEST) ** ((number - 1) / max(1, steps - 1))
            for parameters in learner.optimizer.param_groups:
                parameters["lr"] = rate
            result = learner.step(group)
            if result is None:
                continue
            loss = float(result.loss)
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            smoothed = mean / (1 - SMOOTHING ** (len(found.losses) + 1))
            lowest = min(found.smoothed, default=math.inf)
            if not math.isfinite(loss) or (len(found.losses) >= FEWEST and smoothed > DIVERGED * lowest):
                found.diverged = True
                break
            found.rates.append(rate)
            found.losses.append(loss)
            found.smoothed.append(smoothed)
            if stopped():
                break
    finally:
        learner.load_state_dict(before)
        learner.guard = guard
        for parameters, rate in zip(learner.optimizer.param_groups, rates, strict=True):
            parameters["lr"] = rate
        learner.optimizer.zero_grad(set_to_none=True)
        set_random_state(random, learner.device)
    return found


def find_rate(
    config: TrainConfig,
    data: TaskData,
    learner: Learner,
    output: Path | None,
    progress: Progress,
    claims: Claims,
    given: Mapping[str, Any],
) -> int:
    """The command's ``--lr-find``: test, write, draw and suggest; returns the exit code.

    Args:
        output: where to write; None makes a new folder below runs/.
        given: the settings of the command, for the one that it prints.
    """
    train, evaluation = data.loaders(config, pin_memory=learner.device.type == "cuda")
    try:
        with StopRequest() as stop:
            progress.say(f"range test of {config.lr_find} steps, batch {config.batch_size * config.grad_accum}")
            found = range_test(learner, train.epoch, config.grad_accum, config.lr_find, lambda: bool(stop))
    finally:
        train.close()
        evaluation.close()
    if stop.signal is not None:
        progress.close()
        progress.say(f"stopped by {stop.signal.name} after {len(found.rates)} steps; nothing was written")
        return stop.exit_code
    if not found.rates:
        raise UserError(
            f"--lr-find: the loss is not finite even at a rate of {LOWEST:g}; look at the data and the start"
        )
    folder, _ = make_output(output, run_name(config.model, config.data))
    claims.take(folder)
    write_range_test(folder, found, run_name(config.model, config.data))
    kept = {name: value for name, value in given.items() if name not in ("lr_find", "lr")} | {"output": str(folder)}
    progress.close()
    progress.say(describe_range_test(found, folder, to_command(kept)))
    return 0


def _rates_of(learner: Learner) -> list[float]:
    return [group["lr"] for group in learner.optimizer.param_groups]


def _endless(epoch: Callable[[int], Iterable[AnyBatch]]) -> Iterator[AnyBatch]:
    for number in itertools.count():
        yield from epoch(number)


def write_range_test(folder: Path, found: RangeTest, title: str) -> None:
    """``lr_find.csv`` with a row per step, and ``lr_find.png``."""
    columns = ("step", "lr", "loss", "smoothed")
    rows = zip(range(1, len(found.rates) + 1), found.rates, found.losses, found.smoothed, strict=True)
    with atomic_write(folder / TABLE) as file:
        file.write(to_csv(columns, [dict(zip(columns, row)) for row in rows]).encode())
    require("matplotlib", "train", PICTURE)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color=GUIDE, linewidth=0.8, alpha=0.7, label="loss")
    axes.plot(found.rates, found.smoothed, color=FIRST, label="running mean")
    suggestion = found.suggestion()
    if suggestion is not None:
        axes.axvline(suggestion, color=SECOND, linestyle="--", label=f"suggestion {suggestion:g}")
    if found.smoothed:
        low, high = min(found.smoothed), max(found.smoothed[0], found.smoothed[-1])
        axes.set_ylim(low - 0.2 * (high - low), high + 0.4 * (high - low) + 1e-9)
    axes.set(title=f"{title}: learning-rate range test", xlabel="learning rate", ylabel="loss", xscale="log")
    axes.grid(alpha=0.25)
    axes.legend(loc="best")
    with atomic_write(folder / PICTURE) as file:
        FigureCanvasAgg(figure).print_png(file)


def describe_range_test(found: RangeTest, folder: Path, command: str) -> str:
    """What was seen, what it suggests, and how to go on."""
    seen = f"{len(found.rates)} steps from {LOWEST:g} to {found.rates[-1] if found.rates else LOWEST:.2g}"
    lines = [f"range test {seen}{', where the loss burst' if found.diverged else ''}; {folder / PICTURE}, {TABLE}"]
    suggestion, steepest = found.suggestion(), found.steepest()
    if suggestion is None:
        lines.append("suggestion none: the loss did not fall at any rate. Look at the data and the model's start first")
        return "\n".join(lines)
    lines.append(
        f"suggestion --lr {suggestion:g}: a tenth of {found.rates[found.lowest()]:.2g}, where the mean loss was lowest "
        f"(Smith 2017)" + (f"; it fell fastest at {steepest:g}" if steepest is not None else "")
    )
    lines.append(f"start      {command} --lr {suggestion:g}")
    return "\n".join(lines)
