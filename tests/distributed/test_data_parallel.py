"""DDP and the ZeRO optimiser: every rank has all gradients, and with ZeRO steps a part of the parameters."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from distributed.alone import (
    MAX_NORM,
    assert_norm,
    assert_same_on_all_ranks,
    assert_same_parameters,
    batches,
    loss_of,
    model,
    train_alone,
)
from distributed.ranks import on_ranks
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import gradfast


def my_part(batch: Tensor) -> Tensor:
    return batch.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


@on_ranks(2)
def test_ddp_needs_no_collective_of_ours() -> None:
    norms, parameters, _ = train_alone(model(), "AdamW", lr=0.01)
    module = DistributedDataParallel(model())
    optimizer = gradfast.AdamW(module.parameters(), lr=0.01, max_norm=MAX_NORM)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, my_part(batch)).backward()
        with CommDebugMode() as counted:
            optimizer.step()
        assert counted.get_total_counts() == 0
        assert_norm(optimizer, norm)
    assert_same_parameters(module.module, parameters)


@on_ranks(2)
def test_ddp_accumulates_without_synchronisation() -> None:
    norms, parameters, _ = train_alone(model(), "SGD", lr=0.1, momentum=0.9)
    module = DistributedDataParallel(model())
    optimizer = gradfast.SGD(module.parameters(), lr=0.1, momentum=0.9, max_norm=MAX_NORM)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        halves = my_part(batch).chunk(2)
        for number, half in enumerate(halves):
            with module.no_sync() if number == 0 else nullcontext():
                (loss_of(module, half) / 2).backward()
        optimizer.step()
        assert_norm(optimizer, norm)
    assert_same_parameters(module.module, parameters)


@on_ranks(2, 4)
@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize(("name", "norm_type"), [("AdamW", 2.0), ("SGD", float("inf"))])
def test_zero(name: str, norm_type: float, bucket_view: bool) -> None:
    norms, parameters, _ = train_alone(model(), name, norm_type, lr=0.05)
    module = DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(),
        optimizer_class=getattr(gradfast, name),
        parameters_as_bucket_view=bucket_view,
        lr=0.05,
        max_norm=MAX_NORM,
        norm_type=norm_type,
    )
    held = sum(len(group["params"]) for group in optimizer.optim.param_groups)
    assert held < len(list(module.parameters()))
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, my_part(batch)).backward()
        optimizer.step()
        assert_norm(optimizer.optim, norm)
    assert_same_parameters(module.module, parameters)
    for parameter in module.parameters():
        assert_same_on_all_ranks(parameter)


@on_ranks(4)
def test_zero_on_a_rank_without_parameters() -> None:
    made = model((6, 1))  # two parameters for four ranks
    norms, parameters, _ = train_alone(made, "AdamW", lr=0.05)
    module = DistributedDataParallel(copy.deepcopy(made))
    optimizer = ZeroRedundancyOptimizer(module.parameters(), optimizer_class=gradfast.AdamW, lr=0.05, max_norm=MAX_NORM)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, my_part(batch)).backward()
        optimizer.step()
        torch.testing.assert_close(optimizer.optim.grad_norm.double(), norm, rtol=1e-7, atol=0)
    assert_same_parameters(module.module, parameters)


@on_ranks(2)
def test_an_optimiser_outside_of_zero_has_no_group() -> None:
    inner = ZeroRedundancyOptimizer(model().parameters(), optimizer_class=gradfast.SGD, lr=0.1)
    assert inner.optim.process_group is torch.distributed.group.WORLD
    assert gradfast.SGD(model().parameters(), lr=0.1).process_group is None


@on_ranks(2)
def test_zero_state_goes_to_torch_and_back() -> None:
    module = DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(module.parameters(), optimizer_class=gradfast.AdamW, lr=0.05, max_norm=MAX_NORM)
    loss_of(module, my_part(batches()[0])).backward()
    optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    if torch.distributed.get_rank() == 0:
        packed = optimizer.state_dict()
        alone = copy.deepcopy(module.module)
        theirs = torch.optim.AdamW(alone.parameters(), lr=0.05)
        theirs.load_state_dict(packed)
        assert len(theirs.state) == len(list(alone.parameters()))
        ours = gradfast.AdamW(alone.parameters(), lr=0.05)
        ours.load_state_dict(theirs.state_dict())
        loss_of(alone, batches()[1]).backward()
        ours.step()
        assert ours.state[alone[0].weight]["step"].item() == 2
