"""A training run from its settings to its results."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gradfast.errors import UserError
from gradfast.files import atomic_write
from gradfast.train.checkpoint import LAST, random_state, save_checkpoint, set_random_state
from gradfast.train.config import TrainConfig, to_yaml
from gradfast.train.criterion import ClassificationLoss, balanced_weights
from gradfast.train.curves import draw_curves
from gradfast.train.data import Data, build_data
from gradfast.train.history import History, step_rows, summary_row
from gradfast.train.images import BadImage
from gradfast.train.interrupt import StopRequest
from gradfast.train.loop import evaluate, train_epoch
from gradfast.train.metrics import Evaluation
from gradfast.train.models import build_model
from gradfast.train.optimizers import build_optimizer, restore_optimizer
from gradfast.train.output import check_output, make_output, run_name
from gradfast.train.progress import Progress, make_progress
from gradfast.train.report import describe_data, describe_epoch, describe_result, describe_setup
from gradfast.train.resume import Resumed, check_same_run, find_resumed
from gradfast.train.schedule import build_schedule
from gradfast.train.step import AMP_TYPES, Learner, choose_device
from gradfast.train.tally import Tally
from gradfast.version import __version__

REDRAW_SECONDS = 30.0  # the curves are drawn anew after an epoch if they are older than this, and at the end


def run(settings: dict[str, Any]) -> int:
    """Train with the given settings; the others keep their defaults, or those of the run that is resumed.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped it (after saving).

    Raises:
        UserError: see the message; nothing is left half-written.
    """
    with make_progress() as progress:
        resumed = find_resumed(settings, progress.say)
        config = TrainConfig(**((resumed.settings if resumed else {}) | settings)).resolve()
        output = resumed.output if resumed else (Path(config.output) if config.output else None)
        if resumed is None or output != resumed.folder:
            if output is not None:
                check_output(output)
        elif resumed.complete(config.epochs):
            progress.say(f"{resumed.path} has all of its {config.epochs} epochs; --epochs with more continues it")
            return 0
        device = choose_device(config.device)
        data = build_data(config, progress.say)
        progress.say(describe_data(config, data))
        if resumed:
            check_same_run(resumed, config, data)
        learner = build_learner(config, data, device)
        return Run(config, data, learner, progress).go(output, resumed)


def build_learner(config: TrainConfig, data: Data, device: torch.device) -> Learner:
    """The model, drawn from the seed, and what trains it."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(data.classes), config.img_size, config.zero_init_residual)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=memory_format)
    weights = balanced_weights(data.train.listing.counts()) if config.class_weights == "balanced" else None
    return Learner(
        model=model,
        criterion=ClassificationLoss(weights, config.label_smoothing).to(device),
        optimizer=build_optimizer(config, model),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
        device=device,
        amp=AMP_TYPES[config.amp],
        memory_format=memory_format,
    )


class Run:
    """A run under way.

    Attributes:
        epoch: epochs that are complete.
        batch: batches of the next epoch that are done; not 0 only after an interruption.
        best: number (from 1) and balanced accuracy of the best epoch so far; the first of equals.
    """

    def __init__(self, config: TrainConfig, data: Data, learner: Learner, progress: Progress) -> None:
        self.config = config
        self.data = data
        self.learner = learner
        self.progress = progress
        self.train, self.evaluation = data.loaders(config, pin_memory=learner.device.type == "cuda")
        self.steps_per_epoch = -(-len(self.train) // config.grad_accum)
        self.schedule = build_schedule(config, self.steps_per_epoch)
        self.epoch = 0
        self.batch = 0
        self.best = (0, -1.0)
        self.tally = Tally()
        self.stop = StopRequest()
        self.late_bad: set[str] = set()  # files found unreadable while training
        self._drawn = time.perf_counter()

    # ---------------------------------------------------------------- from start to end

    def go(self, output: Path | None, resumed: Resumed | None) -> int:
        if resumed:
            self.restore(resumed.state)
        self.folder, made = make_output(output, run_name(self.config.model, self.config.data))
        self.history = History(self.folder)
        try:
            self.start_folder(resumed)
        except UserError:
            if made:
                self.remove_folder()
            raise
        self.progress.say(describe_setup(self.config, self.learner, self.folder, resumed))
        self.progress.begin_run(self.steps_left())
        start = time.perf_counter()
        try:
            with self.stop:
                while self.epoch < self.config.epochs:
                    if not self.run_epoch():
                        return self.interrupted()
        finally:
            self.train.close()
            self.evaluation.close()
        self.draw()
        self.progress.close()
        self.progress.say(
            describe_result(self.history.summary, self.best, self.data, self.folder, time.perf_counter() - start)
        )
        return 0

    def start_folder(self, resumed: Resumed | None) -> None:
        """Put into the run folder what can be known before the first step; a full disk shows itself here."""
        self.history.start(resumed.folder if resumed else None, self.epoch)
        heading = f"gradfast {__version__}, torch {torch.__version__}, Python {platform.python_version()}\n"
        heading += "This run again: gradfast train -c config.yaml"
        with atomic_write(self.folder / "config.yaml") as file:
            file.write(to_yaml(self.config, heading).encode())
        if self.data.bad:
            with atomic_write(self.folder / "skipped_images.txt") as file:
                file.write("".join(f"{bad.path}: {bad.reason}\n" for bad in self.data.bad).encode())
        if resumed is None:
            self.save(is_best=False)
        elif self.folder != resumed.folder:
            resumed.copy_best(self.folder)
            self.save(is_best=False)

    def remove_folder(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    # ---------------------------------------------------------------- one epoch

    def run_epoch(self) -> bool:
        """Train, evaluate, record and save one epoch; False where a signal asked to stop."""
        number = self.epoch + 1
        start = time.perf_counter() - self.tally.seconds
        self.progress.begin_epoch(f"epoch {number}/{self.config.epochs}", len(self.train), self.batch)
        self.train_rest_of_epoch()
        if self.stop:
            return False
        if 0 < len(self.tally) == self.tally.skipped_steps:
            raise UserError(
                f"every step of epoch {number} was skipped for a NaN or infinite gradient: training has diverged; "
                f"start again with a lower --lr or a longer --warmup-epochs (the last sound state is in "
                f"{self.folder / LAST})"
            )
        self.progress.evaluating()
        result = evaluate(
            self.learner, self.evaluation.epoch(0), len(self.data.classes), self.note_bad, lambda: bool(self.stop)
        )
        if result is None:
            return False
        self.end_epoch(result, time.perf_counter() - start)
        return True

    def train_rest_of_epoch(self) -> None:
        start = self.batch

        def after_step(done: int) -> bool:
            self.batch = start + done
            if self.progress.due():
                self.tally.drain()
                self.progress.update(self.batch, self.tally)
            return bool(self.stop)

        try:
            train_epoch(
                self.learner,
                self.train.epoch(self.epoch, start),
                self.schedule,
                first_step=self.step_number(),
                accumulate=self.config.grad_accum,
                tally=self.tally,
                on_bad=self.note_bad,
                after_step=after_step,
            )
        except RuntimeError as error:
            if self.config.nonfinite == "raise" and "gradfast:" in str(error):
                raise UserError(
                    f"epoch {self.epoch + 1}, batch {self.batch + 1}: {str(error).removeprefix('gradfast: ')}; "
                    f"the last sound state is in {self.folder / LAST}"
                ) from error
            raise

    def end_epoch(self, result: Evaluation, seconds: float) -> None:
        row = summary_row(self.epoch + 1, self.tally, result, seconds)
        steps = step_rows(self.epoch + 1, self.epoch * self.steps_per_epoch + 1, self.tally)
        self.epoch += 1
        self.batch = 0
        self.tally = Tally()
        is_best = row["eval_balanced_acc"] > self.best[1]
        if is_best:
            self.best = (self.epoch, row["eval_balanced_acc"])
        self.history.add(row, steps)
        self.save(is_best)
        self.progress.say(describe_epoch(row, self.config.epochs, len(self.late_bad)))
        if time.perf_counter() - self._drawn > REDRAW_SECONDS:
            self.draw()

    def step_number(self) -> int:
        """Optimiser steps of the whole run that are done, as the schedule counts them."""
        return self.epoch * self.steps_per_epoch + self.batch // self.config.grad_accum

    def steps_left(self) -> int:
        return self.config.epochs * self.steps_per_epoch - self.step_number()

    def note_bad(self, bad: Iterable[BadImage]) -> None:
        """Name each file once that turned out unreadable during training, or refuse it."""
        for image in bad:
            if self.config.strict:
                raise UserError(f"--strict: {image.path} cannot be used ({image.reason}); the run is saved up to here")
            if image.path not in self.late_bad:
                self.late_bad.add(image.path)
                self.progress.say(f"skipped {image.path}: {image.reason}")

    # ---------------------------------------------------------------- state

    def save(self, is_best: bool) -> None:
        state = {
            "version": __version__,
            "config": self.config.to_dict(),
            "classes": list(self.data.classes),
            "fingerprint": self.data.fingerprint(),
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scaler": self.learner.scaler.state_dict(),
            "position": {"epoch": self.epoch, "batch": self.batch, "tally": self.tally.state_dict()},
            "best": {"epoch": self.best[0], "balanced_accuracy": self.best[1]},
            "random": random_state(),
        }
        save_checkpoint(self.folder, state, is_best)

    def restore(self, state: dict[str, Any]) -> None:
        self.learner.model.load_state_dict(state["model"])
        restore_optimizer(self.learner.optimizer, state["optimizer"], self.config)
        self.learner.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch = state["position"]["epoch"], state["position"]["batch"]
        self.tally.load_state_dict(state["position"]["tally"])
        self.best = (state["best"]["epoch"], state["best"]["balanced_accuracy"])
        set_random_state(state["random"])

    def interrupted(self) -> int:
        self.save(is_best=False)
        self.draw()
        self.progress.close()
        assert self.stop.signal is not None
        self.progress.say(
            f"stopped by {self.stop.signal.name} in epoch {self.epoch + 1}, after {self.batch} of {len(self.train)} "
            f"batches; saved. Continue with: gradfast train --resume {self.folder}"
        )
        return self.stop.exit_code

    def draw(self) -> None:
        if self.history.summary:
            title = run_name(self.config.model, self.config.data)
            draw_curves(self.folder, self.history.summary, self.config.clip_grad, title)
        self._drawn = time.perf_counter()
