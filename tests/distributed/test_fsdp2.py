"""FSDP2 and HSDP: parameters in uneven, empty and replicated shards, against one process in float64."""

from __future__ import annotations

import logging
from typing import Any

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
    whole,
)
from distributed.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import gradfast


def sharded(module: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def my_part(batch: Tensor, mesh_rank: int | None = None, parts: int | None = None) -> Tensor:
    parts = parts or torch.distributed.get_world_size()
    return batch.chunk(parts)[torch.distributed.get_rank() if mesh_rank is None else mesh_rank]


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
]


@on_ranks(2, 4)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_as_one_process(name: str, options: dict[str, Any]) -> None:
    norms, parameters, _ = train_alone(model(), name, **options)
    module = sharded(model())
    optimizer = getattr(gradfast, name)(module.named_parameters(), max_norm=MAX_NORM, **options)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, my_part(batch)).backward()
        optimizer.step()
        assert_norm(optimizer, norm)
        assert_same_on_all_ranks(optimizer.clip_coef)
    assert_same_parameters(module, parameters)


@on_ranks(2)
@pytest.mark.parametrize("norm_type", [1.0, 3.0, float("inf")])
def test_other_norms(norm_type: float) -> None:
    norms, parameters, _ = train_alone(model(), "SGD", norm_type, lr=0.1)
    module = sharded(model())
    optimizer = gradfast.SGD(module.parameters(), lr=0.1, max_norm=MAX_NORM, norm_type=norm_type)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, my_part(batch)).backward()
        optimizer.step()
        assert_norm(optimizer, norm)
    assert_same_parameters(module, parameters)


@on_ranks(4)
def test_ranks_that_hold_nothing() -> None:
    """All tensors have one row: rank 0 holds all of the model, the others step nothing and decide as it does."""
    made = model((6, 1))
    norms, parameters, _ = train_alone(made, "AdamW", lr=0.01)
    module = sharded(model((6, 1)))
    held = sum(parameter.to_local().numel() for parameter in module.parameters())
    assert held == (7 if torch.distributed.get_rank() == 0 else 0)
    optimizer = gradfast.AdamW(module.parameters(), lr=0.01, max_norm=MAX_NORM)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, my_part(batch)).backward()
        optimizer.step()
        assert_norm(optimizer, norm)
    assert_same_parameters(module, parameters)
    with torch.no_grad():
        module[0].bias.grad.to_local().fill_(torch.nan)  # of rank 0 alone
    optimizer.step()
    assert optimizer.skipped_steps == 1


@on_ranks(4)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_hsdp_counts_replicas_once(norm_type: float) -> None:
    norms, parameters, _ = train_alone(model(), "SGD", norm_type, lr=0.1, momentum=0.9)
    module = sharded(model(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = gradfast.SGD(module.parameters(), lr=0.1, momentum=0.9, max_norm=MAX_NORM, norm_type=norm_type)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, my_part(batch)).backward()
        optimizer.step()
        assert_norm(optimizer, norm)
    assert_same_parameters(module, parameters)


@on_ranks(2, 4)
def test_one_collective_a_step() -> None:
    module = sharded(model())
    optimizer = gradfast.AdamW(module.parameters(), lr=0.01, max_norm=MAX_NORM)
    loss_of(module, my_part(batches()[0])).backward()
    for _ in range(2):  # the first step makes the states
        with CommDebugMode() as counted:
            optimizer.step()
        assert counted.get_total_counts() == 1, counted.get_comm_counts()
        with CommDebugMode() as counted:
            optimizer.grad_norms()
        assert counted.get_total_counts() == 0  # so that one rank may ask alone


@on_ranks(4)
def test_one_collective_for_hsdp() -> None:
    module = sharded(model(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = gradfast.SGD(module.parameters(), lr=0.01, max_norm=MAX_NORM)
    loss_of(module, my_part(batches()[0])).backward()
    with CommDebugMode() as counted:
        optimizer.step()
    assert counted.get_total_counts() == 1, counted.get_comm_counts()


@on_ranks(2)
def test_norms_of_whole_parameters() -> None:
    alone = model()
    loss_of(alone, batches()[0]).backward()
    module = sharded(model())
    optimizer = gradfast.SGD(module.named_parameters(), lr=0.1)
    loss_of(module, my_part(batches()[0])).backward()
    module[2].bias.grad = None
    optimizer.step()
    norms = optimizer.grad_norms()
    assert list(norms) == [name for name, _ in alone.named_parameters() if name != "2.bias"]
    for name, parameter in alone.named_parameters():
        if name in norms:
            torch.testing.assert_close(norms[name], parameter.grad.norm(), rtol=1e-12, atol=0)
            assert_same_on_all_ranks(norms[name])


@on_ranks(4)
@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_on_one_rank_stops_all(mesh_shape: tuple[int, ...], norm_type: float, bad: float) -> None:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    module = sharded(model(), mesh)
    optimizer = gradfast.AdamW(module.named_parameters(), lr=0.01, max_norm=MAX_NORM, norm_type=norm_type)
    logging.getLogger("gradfast").setLevel(logging.ERROR)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, my_part(batches()[step])).backward()
        before = {name: whole(parameter).clone() for name, parameter in module.named_parameters()}
        if step == 1 and torch.distributed.get_rank() == 2:
            module[2].weight.grad.to_local()[0, 0] = bad
        optimizer.step()
        changed = any(not torch.equal(whole(p), before[name]) for name, p in module.named_parameters())
        assert changed == (step != 1)
        assert optimizer.skipped_steps == (step >= 1)
        assert optimizer.nonfinite_parameter == ("2.weight" if step == 1 else None)
        assert_same_on_all_ranks(optimizer.grad_norm)
    assert optimizer.state[module[0].weight]["step"].item() == 2


@on_ranks(2)
def test_raise_on_all_ranks() -> None:
    module = sharded(model())
    optimizer = gradfast.SGD(module.named_parameters(), lr=0.1, max_norm=1.0, nonfinite="raise")
    loss_of(module, my_part(batches()[0])).backward()
    if torch.distributed.get_rank() == 1:
        module[4].weight.grad.to_local()[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"nan.*4\.weight"):
        optimizer.step()


@on_ranks(2)
def test_gradient_accumulation_without_synchronisation() -> None:
    norms, parameters, _ = train_alone(model(), "SGD", lr=0.1, momentum=0.9)
    module = sharded(model())
    optimizer = gradfast.SGD(module.parameters(), lr=0.1, momentum=0.9, max_norm=MAX_NORM)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        halves = my_part(batch).chunk(2)
        for number, half in enumerate(halves):
            module.set_requires_gradient_sync(number == len(halves) - 1)
            (loss_of(module, half) / len(halves)).backward()
        optimizer.step()
        assert_norm(optimizer, norm)
    assert_same_parameters(module, parameters)


@on_ranks(2)
def test_parameter_without_gradient_on_all_ranks() -> None:
    made = model()
    made[0].weight.requires_grad_(False)
    norms, parameters, _ = train_alone(made, "SGD", lr=0.1)
    frozen = model()
    frozen[0].weight.requires_grad_(False)
    module = sharded(frozen)
    optimizer = gradfast.SGD(module.parameters(), lr=0.1, max_norm=MAX_NORM)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, my_part(batch)).backward()
        optimizer.step()
        assert_norm(optimizer, norm)
    assert_same_parameters(module, parameters)


@on_ranks(2)
def test_model_given_other_shards_later() -> None:
    """`to_empty`, `load_state_dict(assign=True)` and the like exchange what a DTensor holds."""
    module = sharded(model())
    optimizer = gradfast.SGD(module.parameters(), lr=0.5, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(module, my_part(batches()[0])).backward()
        before = {name: whole(parameter).clone() for name, parameter in module.named_parameters()}
        optimizer.step()
        for name, parameter in module.named_parameters():
            assert not torch.equal(whole(parameter), before[name]), name
        with torch.no_grad():
            for parameter in module.parameters():
                parameter._local_tensor = parameter._local_tensor.clone()
