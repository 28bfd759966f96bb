"""Guards of several ranks take one decision."""

from __future__ import annotations

import pytest
import torch
from distributed.alone import assert_same_on_all_ranks, batches, loss_of, model, whole
from distributed.ranks import on_ranks
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
