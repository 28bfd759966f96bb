"""`process_group=`: ranks that hold different parameters, plain or DTensors; and FSDP1's flat parameters."""

from __future__ import annotations

import logging
import pickle

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
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import gradfast


def stage_of(module: nn.Sequential, stage: int, stages: int) -> dict[str, nn.Parameter]:
    """The parameters of one stage of a pipeline: each layer belongs to one; a late stage may have none."""
    layers = [index for index, layer in enumerate(module) if isinstance(layer, nn.Linear)]
    mine = [index for position, index in enumerate(layers) if position * stages // len(layers) == stage]
    return {name: p for name, p in module.named_parameters() if int(name.split(".")[0]) in mine}


@on_ranks(2, 4)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_pipeline_stages(name: str, norm_type: float) -> None:
    """Every rank steps its own layers by the norm of all; of four ranks one has none, and decides as the others."""
    norms, parameters, _ = train_alone(model(), name, norm_type, lr=0.1)
    module = model()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = stage_of(module, rank, world)
    assert len(mine) == {2: (4, 2), 4: (2, 2, 2, 0)}[world][rank]
    optimizer = getattr(gradfast, name)(
        [{"params": list(mine.items())}],
        lr=0.1,
        max_norm=MAX_NORM,
        norm_type=norm_type,
        process_group=torch.distributed.group.WORLD,
    )
    for batch, norm in zip(batches(), norms, strict=True):
        module.zero_grad()
        loss_of(module, batch).backward()
        with CommDebugMode() as counted:
            optimizer.step()
        assert counted.get_total_counts() == 1
        torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=1e-7 if not mine else 1e-12, atol=0)
        for owner in range(world):  # what a pipeline's next forward would see
            for parameter in stage_of(module, owner, world).values():
                torch.distributed.broadcast(parameter.detach(), owner)
    assert_same_parameters(module, parameters)


@on_ranks(4)
def test_nonfinite_stage_is_named_by_its_rank() -> None:
    module = model()
    rank = torch.distributed.get_rank()
    mine = stage_of(module, rank, 4)
    logging.getLogger("gradfast").setLevel(logging.ERROR)
    optimizer = gradfast.SGD([{"params": list(mine.items())}], lr=0.1, process_group=torch.distributed.group.WORLD)
    loss_of(module, batches()[0]).backward()
    if rank == 1:
        module[2].bias.grad[0] = float("nan")
    before = [parameter.detach().clone() for parameter in mine.values()]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.nonfinite_parameter == ("2.bias" if rank == 1 else "a parameter of rank 1")
    for parameter, old in zip(mine.values(), before, strict=True):
        assert torch.equal(parameter, old)
    module[2].bias.grad[0] = 0.0
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.nonfinite_parameter is None


@on_ranks(4)
def test_raise_also_where_nothing_is_held() -> None:
    module = model()
    mine = stage_of(module, torch.distributed.get_rank(), 4)
    optimizer = gradfast.SGD(
        [{"params": list(mine.items())}], lr=0.1, nonfinite="raise", process_group=torch.distributed.group.WORLD
    )
    loss_of(module, batches()[0]).backward()
    module[0].bias.grad[0] = float("inf")
    with pytest.raises(RuntimeError, match="inf"):
        optimizer.step()


@on_ranks(2)
def test_copies_count_once() -> None:
    """Tensor parallelism by hand: each rank has half of the rows of one weight, and a copy of another."""
    generator = torch.Generator().manual_seed(3)
    rows, copy = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mine = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    both = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = gradfast.SGD(
        [{"params": [mine]}, {"params": [both], "replicated": True}],
        lr=0.1,
        max_norm=1.0,
        process_group=torch.distributed.group.WORLD,
    )
    mine.grad, both.grad = rows.chunk(2)[torch.distributed.get_rank()].clone(), copy.clone()
    for _ in range(2):
        optimizer.step()
        assert_norm(optimizer, torch.cat([rows, copy]).norm())
        optimizer.load_state_dict(optimizer.state_dict())  # which does not say how the parameters lie
    if torch.distributed.get_rank() == 1:
        both.grad[0, 0] = float("nan")  # of the copy that does not count
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same_on_all_ranks(optimizer.grad_norm)


@on_ranks(4)
def test_pipeline_of_sharded_stages() -> None:
    """Two stages, each FSDP2 over two ranks: one all-reduce over the mesh of the stage, one over the stages."""
    norms, _, _ = train_alone(model(), "AdamW", lr=0.05)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    stage, part = grid.get_coordinate()
    for batch, norm in zip(batches(steps=1), norms):
        whole, mine = model(), model()
        loss_of(whole, batch).backward()
        layers = [mine[0], mine[2]] if stage == 0 else [mine[4]]
        for layer in layers:
            fully_shard(layer, mesh=grid["shard"])
        named = {n: p for n, p in mine.named_parameters() if n in stage_of(whole, stage, 2)}
        optimizer = gradfast.AdamW(named.items(), lr=0.05, max_norm=MAX_NORM, process_group=grid.get_group("stage"))
        for name, parameter in named.items():
            full = whole.get_parameter(name).grad
            local = full.chunk(2)[part] if part < len(full.chunk(2)) else full[:0]
            parameter.grad = torch.distributed.tensor.DTensor.from_local(
                local, grid["shard"], parameter.placements, shape=full.shape, stride=full.stride()
            )
        with CommDebugMode() as counted:
            optimizer.step()
        assert counted.get_total_counts() == 2
        assert_norm(optimizer, norm)
    with pytest.raises(ValueError, match=r"process_group= has ranks \[\d\] in common with the mesh of '.*weight'"):
        gradfast.SGD(named.items(), lr=0.1, process_group=grid.get_group("shard")).step()


@on_ranks(2)
@pytest.mark.parametrize("original", [False, True])
def test_flat_parameters_of_fsdp1(original: bool) -> None:
    """FSDP1 gives each rank a plain part of a flat tensor: `process_group=` is its own group."""
    norms, parameters, _ = train_alone(model(), "AdamW", lr=0.05)
    module = FullyShardedDataParallel(
        model(), use_orig_params=original, sharding_strategy=ShardingStrategy.FULL_SHARD, device_id=torch.device("cpu")
    )
    optimizer = gradfast.AdamW(module.parameters(), lr=0.05, max_norm=MAX_NORM, process_group=module.process_group)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, batch.chunk(2)[torch.distributed.get_rank()]).backward()
        optimizer.step()
        assert_norm(optimizer, norm)
    with FullyShardedDataParallel.summon_full_params(module):
        got = {name.removeprefix("_fsdp_wrapped_module."): p.detach() for name, p in module.named_parameters()}
        if original:
            for name, expected in parameters.items():
                torch.testing.assert_close(got[name], expected, rtol=1e-11, atol=1e-13)


@on_ranks(2)
def test_a_pickle_finds_the_group_again() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = gradfast.SGD([parameter], lr=0.1, process_group=torch.distributed.group.WORLD)
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.process_group is torch.distributed.group.WORLD
    (held,) = again.param_groups[0]["params"]
    held.grad = torch.ones(3)
    again.step()
    assert again.grad_norm.item() == pytest.approx(6**0.5, rel=1e-6)
    assert isinstance(again.grad_norm, Tensor)
