"""Learning rates against values worked out by hand, and torch's schedulers where they define the same curve."""

from __future__ import annotations

import pytest
import torch

from gradfast.train.config import TrainConfig
from gradfast.train.schedule import Schedule, build_schedule, count_drops


def rates(schedule: Schedule) -> list[float]:
    return [schedule.rate(step) for step in range(schedule.steps)]


def test_constant() -> None:
    assert rates(Schedule("constant", 0.5, 3)) == [0.5, 0.5, 0.5]


def test_linear_reaches_zero_one_step_after_the_last() -> None:
    assert rates(Schedule("linear", 1.0, 4)) == [1.0, 0.75, 0.5, 0.25]


def test_step_drops_every_decay_steps() -> None:
    assert rates(Schedule("step", 1.0, 6, decay_steps=2, decay_rate=0.5)) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_warmup_rises_linearly_to_the_peak() -> None:
    assert rates(Schedule("constant", 1.0, 5, warmup=4)) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_by_hand() -> None:
    # cos 0, cos 45, cos 90, cos 135 degrees
    root = 0.5**0.5
    assert rates(Schedule("cosine", 2.0, 4)) == pytest.approx([2.0, 1 + root, 1.0, 1 - root], rel=1e-12)


def test_multistep_drops_after_each_milestone() -> None:
    schedule = Schedule("multistep", 1.0, 6, decay_rate=0.5, milestones=(2, 3))
    assert rates(schedule) == [1.0, 1.0, 0.5, 0.25, 0.25, 0.25]


def test_poly_by_hand() -> None:
    assert rates(Schedule("poly", 1.0, 4, power=2.0)) == [1.0, 0.5625, 0.25, 0.0625]


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_torchs(patience: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience)
    losses = [1.0, 0.9, 0.95, 0.9, 0.89999, 0.8, 0.81, 0.82, 0.83, 0.84, 0.85, 0.7, 0.7, 0.7, 0.7]
    for number, loss in enumerate(losses, start=1):
        torchs.step(loss)
        drops = count_drops(losses[:number], patience)
        assert Schedule("plateau", 1.0, 20, decay_rate=0.5, drops=drops).rate(number) == optimizer.param_groups[0]["lr"]
    assert drops > 0


@pytest.mark.parametrize("steps", [10, 55, 100])
def test_one_cycle_is_torchs(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    # torch's rise ends at step pct_start * steps - 1; ours at warmup: the same curve where the two agree.
    rise = round(0.3 * steps)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=steps, pct_start=(rise + 1) / steps, cycle_momentum=False
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step() if len(expected) < steps else None
    assert rates(Schedule("one-cycle", 0.1, steps)) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_of_a_single_step_is_at_the_peak() -> None:
    assert rates(Schedule("one-cycle", 0.1, 1)) == [0.1]


def test_warmup_sets_the_length_of_the_cycles_rise() -> None:
    found = rates(Schedule("one-cycle", 1.0, 20, warmup=5))
    assert found.index(max(found)) == 5 and max(found) == 1.0


def test_steps_come_from_epochs() -> None:
    schedule = build_schedule(TrainConfig(epochs=3, sched="step", warmup_epochs=0.5, decay_epochs=2).resolve(), 10)
    assert (schedule.steps, schedule.warmup, schedule.decay_steps) == (30, 5, 20)
    assert build_schedule(TrainConfig(decay_milestones="2,5").resolve(), 10).milestones == (20, 50)


def test_apply_sets_every_group() -> None:
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=9.0)
    assert Schedule("linear", 1.0, 4).apply(optimizer, 1) == 0.75
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 0.75]
