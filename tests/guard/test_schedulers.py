"""Back-off, re-warm and roll-back beside every scheduler of torch: none of them ever sees a lowered rate."""

from __future__ import annotations

import pytest
import torch
from guard.runs import Run
from optim.test_schedulers import SCHEDULERS, make

from gradfast.guard import BackOff, Guard, Rewarm, SnapshotRing


def advance(scheduler, name: str) -> None:
    scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()


def rates_of(name: str, broken: dict[int, str], as_tensor: bool) -> tuple[list[float], list[float], list[float]]:
    """The rates that the scheduler left before each step, those that the steps used, and the guard's factors."""
    run = Run(broken, batches=11, lr=torch.tensor(0.05, dtype=torch.float64) if as_tensor else 0.05)
    scheduler = make(name, run.optimizer)
    guard = Guard(
        run.optimizer, scheduler=scheduler, back_off=BackOff(0.5, recovery=2), rewarm=Rewarm(steps=3, burst=2)
    )
    left, used, factors = [], [], []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(float(optimizer.param_groups[0]["lr"])))
    for batch in run.batches():
        run.backward(batch)
        left.append(float(run.optimizer.param_groups[0]["lr"]))
        factors.append(guard.learning_rate.factor)
        guard.step()
        advance(scheduler, name)
    return left, used, factors


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_falls_recovers_and_leaves_the_schedule_alone(name: str, as_tensor: bool) -> None:
    undisturbed, _, _ = rates_of(name, {}, as_tensor)
    left, used, factors = rates_of(name, {3: "nan", 4: "nan"}, as_tensor)
    assert left == undisturbed
    assert used == pytest.approx([rate * factor for rate, factor in zip(left, factors, strict=True)], rel=1e-6)
    assert min(factors) < 0.1 and factors[:4] == [1.0] * 4 and factors[-1] == 1.0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_roll_back_takes_the_schedule_with_it(name: str) -> None:
    """After it scheduler and rates are where they were when the snapshot was taken."""
    run = Run(dict.fromkeys(range(4, 7), "nan"), batches=7)
    scheduler = make(name, run.optimizer)
    ring = SnapshotRing(every=4)
    guard = Guard(run.optimizer, model=run.model, scheduler=scheduler, snapshots=ring, max_consecutive_skips=3)
    rates: dict[int, float] = {}
    for batch in run.batches():
        run.backward(batch)
        rates[guard.steps] = float(run.optimizer.param_groups[0]["lr"])
        guard.step()
        if not guard.rollbacks:
            advance(scheduler, name)
    assert guard.rollbacks == 1 and "rolled back to step 4 " in guard.events[-1].message
    assert float(run.optimizer.param_groups[0]["lr"]) == rates[4]
    assert scheduler.last_epoch == 4 if hasattr(scheduler, "last_epoch") else True
    reference = Run(batches=6)
    other = make(name, reference.optimizer)
    for batch in reference.batches():
        reference.backward(batch)
        reference.optimizer.step()
        advance(other, name)
    for _ in range(2):
        run.backward(next(reference.batches()))
        guard.step()
        advance(scheduler, name)
    assert float(run.optimizer.param_groups[0]["lr"]) == float(reference.optimizer.param_groups[0]["lr"])
