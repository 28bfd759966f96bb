"""What to do when a step goes wrong: count, draw back, warm up anew, roll back, or stop and say why."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradfast.guard.learning_rate import BackOff, LearningRateGuard, Rewarm
from gradfast.guard.loss_watch import LossWatch
from gradfast.guard.pending import PendingSteps, StepOutcome
from gradfast.guard.snapshots import SnapshotRing, Stateful
from gradfast.monitor.events import Event, SpikeRule, worst

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger("gradfast")
_Batch = TypeVar("_Batch")


def several_ranks() -> bool:
    """Whether this process trains together with others."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class TrainingStopped(RuntimeError):  # noqa: N818  the end of a run, as StopIteration is of a loop
    """The guard has done what it could. The message says what happened last; `events` has all of it."""

    def __init__(self, message: str, events: list[Event]) -> None:
        super().__init__(message)
        self.events = events


class Guard:
    """Stands between a training loop and its optimiser.

        guard = gradfast.guard.Guard(optimizer, model=model, scheduler=scheduler)
        for inputs, labels in guard.batches(loader):
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            guard.step(loss)             # instead of optimizer.step()
            scheduler.step()

    A step is *bad* if it was skipped (a norm not finite, or a clip policy's word), clipped to less than `clipped_below`
    of its norm, or of a norm `spike` times the median of those before. After each bad step the learning rates draw back
    (`back_off`); after a burst of skipped steps, and after a roll-back, they warm up anew (`rewarm`). When
    `max_consecutive_skips` steps in a row were skipped, or the loss has left its course (`loss_watch`), everything goes
    back to the last snapshot and training goes on with the batches that follow, so that those in between are left out,
    and `skip_batches` more; at most `max_rollbacks` times, and without snapshots not at all: then `TrainingStopped` is
    raised.

    On a GPU nothing waits in a step: what happened is fetched every `drain_every` steps, and acted upon then.

    Args:
        optimizer: one of gradfast's.
        model, scheduler: part of every snapshot; neither is needed without snapshots.
        also: further objects with `state_dict` and `load_state_dict` for the snapshots, by name, such as a GradScaler.
        back_off: `BackOff()` by default; None leaves learning rates alone.
        rewarm: `Rewarm()` by default; None for none.
        snapshots: such as `SnapshotRing(every=100)`; None: no roll-back. With a folder, a run that is resumed by
            `load_state_dict` goes on with the snapshots that are there.
        loss_watch: looks at the losses given to `step`; True for `LossWatch()`, False for none. Without snapshots a
            divergence is an event and no more.
        max_consecutive_skips: so many skipped steps in a row are one too many.
        max_rollbacks: how often the run may go back before it is stopped.
        skip_batches: batches that `batches()` leaves out after a roll-back.
        clipped_below: clip coefficients below it make an event and a bad step. Lower it for a policy that clips most
            steps.
        spike: how many times the median of the 128 norms before a norm must be to be bad; None: as often as it likes.
        drain_every: steps between two looks at the device; 1 on a CPU and 20 elsewhere by default.
        on_event: called with every `gradfast.monitor.events.Event`; all of them are logged and kept in `events`.
        keep_events: how many events are kept.
        process_group: ranks that train one model on batches of their own (DDP, FSDP), such as
            `torch.distributed.group.WORLD`. Their losses are averaged before they are looked at, by one small
            all-reduce a look, so that all ranks decide alike; the gradients' norm is the same on all anyway. Each takes
            snapshots of its own: with a folder, give each rank another.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        model: nn.Module | None = None,
        scheduler: Stateful | None = None,
        also: dict[str, Stateful] | None = None,
        back_off: BackOff | None = BackOff(),  # noqa: B008  frozen
        rewarm: Rewarm | None = Rewarm(),  # noqa: B008
        snapshots: SnapshotRing | None = None,
        loss_watch: LossWatch | bool = True,
        max_consecutive_skips: int = 20,
        max_rollbacks: int = 3,
        skip_batches: int = 0,
        clipped_below: float = 0.1,
        spike: float | None = None,
        drain_every: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        keep_events: int = 1000,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not hasattr(optimizer, "grad_norms"):
            raise TypeError(
                f"Guard needs an optimiser of gradfast, got {type(optimizer).__name__}: gradfast.from_torch"
            )
        if snapshots is not None and model is None:
            raise ValueError("Guard needs model= to take snapshots of it")
        if max_consecutive_skips < 1 or (drain_every is not None and drain_every < 1):
            raise ValueError(f"{max_consecutive_skips=} and {drain_every=} must be at least 1")
        self.optimizer: Any = optimizer
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, **(also or {})}
        self.parts = {name: part for name, part in self.parts.items() if part is not None}
        self.learning_rate = LearningRateGuard(optimizer, back_off, rewarm)
        self.snapshots = snapshots
        self.loss_watch = loss_watch if isinstance(loss_watch, LossWatch) else LossWatch() if loss_watch else None
        self.max_consecutive_skips, self.max_rollbacks = max_consecutive_skips, max_rollbacks
        self.skip_batches, self.clipped_below = skip_batches, clipped_below
        self.spikes = None if spike is None else SpikeRule(spike)
        self.drain_every = drain_every
        self.on_event = on_event
        self.events: deque[Event] = deque(maxlen=keep_events)
        self.steps = self.rollbacks = self.consecutive_skips = 0
        self.process_group = process_group
        self._pending = PendingSteps(process_group)
        if process_group is None and self.loss_watch is not None and several_ranks():
            _log.warning("Guard: each rank looks at a loss of its own; give process_group= for all to decide alike")
        self._drop_batches = 0

    # ---------------------------------------------------------------- in the loop

    def step(self, loss: Tensor | float | None = None, scaler: Any = None) -> None:
        """Do the optimiser's step under guard.

        Args:
            loss: of this step, for the loss watch; on a GPU it stays there.
            scaler: a GradScaler, whose `step` is called instead; `scaler.update()` stays the caller's.

        Raises:
            TrainingStopped: too many skipped steps or too long a divergence, and no roll-back is left.
        """
        if self.snapshots is not None and (self.steps % self.snapshots.every == 0 or not len(self.snapshots)):
            self._take_snapshot()
        with self.learning_rate.lowered():
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
        self.steps += 1
        self._pending.add(self.steps, self.optimizer, loss)
        if len(self._pending) >= (self.drain_every or self._usual_interval()):
            self.drain()

    def drain(self) -> None:
        """Look at all steps since the last look, and act. Waits for the device; for the end of an epoch or of a run."""
        for outcome in self._pending.fetch():
            if self._act_upon(outcome):
                break  # rolled back: what the steps after it did is undone

    def batches(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """The loader's batches, less those that are to be left out after a roll-back."""
        for batch in loader:
            if self._drop_batches > 0:
                self._drop_batches -= 1
                continue
            yield batch

    # ---------------------------------------------------------------- what happened

    def _usual_interval(self) -> int:
        return 1 if self.optimizer.param_groups[0]["params"][0].device.type == "cpu" else 20

    def _act_upon(self, outcome: StepOutcome) -> bool:
        """Take note of one step; True if the run was rolled back."""
        report = outcome.report
        skipped = bool(report.skipped)
        spike = None if self.spikes is None or skipped else self.spikes.threshold(report.norm)
        bad = skipped or report.coefficient < self.clipped_below or spike is not None
        if bad or not math.isfinite(report.norm):
            self._record(self._event_of(outcome, spike))
        self.learning_rate.step_was(bad, skipped)
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        if self.consecutive_skips >= self.max_consecutive_skips:
            return self._roll_back(outcome, "skips", f"{self.consecutive_skips} steps in a row were skipped")
        if skipped or self.loss_watch is None or outcome.loss is None:
            return False  # what a skipped step's loss was does not tell where the run is
        if self.loss_watch.diverged(outcome.loss):
            why = (
                f"the loss is {outcome.loss:.4g} and was above {self.loss_watch.threshold:.4g} for "
                f"{self.loss_watch.high_in_a_row} steps in a row"
            )
            if self.snapshots is not None:
                return self._roll_back(outcome, "loss", why)
            if self.loss_watch.high_in_a_row == self.loss_watch.patience:
                message = f"step {outcome.step}: {why}"
                self._record(self._consequence(outcome, "loss", "applied", message))
        return False

    def _event_of(self, outcome: StepOutcome, spike: float | None = None) -> Event:
        report = outcome.report
        rule, threshold = "nonfinite", None
        if spike is not None:
            rule, threshold = "spike", spike
        elif math.isfinite(report.norm):
            clip = self.optimizer.clip
            rule = type(clip.decider(report.decider)).__name__ if report.decider >= 0 else "max_norm"
            threshold = report.limit
        action = "skipped" if report.skipped else "clipped" if report.coefficient < 1 else "applied"
        names, norms = self._norms_of(outcome)
        found = worst(names, norms)
        against = "" if threshold is None else f", against {threshold:.4g}"
        leading = ", ".join(f"{name} {norm:.4g}" for name, norm in found)
        message = f"step {outcome.step} {action} by {rule}: gradient norm {report.norm:.4g}{against}; worst: {leading}"
        return Event(outcome.step, rule, report.norm, threshold, action, found, message)

    def _consequence(self, outcome: StepOutcome, rule: str, action: str, message: str) -> Event:
        """The event of what follows from several steps; the norm and the worst parameters are the last one's."""
        threshold = float(self.max_consecutive_skips) if rule == "skips" else None
        if rule == "loss" and self.loss_watch is not None:
            threshold = self.loss_watch.threshold
        found = worst(*self._norms_of(outcome))
        return Event(outcome.step, rule, outcome.report.norm, threshold, action, found, message)

    def _norms_of(self, outcome: StepOutcome) -> tuple[list[str], list[float]]:
        """Each parameter's gradient norm in that step, from the sums of powers that the norm was made of."""
        p = self.optimizer.norm_type
        root = 1.0 if math.isinf(p) else 1.0 / p
        whole = outcome.report.sum**root if outcome.report.sum > 0 else math.nan
        unscale = outcome.report.norm / whole if 0 < whole < math.inf else 1.0  # the loss scale's inverse
        names, norms = [], []
        for indices, sums in outcome.sums:
            for index, value in zip(indices, sums, strict=True):
                names.append(self.optimizer._engine_names[index])
                norms.append(value**root * unscale if value == value else value)
        return names, norms

    def _record(self, event: Event) -> None:
        self.events.append(event)
        _log.warning("%s", event.message)
        if self.on_event is not None:
            self.on_event(event)

    # ---------------------------------------------------------------- snapshots

    def _take_snapshot(self) -> None:
        self.drain()
        healthy = self.consecutive_skips == 0 and (self.loss_watch is None or self.loss_watch.high_in_a_row == 0)
        if self.snapshots is None or not healthy:
            return
        if not len(self.snapshots) and self._shares_snapshots():
            # The first rank's checkpoint may be the one that all of them will be resumed from.
            names = [self.snapshots.run]
            torch.distributed.broadcast_object_list(names, group=self.process_group, group_src=0)
            self.snapshots.run = names[0]
        self.snapshots.take(self.steps, self.parts)

    def _shares_snapshots(self) -> bool:
        """Whether several ranks have files of their own, of which each may miss another."""
        return self.process_group is not None and self.snapshots is not None and self.snapshots.folder is not None

    def _agree_on_snapshots(self) -> bool:
        """Keep the snapshots that all ranks have, so that all go back to the same; True if each had the same ones."""
        if not self._shares_snapshots():
            return True
        assert self.snapshots is not None and self.process_group is not None
        steps: list[Any] = [None] * self.process_group.size()
        torch.distributed.all_gather_object(
            steps, [snapshot.step for snapshot in self.snapshots.ring], group=self.process_group
        )
        self.snapshots.keep_only(set(steps[0]).intersection(*steps[1:]))
        return all(each == steps[0] for each in steps)

    def _roll_back(self, outcome: StepOutcome, rule: str, why: str) -> bool:
        if self.snapshots is None:
            self._stop(outcome, rule, why, "there is no snapshot to go back to: give Guard snapshots=SnapshotRing()")
        if self.rollbacks >= self.max_rollbacks:
            self._stop(outcome, rule, why, f"the run was rolled back {self.rollbacks} times already")
        assert self.snapshots is not None
        if self._shares_snapshots():
            self.snapshots.newest()
            while not self._agree_on_snapshots():
                self.snapshots.newest()
        try:
            step = self.snapshots.restore(self.parts)
        except LookupError as error:
            self._stop(outcome, rule, why, str(error))
        self.rollbacks += 1
        self.consecutive_skips = 0
        self._drop_batches = self.skip_batches
        self.learning_rate.skipped_in_a_row = 0
        self.learning_rate.warm_up()
        if self.loss_watch is not None:
            self.loss_watch.reset()
        message = f"step {outcome.step}: {why}; rolled back to step {step} ({self.rollbacks} of {self.max_rollbacks})"
        self._record(self._consequence(outcome, rule, "rolled back", message))
        return True

    def _stop(self, outcome: StepOutcome, rule: str, why: str, no_help: str) -> None:
        message = f"training stopped at step {outcome.step}: {why}, and {no_help}"
        self._record(self._consequence(outcome, rule, "stopped", message))
        last = "".join(f"\n  {event.message}" for event in list(self.events)[-6:-1])
        raise TrainingStopped(message + (f". Before that:{last}" if last else ""), list(self.events))

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The guard's own state. Snapshots are not in it, but what those on disk are called."""
        self.drain()
        return {
            "run": None if self.snapshots is None or self.snapshots.folder is None else self.snapshots.run,
            "steps": self.steps,
            "rollbacks": self.rollbacks,
            "consecutive_skips": self.consecutive_skips,
            "learning_rate": self.learning_rate.state_dict(),
            "losses": [] if self.loss_watch is None else list(self.loss_watch.recent),
            "high_in_a_row": 0 if self.loss_watch is None else self.loss_watch.high_in_a_row,
            "norms": [] if self.spikes is None else list(self.spikes.recent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, and the snapshots on disk that were taken up to there."""
        self.steps, self.rollbacks = state["steps"], state["rollbacks"]
        self.consecutive_skips = state["consecutive_skips"]
        self.learning_rate.load_state_dict(state["learning_rate"])
        if self.loss_watch is not None:
            self.loss_watch.recent.clear()
            self.loss_watch.recent.extend(state["losses"])
            self.loss_watch.high_in_a_row = state.get("high_in_a_row", 0)
        if self.spikes is not None:
            self.spikes.recent.clear()
            self.spikes.recent.extend(state.get("norms", []))
        if self.snapshots is not None:
            self.snapshots.adopt(state.get("run"), self.steps, self.parts.keys())
            self._agree_on_snapshots()
