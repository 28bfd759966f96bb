"""Runs that are broken on purpose, and what the guard makes of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from guard.runs import Run
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import gradfast
from gradfast import clip
from gradfast.guard import BackOff, Guard, LossWatch, Rewarm, SnapshotRing, TrainingStopped


def train(run: Run, guard: Guard, scheduler=None, loss: bool = True) -> None:
    for batch in guard.batches(run.batches()):
        value = run.backward(batch)
        guard.step(value if loss else None)
        if scheduler is not None:
            scheduler.step()
    guard.drain()


def test_a_clean_run_is_left_alone() -> None:
    """The same bits as without a guard, and no event."""
    plain, guarded = Run(max_norm=1.0), Run(max_norm=1.0)
    for batch in plain.batches():
        plain.backward(batch)
        plain.optimizer.step()
    guard = Guard(guarded.optimizer, model=guarded.model, snapshots=SnapshotRing(every=20))
    train(guarded, guard)
    assert plain.losses == guarded.losses
    assert not guard.events
    assert guard.rollbacks == 0
    assert plain.final_loss() < 0.1


def test_nan_batches_are_skipped_and_named() -> None:
    run = Run({50: "nan", 90: "nan"})
    seen = []
    guard = Guard(run.optimizer, on_event=seen.append)
    train(run, guard)
    assert [event.step for event in guard.events] == [51, 91]
    assert seen == list(guard.events)
    event = seen[0]
    assert (event.rule, event.action, event.threshold) == ("nonfinite", "skipped", None)
    assert math.isnan(event.norm)
    assert event.worst[0][0] in dict(run.model.named_parameters())
    assert not math.isfinite(event.worst[0][1])
    json.dumps(event.to_dict())
    assert run.final_loss() < 0.1


def test_a_spike_is_skipped_by_the_policy_and_told_with_its_numbers() -> None:
    run = Run({100: "spike"}, clip=clip.Chain(clip.SkipSpikes(6, 64), clip.GlobalNorm(1.0)))
    guard = Guard(run.optimizer, clipped_below=0.01)
    train(run, guard)
    (event,) = [event for event in guard.events if event.rule == "SkipSpikes"]
    assert event.step == 101
    assert event.norm > 100 * event.threshold
    largest = max(norm for _, norm in event.worst)
    whole = math.sqrt(sum(norm**2 for _, norm in event.worst))
    assert largest <= event.norm * (1 + 1e-6)
    assert whole == pytest.approx(event.norm, rel=0.2), "the three worst make up nearly all of the norm"
    assert run.final_loss() < 0.1


def test_clipping_hard_is_an_event_with_unscaled_norms() -> None:
    run = Run({100: "spike"}, max_norm=1.0)
    run.optimizer.grad_scale = torch.tensor(8.0)
    guard = Guard(run.optimizer, back_off=None, rewarm=None)
    for batch in run.batches():
        run.backward(batch)
        for parameter in run.model.parameters():
            parameter.grad *= 8.0
        guard.step()
    (event,) = guard.events
    assert (event.step, event.rule, event.threshold, event.action) == (101, "max_norm", 1.0, "clipped")
    assert max(norm for _, norm in event.worst) <= event.norm * (1 + 1e-6)


@pytest.mark.parametrize("kind", [gradfast.GradScaler, torch.amp.GradScaler])
def test_under_a_gradient_scaler(kind) -> None:
    """The scaler halves its scale, the guard takes note, and norms are told unscaled."""
    run = Run({50: "nan", 100: "spike"}, max_norm=1.0)
    scaler = kind("cpu", init_scale=1024.0)
    guard = Guard(run.optimizer, also={"scaler": scaler}, back_off=None, rewarm=None)
    for batch in run.batches():
        inputs, labels = batch
        run.optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(run.model(inputs), labels)
        scaler.scale(loss).backward()
        guard.step(loss, scaler)
        scaler.update()
    assert [(event.step, event.action) for event in guard.events] == [(51, "skipped"), (101, "clipped")]
    assert scaler.get_scale() == 512.0
    spike = guard.events[1]
    assert max(norm for _, norm in spike.worst) <= spike.norm * (1 + 1e-6)
    assert run.final_loss() < 0.1


# ---- learning rates ----------------------------------------


def test_back_off_falls_and_recovers() -> None:
    run = Run({50: "nan", 51: "nan"}, batches=80)
    guard = Guard(run.optimizer, back_off=BackOff(fall=0.5, recovery=10, floor=0.01), rewarm=None)
    factors = []
    for batch in run.batches():
        factors.append(guard.learning_rate.factor)
        run.backward(batch)
        guard.step()
    assert factors[50] == 1
    assert factors[51] == 0.5
    assert factors[52] == 0.25
    assert factors[62] == pytest.approx(0.5)
    assert factors[72] == pytest.approx(1.0)
    assert factors[-1] == 1


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 80),
        lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=81),
        lambda optimizer: LambdaLR(optimizer, lambda step: 0.99**step),
    ],
)
def test_schedulers_see_their_own_rates(make_scheduler, as_tensor: bool) -> None:
    """The rates that a scheduler leaves are the same with a guard that draws back as with no guard."""

    def rates(broken: dict[int, str]) -> list[float]:
        run = Run(broken, batches=80, lr=torch.tensor(0.05) if as_tensor else 0.05)
        scheduler = make_scheduler(run.optimizer)
        guard = Guard(run.optimizer, scheduler=scheduler)
        found = []
        for batch in run.batches():
            run.backward(batch)
            guard.step()
            found.append(float(run.optimizer.param_groups[0]["lr"]))
            scheduler.step()
        assert (guard.learning_rate.factor < 1) == bool(broken)
        return found

    assert rates({20: "nan", 70: "nan"}) == rates({})


def test_the_lowered_rate_is_what_the_step_uses() -> None:
    run = Run()
    guard = Guard(run.optimizer, back_off=BackOff(fall=0.25), rewarm=None)
    guard.learning_rate.step_was(bad=True, skipped=True)
    used = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    run.backward(next(run.batches()))
    guard.step()
    assert used == [0.05 * 0.25]
    assert run.optimizer.param_groups[0]["lr"] == 0.05


def test_rewarm_after_a_burst() -> None:
    run = Run(dict.fromkeys(range(30, 34), "nan"), batches=60)
    guard = Guard(run.optimizer, back_off=None, rewarm=Rewarm(steps=10, burst=3))
    factors = []
    for batch in run.batches():
        factors.append(guard.learning_rate.factor)
        run.backward(batch)
        guard.step()
    assert factors[:33] == [1.0] * 33
    assert factors[34:45] == pytest.approx([*(0.1 * step for step in range(1, 11)), 1.0])


# ---- stopping and rolling back ----------------------------------------


def test_too_many_skips_stop_with_a_report() -> None:
    run = Run(dict.fromkeys(range(100, 200), "nan"))
    guard = Guard(run.optimizer, max_consecutive_skips=7)
    with pytest.raises(TrainingStopped, match=r"step 107: 7 steps in a row were skipped.*no snapshot") as stopped:
        train(run, guard)
    assert "0.weight" in str(stopped.value)
    assert len(stopped.value.events) == 8
    assert stopped.value.events[-1].action == "stopped"


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_poisoned_stretch_is_rolled_back_and_left_behind(on_disk: bool, tmp_path) -> None:
    """Forty wrong batches that no norm betrays: the loss does; the run goes back and ends as a clean one."""
    poisoned = dict.fromkeys(range(120, 160), "poison")
    unguarded = Run(poisoned, batches=175)
    for batch in unguarded.batches():
        unguarded.backward(batch)
        unguarded.optimizer.step()
    run = Run(poisoned, batches=175)
    scheduler = LambdaLR(run.optimizer, lambda step: 1.0)
    ring = SnapshotRing(every=25, keep=2, folder=tmp_path / "ring" if on_disk else None)
    guard = Guard(
        run.optimizer,
        model=run.model,
        scheduler=scheduler,
        snapshots=ring,
        loss_watch=LossWatch(patience=5, window=64),
        skip_batches=40,
    )
    train(run, guard, scheduler)
    rolled = [event for event in guard.events if event.action == "rolled back"]
    assert len(rolled) == guard.rollbacks == 1
    assert rolled[0].rule == "loss"
    assert rolled[0].step == 125
    assert "rolled back to step 100" in rolled[0].message
    assert run.final_loss() < 0.1 < unguarded.final_loss()
    if on_disk:
        assert 1 <= len(list((tmp_path / "ring").iterdir())) <= 2


def test_a_roll_back_brings_everything_back() -> None:
    """Model, momentum, policy and scheduler as they were after the step of the snapshot."""
    run = Run(dict.fromkeys(range(50, 60), "nan"), batches=60, clip=clip.AutoClip(50, 20))
    scheduler = LambdaLR(run.optimizer, lambda step: 0.99**step)
    ring = SnapshotRing(every=20, keep=3)
    guard = Guard(run.optimizer, model=run.model, scheduler=scheduler, snapshots=ring, max_consecutive_skips=10)
    reference = Run(batches=40, clip=clip.AutoClip(50, 20))
    reference_scheduler = LambdaLR(reference.optimizer, lambda step: 0.99**step)
    for batch in reference.batches():
        reference.backward(batch)
        reference.optimizer.step()
        reference_scheduler.step()
    train(run, guard)  # the scheduler stands still: its state must come from the snapshot all the same
    assert guard.rollbacks == 1
    for mine, other in zip(run.model.parameters(), reference.model.parameters(), strict=True):
        assert mine.shape == other.shape
    states = run.optimizer.state_dict()
    assert states["clip_state"]["values"][0] == 20, "the window of AutoClip is full"
    assert scheduler.last_epoch == 0


def test_roll_backs_are_bounded_and_reach_further_back_each_time() -> None:
    run = Run(dict.fromkeys(range(100, 200), "nan"))
    guard = Guard(
        run.optimizer,
        model=run.model,
        snapshots=SnapshotRing(every=30, keep=3),
        max_consecutive_skips=5,
        max_rollbacks=2,
    )
    with pytest.raises(TrainingStopped, match="rolled back 2 times already"):
        train(run, guard)
    rolled = [event.message for event in guard.events if event.action == "rolled back"]
    assert "to step 90 " in rolled[0]
    assert "to step 60 " in rolled[1]


def test_no_snapshot_is_taken_of_a_sick_run() -> None:
    run = Run(dict.fromkeys(range(55, 65), "nan"), batches=90)
    ring = SnapshotRing(every=30, keep=5)
    train(run, Guard(run.optimizer, model=run.model, snapshots=ring))
    assert [snapshot.step for snapshot in ring.ring] == [0, 30]


def test_draining_later_finds_the_same_events() -> None:
    """As on a GPU, where the host looks every so many steps."""
    results = []
    for every in (1, 20, 1000):
        run = Run({50: "nan", 90: "nan", 91: "nan"})
        guard = Guard(run.optimizer, drain_every=every, back_off=None, rewarm=None)
        train(run, guard)
        results.append([(event.step, event.rule, [name for name, _ in event.worst]) for event in guard.events])
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 3


def test_state_survives_a_restart() -> None:
    run = Run({50: "nan"}, batches=52)
    guard = Guard(run.optimizer)
    train(run, guard)
    other = Guard(Run().optimizer)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.learning_rate.factor == guard.learning_rate.factor < 1
    assert other.steps == 52


def test_refusals() -> None:
    run = Run()
    with pytest.raises(TypeError, match="gradfast"):
        Guard(torch.optim.SGD(run.model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="model="):
        Guard(run.optimizer, snapshots=SnapshotRing())
    for make in (
        lambda: BackOff(fall=1.5),
        lambda: Rewarm(burst=0),
        lambda: LossWatch(sigmas=0),
        lambda: SnapshotRing(0),
    ):
        with pytest.raises(ValueError, match="Invalid"):
            make()
