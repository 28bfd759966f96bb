"""A training run from its first step, or the one it was stopped at, to its results."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradfast.errors import UserError
from gradfast.extras import first_line
from gradfast.files import atomic_write, remove_temporaries
from gradfast.guard import TrainingStopped
from gradfast.monitor import JSONL, Monitor
from gradfast.monitor.events import Event
from gradfast.train.config import TrainConfig
from gradfast.train.data.batches import is_dead_worker
from gradfast.train.data.images import BadImage
from gradfast.train.loop import evaluate, train_epoch
from gradfast.train.machine.drawing import random_states, set_random_states
from gradfast.train.results.checkpoint import LAST, save_checkpoint
from gradfast.train.results.claim import Claims
from gradfast.train.results.curves import draw_curves
from gradfast.train.results.history import History, step_rows, summary_columns, summary_row
from gradfast.train.results.logs import RunLog
from gradfast.train.results.output import check_output, make_output, run_name
from gradfast.train.results.progress import Progress
from gradfast.train.results.report import advise_loading, describe_epoch, describe_result, describe_setup
from gradfast.train.results.resume import Resumed
from gradfast.train.results.tally import Tally
from gradfast.train.schedule import build_schedule, count_drops
from gradfast.train.settings import to_yaml
from gradfast.train.spikes import EventRecord, describe_stop
from gradfast.train.step import Learner, NonFiniteLossError
from gradfast.train.tasks.task import Evaluation, Task, TaskData
from gradfast.version import __version__

STEPS_TO_JUDGE = 10  # of an epoch, before its loader is called slow
REDRAW_SECONDS = 30.0  # the curves are drawn anew after an epoch if they are older than this, and at the end


class Trainer:
    """A run under way.

    Attributes:
        epoch: epochs that are complete.
        batch: batches of the next epoch that are done; not 0 only after an interruption.
        best: number (from 1) and score of the best epoch so far, as the task scores; the first of equals.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        data: TaskData,
        learner: Learner,
        progress: Progress,
        claims: Claims,
    ) -> None:
        self.task = task
        self.config = config
        self.data = data
        self.learner = learner
        self.progress = progress
        self.claims = claims
        self.world = learner.spread.world
        self.train, self.evaluation = data.loaders(config, pin_memory=learner.device.type == "cuda")
        self.train.split(self.world, guests=int(learner.objective.mixes))
        self.evaluation.split(self.world)
        self.train.report = self.evaluation.report = progress.say
        self.steps_per_epoch = -(-len(self.train) // config.grad_accum)
        self.schedule = build_schedule(config, self.steps_per_epoch)
        self.epoch = 0
        self.batch = 0
        self.best = (0, -1.0)
        self.tally = self.new_tally()
        self.logged = 0  # steps of the tally that the log has
        self.log = RunLog()
        self.losses: list[float] = []  # on the held-out images, an epoch each
        self.stop = self.world.stop
        self.late_bad: dict[str, BadImage] = {}  # files found unreadable while training, by path
        self.advised = False  # of a loader that is too slow, once
        self._drawn = time.perf_counter()
        self._saved = (0, 0)  # epochs and batches of the last checkpoint

    # ---------------------------------------------------------------- from start to end

    def go(self, output: Path | None, resumed: Resumed | None) -> int:
        if resumed:
            self.restore(resumed.state)
        taken = self.world.from_main(self.take_folder(output, resumed) if self.world.is_main else None)
        assert taken is not None
        self.folder, made = taken
        self.world.saved = lambda: f"{self.saved}; gradfast train --resume {self.folder} goes on from there"
        self.events = EventRecord(self.folder, self.progress.say)
        self.history = History(self.folder, summary_columns(self.task), self.learner.objective.components)
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
            with self.stop, self.watch():
                while self.epoch < self.config.epochs:
                    if not self.run_epoch():
                        return self.interrupted()
        except TrainingStopped as error:
            raise UserError(
                f"epoch {self.epoch + 1}: {describe_stop(error)}; {self.events.path} has what led to it. Start again "
                f"with a lower --lr or a longer --warmup-epochs ({self.saved})"
            ) from error
        except RuntimeError as error:
            if not is_dead_worker(error):
                raise
            raise UserError(
                f"epoch {self.epoch + 1}: a process that reads images died ({first_line(error)}); {self.saved}, and "
                f"gradfast train --resume {self.folder} --workers {max(0, self.data.workers - 1)} goes on from there"
            ) from error
        finally:
            with contextlib.suppress(Exception):  # what led here matters more than a log
                self.log_steps()
            self.log.close()
            self.events.close()
            self.train.close()
            self.evaluation.close()
        self.draw()
        self.progress.close()
        seconds = time.perf_counter() - start
        if self.world.is_main:
            done = (self.task, self.history.summary, self.best, self.data, self.folder, seconds)
            self.progress.say(describe_result(*done))
        return 0

    def take_folder(self, output: Path | None, resumed: Resumed | None) -> tuple[Path, bool]:
        """(the run folder, claimed; whether it was made now)"""
        folder, made = make_output(output, run_name(self.config.model, self.config.data))
        self.claims.take(folder)
        if resumed is None or folder != resumed.folder:
            check_output(folder)  # again: another run may have been quicker
        return folder, made

    def start_folder(self, resumed: Resumed | None) -> None:
        """Put into the run folder what can be known before the first step; a full disk shows itself here."""
        if self.world.is_main:
            self.write_settings(resumed)
        if resumed is None or self.folder != resumed.folder:
            self.save(is_best=False)

    def write_settings(self, resumed: Resumed | None) -> None:
        remove_temporaries(self.folder)  # of a run that was killed while it wrote
        self.history.start(resumed.folder if resumed else None, self.epoch)
        if self.learner.guard is not None:
            self.learner.guard.on_event = self.note_event
            self.events.start(resumed.folder if resumed else None, self.learner.guard.steps)
        heading = f"gradfast {__version__}, torch {torch.__version__}, Python {platform.python_version()}\n"
        heading += "This run again: gradfast train -c config.yaml"
        with atomic_write(self.folder / "config.yaml") as file:
            file.write(to_yaml(self.config, heading).encode())
        if self.data.bad:
            with atomic_write(self.folder / "skipped_images.txt") as file:
                file.write("".join(f"{bad.path}: {bad.reason}\n" for bad in self.data.bad).encode())
        source = resumed.folder if resumed else None
        self.log.open(self.folder, source, self.step_number(), self.epoch, self.config)
        if resumed is not None and self.folder != resumed.folder:
            resumed.copy_best(self.folder)

    def remove_folder(self) -> None:
        if not self.world.is_main:
            return
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def watch(self) -> contextlib.AbstractContextManager[object]:
        """Watch the layers for as long as this lasts, if that was asked for."""
        every = self.config.monitor_every
        if not every:
            return contextlib.nullcontext()
        sinks = [JSONL(self.folder)] if self.world.is_main else []
        return Monitor(self.learner.optimizer, self.learner.model, every, sinks, start_step=self.step_number())

    # ---------------------------------------------------------------- one epoch

    def run_epoch(self) -> bool:
        """Train, evaluate, record and save one epoch; False where a signal asked to stop."""
        number = self.epoch + 1
        start = time.perf_counter() - self.tally.seconds
        self.progress.begin_epoch(f"epoch {number}/{self.config.epochs}", len(self.train), self.batch)
        self.train_rest_of_epoch()
        if self.stop:
            return False
        self.refuse_to_go_on_for_nothing()
        self.progress.evaluating()
        result = evaluate(self.learner, self.evaluation.epoch(0), self.note_bad, self.world.stopped)
        if result is None:
            return False
        self.end_epoch(result, time.perf_counter() - start)
        return True

    def refuse_to_go_on_for_nothing(self) -> None:
        """Raises:
        UserError: the epoch had no step, or none that changed the model.
        """
        number = self.epoch + 1
        if len(self.tally) == 0:
            raise UserError(
                f"epoch {number} had no step, for want of images that can be read: is {self.config.data} still there? "
                f"{self.saved}, and gradfast train --resume {self.folder} goes on from there"
            )
        if len(self.tally) == self.tally.skipped_steps and self.config.on_spike != "rollback":
            raise UserError(
                f"every step of epoch {number} was skipped for a NaN or infinite gradient{self.blame()}: training has "
                f"diverged; start again with a lower --lr or a longer --warmup-epochs ({self.saved})"
            )

    def train_rest_of_epoch(self) -> None:
        start = self.batch
        self.schedule = replace(self.schedule, drops=count_drops(self.losses, self.config.patience))
        skipped_before = self.learner.optimizer.skipped_steps - self.tally.skipped_steps

        def account() -> None:
            if self.learner.guard is not None:
                self.learner.guard.drain()
            self.log_steps()
            self.tally.skipped_steps = self.learner.optimizer.skipped_steps - skipped_before

        def after_step(done: int) -> bool:
            self.batch = start + done
            if self.progress.due():
                self.log_steps()
                self.progress.update(self.batch, self.tally)
            if self.config.save_every_steps and self.step_number() % self.config.save_every_steps == 0:
                account()
                self.save(is_best=False)
            return bool(self.stop)

        try:
            train_epoch(
                self.learner,
                self.train.epoch(self.epoch, start),
                self.schedule,
                epoch=self.epoch,
                first_step=self.step_number(),
                accumulate=self.config.grad_accum,
                tally=self.tally,
                on_bad=self.note_bad,
                after_step=after_step,
            )
        except NonFiniteLossError as error:
            raise UserError(f"epoch {self.epoch + 1}, batch {self.batch + 1}: {error}; {self.saved}") from error
        except RuntimeError as error:
            if self.config.nonfinite == "raise" and "gradfast:" in str(error):
                raise UserError(
                    f"epoch {self.epoch + 1}, batch {self.batch + 1}: {str(error).removeprefix('gradfast: ')}; "
                    f"{self.saved}"
                ) from error
            raise
        account()

    def end_epoch(self, result: Evaluation, seconds: float) -> None:
        row = summary_row(self.epoch + 1, self.tally, result, seconds)
        blame = self.blame()
        steps = step_rows(self.epoch + 1, self.epoch * self.steps_per_epoch + 1, self.tally)
        self.losses.append(result.loss)
        self.log.epoch(steps[-1]["step"] if steps else self.step_number(), row)
        self.epoch += 1
        self.batch = 0
        self.tally, self.logged = self.new_tally(), 0
        score = row[self.task.score]
        is_best = score > self.best[1]
        if is_best:
            self.best = (self.epoch, score)
            if result.illustrate is not None and self.world.is_main:
                result.illustrate(self.folder)
        if self.world.is_main:
            self.history.add(row, steps)
        self.save(is_best)
        self.gather_bad()
        self.progress.say(describe_epoch(self.task, row, self.config.epochs, len(self.late_bad), blame))
        if not self.advised and len(steps) >= STEPS_TO_JUDGE:
            advice = advise_loading(row, self.config, self.data.workers)
            self.advised = advice is not None
            if advice is not None:
                self.progress.say(advice)
        if time.perf_counter() - self._drawn > REDRAW_SECONDS:
            self.draw()

    def log_steps(self) -> None:
        """Fetch the numbers of the steps so far, and log those that were not logged yet."""
        self.tally.drain()
        if self.log.sinks:
            first = self.epoch * self.steps_per_epoch + 1
            self.log.steps(step_rows(self.epoch + 1, first, self.tally, self.logged))
        self.logged = len(self.tally)

    def note_event(self, event: Event) -> None:
        self.events.note(event)
        self.log.event(event)

    def new_tally(self) -> Tally:
        return Tally(self.learner.objective.components)

    def blame(self) -> str:
        """Which losses of this epoch were NaN or infinite, in brackets."""
        names = self.tally.nonfinite_losses()
        return f" ({', '.join(names)})" if names else ""

    def step_number(self) -> int:
        """Optimiser steps of the whole run that are done, as the schedule counts them."""
        return self.epoch * self.steps_per_epoch + -(-self.batch // self.config.grad_accum)

    def steps_left(self) -> int:
        return self.config.epochs * self.steps_per_epoch - self.step_number()

    def note_bad(self, bad: Iterable[BadImage]) -> None:
        """Name each file once that turned out unreadable during training, or refuse it."""
        for image in bad:
            if self.config.strict:
                raise UserError(f"--strict: {image.path} cannot be used ({image.reason}); the run is saved up to here")
            if image.path not in self.late_bad:
                self.late_bad[image.path] = image
                self.progress.say(f"skipped {image.path}: {image.reason}")

    def gather_bad(self) -> None:
        """Name the files that other processes could not read."""
        for found in self.world.gather(list(self.late_bad.values())):
            self.note_bad(found)

    # ---------------------------------------------------------------- state

    def save(self, is_best: bool) -> None:
        state = {
            "version": __version__,
            "config": self.config.to_dict(),
            "classes": list(self.data.classes),
            "fingerprint": self.data.fingerprint(),
            **self.learner.state_dict(),
            "position": {
                "epoch": self.epoch,
                "batch": self.batch,
                "tally": self.tally.state_dict(),
                "losses": self.losses,
            },
            "best": {"epoch": self.best[0], self.task.score_key: self.best[1]},
            "random": random_states(self.world, self.learner.device),
        }
        if self.world.is_main:
            save_checkpoint(self.folder, state, is_best, self.step_number(), self.config.keep)
        self._saved = (self.epoch, self.batch)

    @property
    def saved(self) -> str:
        """Where the last checkpoint is, and of when."""
        epochs, batches = self._saved
        within = f" and {batches} batches" if batches else ""
        return f"the last checkpoint is {self.folder / LAST}, after {epochs} epochs{within}"

    def restore(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.epoch, self.batch = state["position"]["epoch"], state["position"]["batch"]
        self.tally.load_state_dict(state["position"]["tally"])
        self.logged = len(self.tally)
        self.losses = list(state["position"].get("losses", []))
        self.best = (state["best"]["epoch"], state["best"][self.task.score_key])
        self._saved = (self.epoch, self.batch)
        set_random_states(state["random"], self.world, self.learner.device, self.config.seed, self.epoch, self.batch)

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
        if self.history.summary and self.world.is_main:
            title = run_name(self.config.model, self.config.data)
            draw_curves(self.folder, self.history.summary, self.task.panels, self.config.clip_grad, title)
        self._drawn = time.perf_counter()
