"""Guards of several ranks take one decision."""

from __future__ import annotations

import pytest
import torch
from distributed.alone import assert_same_on_all_ranks, batches, loss_of, model, whole
from distributed.ranks import on_ranks, shared_folder
from distributed.test_fsdp2 import my_part, sharded

import gradfast
from gradfast.guard import Guard, LossWatch, SnapshotRing


@on_ranks(2)
def test_a_loss_that_explodes_on_one_rank_rolls_all_back() -> None:
    module = sharded(model())
    optimizer = gradfast.SGD(module.named_parameters(), lr=0.01, max_norm=0.05)
    guard = Guard(
        optimizer,
        model=module,
        snapshots=SnapshotRing(every=4),
        loss_watch=LossWatch(window=8, patience=3),
        clipped_below=1e-9,
        process_group=torch.distributed.group.WORLD,
    )
    mine = torch.distributed.get_rank()
    for step, batch in enumerate(batches(20)):
        optimizer.zero_grad()
        loss = loss_of(module, my_part(batch))
        loss.backward()
        guard.step(loss.detach() + (1e3 if mine == 1 and 12 <= step < 15 else 0.0))
    (event,) = guard.events
    assert (event.step, event.rule, event.action) == (15, "loss", "rolled back") and event.norm > event.worst[0][1] > 0
    assert event.threshold is not None and event.threshold < 1e3
    assert guard.rollbacks == 1
    for parameter in module.parameters():
        assert_same_on_all_ranks(whole(parameter))


@on_ranks(2)
def test_ranks_resume_with_the_snapshots_that_all_of_them_have() -> None:
    """From the first rank's checkpoint; one rank misses a file, and another's file breaks later."""
    rank = torch.distributed.get_rank()
    folder = shared_folder() / f"rank{rank}"

    def fresh() -> tuple[torch.nn.Module, Guard]:
        module = model()
        optimizer = gradfast.SGD(module.named_parameters(), lr=0.01, max_norm=0.05)
        ring = SnapshotRing(every=3, keep=9, folder=folder)
        group = torch.distributed.group.WORLD
        options = {"loss_watch": False, "clipped_below": 0.0, "max_consecutive_skips": 2, "process_group": group}
        return module, Guard(optimizer, model=module, snapshots=ring, **options)

    def train(module: torch.nn.Module, guard: Guard, steps: int, bad: bool = False) -> None:
        for batch in batches(steps):
            guard.optimizer.zero_grad()
            loss_of(module, batch * float("nan") if bad else batch).backward()
            guard.step()

    module, guard = fresh()
    train(module, guard, 11)
    box = [guard.state_dict()]
    torch.distributed.broadcast_object_list(box)
    if rank == 1:
        guard.snapshots.ring[2].path.unlink()  # step 6
    torch.distributed.barrier()

    module, guard = fresh()
    guard.load_state_dict(box[0])
    assert [snapshot.step for snapshot in guard.snapshots.ring] == [0, 3, 9]
    if rank == 0:
        guard.snapshots.ring[2].path.write_bytes(b"broken")
    train(module, guard, 2, bad=True)
    (event,) = [event for event in guard.events if event.action == "rolled back"]
    assert "rolled back to step 3 " in event.message
    assert [snapshot.step for snapshot in guard.snapshots.ring] == [0]


@on_ranks(2)
def test_the_worst_parameters_are_whole_ones() -> None:
    module = sharded(model())
    optimizer = gradfast.SGD(module.named_parameters(), lr=0.01, max_norm=0.01)
    guard = Guard(optimizer, loss_watch=False)
    loss_of(module, my_part(batches(1)[0])).backward()
    guard.step()
    (event,) = guard.events
    norms = {name: whole(p.grad).norm().item() for name, p in module.named_parameters()}
    name, largest = event.worst[0]
    assert name == max(norms, key=norms.__getitem__) and largest == pytest.approx(norms[name], rel=1e-12)
