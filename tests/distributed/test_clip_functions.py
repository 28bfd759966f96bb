"""The clip functions on DTensors: plain tensors out, the whole model's norm, one collective."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from distributed.alone import MAX_NORM, assert_same_on_all_ranks, batches, loss_of, model, whole
from distributed.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import gradfast


def sharded_with_gradients() -> tuple[nn.Module, nn.Module]:
    """A model under FSDP2, and the same in one piece; both with the gradients of one batch."""
    alone, module = model(), model()
    fully_shard(module, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    loss_of(alone, batches()[0]).backward()
    loss_of(module, batches()[0].chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]).backward()
    return module, alone


def assert_plain_norm(norm: Tensor, expected: Tensor) -> None:
    assert type(norm) is Tensor and norm.shape == ()
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    assert_same_on_all_ranks(norm)


@on_ranks(2, 4)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_clip_grad_norm(norm_type: float) -> None:
    module, alone = sharded_with_gradients()
    expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), MAX_NORM, norm_type)
    with CommDebugMode() as counted:
        norm = gradfast.clip_grad_norm_(module.parameters(), MAX_NORM, norm_type)
    assert counted.get_total_counts() == 1
    assert_plain_norm(norm, expected)
    for ours, theirs in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=1e-12, atol=1e-15)


@on_ranks(2)
def test_total_norm_then_clip() -> None:
    module, alone = sharded_with_gradients()
    norm = gradfast.get_total_norm(parameter.grad for parameter in module.parameters())
    assert_plain_norm(norm, torch.nn.utils.get_total_norm(parameter.grad for parameter in alone.parameters()))
    with CommDebugMode() as counted:
        gradfast.clip_grads_with_norm_(module.parameters(), MAX_NORM, norm)
    assert counted.get_total_counts() == 0
    for ours, theirs in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(ours.grad), theirs.grad * (MAX_NORM / (norm + 1e-6)), rtol=1e-12, atol=1e-15)


@on_ranks(2)
def test_clip_with_the_partial_norm_of_torch() -> None:
    """The DTensor that torch's `get_total_norm` returns (partial: pytorch 170862) is taken as the norm it means."""
    module, alone = sharded_with_gradients()
    gradients = [parameter.grad for parameter in module.parameters()]
    theirs = torch.nn.utils.get_total_norm(gradients)
    assert isinstance(theirs, DTensor), theirs
    gradfast.clip_grads_with_norm_(module.parameters(), MAX_NORM, theirs)
    torch.nn.utils.clip_grad_norm_(alone.parameters(), MAX_NORM)
    for ours, expected in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(ours.grad), expected.grad, rtol=1e-12, atol=1e-15)


def calls_within(function: Callable[[], object]) -> int:
    """How many calls of Python and C functions it makes, which no other program's load changes."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    function()  # what is made once and kept
    gc.disable()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


@on_ranks(2)
def test_work_grows_with_the_number_of_gradients_and_no_faster() -> None:
    """Stacking the norms of n DTensors took torch work in proportion to n squared (pytorch 169445)."""
    mesh = init_device_mesh("cpu", (2,))
    gradients = [distribute_tensor(torch.full((4, 2), 0.5), mesh, [Shard(0)]) for _ in range(200)]
    few, many, most = (calls_within(lambda n=n: gradfast.get_total_norm(gradients[:n])) for n in (50, 100, 200))
    assert most - many <= 2.1 * (many - few), (few, many, most)
    assert many > few


@on_ranks(4)
def test_gradients_on_several_meshes() -> None:
    """Which torch's norm refuses (pytorch 180346)."""
    generator = torch.Generator().manual_seed(2)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    full = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    tensors = [
        distribute_tensor(full[0], grid, [Shard(0), Replicate()]),
        distribute_tensor(full[1], grid["columns"], [Shard(1)]),
        full[2],
    ]
    with pytest.raises(Exception, match=r"mesh|DTensor"):
        torch.nn.utils.get_total_norm(tensors)
    assert_plain_norm(gradfast.get_total_norm(tensors), torch.stack(full).norm())


@on_ranks(2)
@pytest.mark.parametrize("reduction", ["sum", "avg"])
def test_partial_gradients(reduction: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    parts = [torch.tensor([1.0, 2.0, -5.0]), torch.tensor([3.0, -2.0, 1.0])]
    parameter = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(parts[torch.distributed.get_rank()].clone(), mesh, [Partial(reduction)])
    expected = sum(parts) / (2 if reduction == "avg" else 1)
    norm = gradfast.clip_grad_norm_([parameter], 1.0)
    assert_plain_norm(norm, expected.norm())
    torch.testing.assert_close(whole(parameter.grad), expected / (norm + 1e-6))
    with pytest.raises(ValueError, match="gradient 0 has a partial placement"):
        gradfast.clip_grad_value_([parameter], 1.0)


@on_ranks(2)
def test_clip_grad_value() -> None:
    module, alone = sharded_with_gradients()
    gradfast.clip_grad_value_(module.parameters(), 0.01)
    for ours, theirs in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(ours.grad), theirs.grad.clamp(-0.01, 0.01), rtol=1e-12, atol=1e-15)


@on_ranks(2)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_nonfinite_on_one_rank(norm_type: float) -> None:
    module, _ = sharded_with_gradients()
    if torch.distributed.get_rank() == 1:
        module[0].weight.grad.to_local()[0, 0] = float("nan")
    before = [whole(parameter.grad).clone() for parameter in module.parameters()]
    with pytest.raises(RuntimeError, match="nan"):
        gradfast.clip_grad_norm_(module.parameters(), 1.0, norm_type, error_if_nonfinite=True)
    for parameter, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(whole(parameter.grad), old, rtol=0, atol=0, equal_nan=True)


@on_ranks(2)
def test_process_group_of_different_tensors() -> None:
    rank = torch.distributed.get_rank()
    mine = nn.Parameter(torch.zeros(2))
    mine.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]][rank])
    world = torch.distributed.group.WORLD
    assert gradfast.get_total_norm([mine.grad], process_group=world).item() == 5.0
    assert gradfast.clip_grad_norm_([mine] if rank == 0 else [], 1.0, process_group=world).item() == 3.0
    torch.testing.assert_close(mine.grad, torch.tensor([[1.0, 0.0], [0.0, 4.0]][rank]))
