"""Tensor parallel, alone and under FSDP2, and parameters of several meshes in one optimiser."""

from __future__ import annotations

import copy
import logging

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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradfast
from gradfast.clip.reduction import Ranks, Reduction, groups_of

WIDTHS = (6, 12, 8, 3)


def in_columns_and_rows(module: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """The first layer by columns and the second by rows, whose bias is replicated; the third stays plain."""
    return parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@on_ranks(2, 4)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_tensor_parallel(norm_type: float) -> None:
    norms, parameters, _ = train_alone(model(WIDTHS), "AdamW", norm_type, lr=0.05)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    module = in_columns_and_rows(model(WIDTHS), mesh)
    assert not isinstance(module[4].weight, DTensor)
    optimizer = gradfast.AdamW(module.named_parameters(), lr=0.05, max_norm=MAX_NORM, norm_type=norm_type)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, batch).backward()
        with CommDebugMode() as counted:
            optimizer.step()
        assert counted.get_total_counts() == 1
        assert_norm(optimizer, norm)
    assert_same_parameters(module, parameters)


class Normed(nn.Module):
    """A norm whose weights are replicated and whose gradients come out partial: each rank sees a part of the rows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.out = nn.Linear(6, 4, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.norm(rows))


@on_ranks(2)
def test_partial_gradients_are_reduced() -> None:
    norms, parameters, _ = train_alone(Normed(), "AdamW", lr=0.05)
    mesh = init_device_mesh("cpu", (2,))
    plan = {"norm": SequenceParallel(sequence_dim=0), "out": ColwiseParallel(input_layouts=Shard(0))}
    module = parallelize_module(Normed(), mesh, plan)
    optimizer = gradfast.AdamW(module.named_parameters(), lr=0.05, max_norm=MAX_NORM)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, batch.chunk(2)[torch.distributed.get_rank()]).backward()
        assert any(placement.is_partial() for placement in module.norm.weight.grad.placements)
        optimizer.step()
        assert_norm(optimizer, norm)
    assert_same_parameters(module, parameters)


@on_ranks(4)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_fsdp_over_tensor_parallel(norm_type: float) -> None:
    """Two dimensions: sharded in both, or in one and replicated in the other; one all-reduce over all four ranks."""
    norms, parameters, _ = train_alone(model(WIDTHS), "AdamW", norm_type, lr=0.05)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    module = in_columns_and_rows(model(WIDTHS), grid["tensor"])
    fully_shard(module, mesh=grid["data"])
    optimizer = gradfast.AdamW(module.named_parameters(), lr=0.05, max_norm=MAX_NORM, norm_type=norm_type)
    for batch, norm in zip(batches(), norms, strict=True):
        optimizer.zero_grad()
        loss_of(module, batch.chunk(2)[grid.get_local_rank("data")]).backward()
        with CommDebugMode() as counted:
            optimizer.step()
        # The plain layer is on the mesh "data" alone: a part of all ranks, counted in one column of them.
        assert counted.get_total_counts() == 1, counted.get_comm_counts()
        assert_norm(optimizer, norm)
    assert_same_parameters(module, parameters)


def with_gradient(parameter: nn.Parameter, gradient: Tensor) -> nn.Parameter:
    parameter.grad = distribute_tensor(gradient.clone(), parameter.device_mesh, parameter.placements)
    return parameter


@on_ranks(4)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 2.5, float("inf")])
def test_parameters_of_many_meshes(norm_type: float) -> None:
    """Every placement on a grid, on its rows, its columns and a mesh of all ranks, and a plain one: all count once."""
    generator = torch.Generator().manual_seed(7)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    line = init_device_mesh("cpu", (4,))
    kinds = [
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(0), Replicate()]),
        (grid, [Replicate(), Shard(1)]),
        (grid, [Replicate(), Replicate()]),
        (grid["rows"], [Shard(0)]),
        (grid["rows"], [Replicate()]),
        (grid["columns"], [Shard(1)]),
        (line, [Shard(0)]),
        (line, [Replicate()]),
    ]
    parameters, gradients = [], []
    for index, (mesh, placements) in enumerate(kinds):
        values, gradient = (torch.randn(5, 3 + index, generator=generator, dtype=torch.float64) for _ in range(2))
        parameters.append(with_gradient(nn.Parameter(distribute_tensor(values, mesh, placements)), gradient))
        gradients.append(gradient)
    plain = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    plain.grad = torch.randn(3, generator=generator, dtype=torch.float64)
    optimizer = gradfast.SGD([*parameters, plain], lr=0.1, max_norm=1.0, norm_type=norm_type)
    before = [whole(parameter).clone() for parameter in parameters]
    with CommDebugMode() as counted:
        optimizer.step()
    assert counted.get_total_counts() == 1
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in [*gradients, plain.grad]]), norm_type)
    assert_norm(optimizer, expected)
    factor = 1.0 / (expected + 1e-6)
    for parameter, old, gradient in zip(parameters, before, gradients, strict=True):
        torch.testing.assert_close(whole(parameter), old - 0.1 * factor * gradient, rtol=1e-12, atol=1e-14)


@on_ranks(4)
def test_meshes_that_no_mesh_covers() -> None:
    """Rows and columns of a grid, and no parameter on all of it: one all-reduce over each."""
    generator = torch.Generator().manual_seed(8)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    parameters, gradients = [], []
    for name in ("rows", "columns"):
        values, gradient = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        parameters.append(with_gradient(nn.Parameter(distribute_tensor(values, grid[name], [Shard(0)])), gradient))
        gradients.append(gradient)
    optimizer = gradfast.SGD(parameters, lr=0.1, max_norm=1.0)
    with CommDebugMode() as counted:
        optimizer.step()
    assert counted.get_total_counts() == 2
    assert_norm(optimizer, torch.stack(gradients).norm())


@on_ranks(4)
@pytest.mark.parametrize("flattened", [False, True])
def test_a_mesh_of_two_dimensions_that_is_not_all_ranks(flattened: bool) -> None:
    """One dimension of the grid is left out: a group of both others exists only once somebody flattened them."""
    generator = torch.Generator().manual_seed(9)
    cube = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("stage", "rows", "columns"))
    part = cube["rows", "columns"]
    if flattened:
        part._flatten("both")
    gradient = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(distribute_tensor(torch.zeros_like(gradient), part, [Shard(0), Shard(1)]))
    reduction = Reduction([parameter], ["weight"])
    (span,) = reduction.spans
    groups = groups_of(span.ranks, part, world=8)  # as in a larger world
    assert len(groups) == (1 if flattened else 2)
    span.groups = [Ranks(group) for group in groups]
    local = with_gradient(parameter, gradient).grad.to_local()
    total = reduction.join((local**2).sum().reshape(1), infinity=False)
    torch.testing.assert_close(total, (gradient**2).sum(), rtol=1e-13, atol=0)


@on_ranks(4)
def test_a_replica_gone_bad_stops_all() -> None:
    """Only rank 3's copy of a replicated parameter is NaN, and its copy is not the one that counts."""
    logging.getLogger("gradfast").setLevel(logging.ERROR)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    values = torch.ones(4, 4, dtype=torch.float64)
    copied = distribute_tensor(values.clone(), grid, [Replicate(), Replicate()])
    parameter = with_gradient(nn.Parameter(copied), values)
    other = with_gradient(nn.Parameter(distribute_tensor(values.clone(), grid["rows"], [Shard(0)])), values)
    optimizer = gradfast.SGD([("copied", parameter), ("split", other)], lr=0.1, max_norm=1.0)
    if torch.distributed.get_rank() == 3:
        parameter.grad.to_local()[1, 1] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.nonfinite_parameter == "copied"
    assert_same_on_all_ranks(optimizer.grad_norm)
    assert torch.equal(whole(other), values)


@on_ranks(2)
def test_refusals_name_the_parameter() -> None:
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"'odd' has the placement .*redistribute"):
        gradfast.SGD([("odd", partial)], lr=0.1).step()
    elsewhere = DeviceMesh("cpu", [1])
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3), elsewhere, [Replicate()], run_check=False))
    if torch.distributed.get_rank() == 0:
        with pytest.raises(ValueError, match=r"rank 0 is not in the mesh of 'far'"):
            gradfast.SGD([("far", parameter)], lr=0.1).step()


@on_ranks(2)
def test_copies_and_new_groups() -> None:
    mesh = init_device_mesh("cpu", (2,))
    module = in_columns_and_rows(model(WIDTHS), mesh)
    optimizer = gradfast.SGD(list(module.parameters())[:2], lr=0.1, momentum=0.9, max_norm=MAX_NORM)
    loss_of(module, batches()[0]).backward()
    optimizer.step()
    optimizer.add_param_group({"params": list(module.parameters())[2:]})
    optimizer.step()
    squares = [(whole(parameter.grad) ** 2).sum() for parameter in module.parameters()]
    assert_norm(optimizer, torch.stack(squares).sum().sqrt())
    again = copy.deepcopy(optimizer)
    for group, original in zip(again.param_groups, optimizer.param_groups, strict=True):
        for parameter, source in zip(group["params"], original["params"], strict=True):
            parameter.grad = source.grad
    again.step()
    optimizer.step()
    for group, original in zip(again.param_groups, optimizer.param_groups, strict=True):
        for parameter, source in zip(group["params"], original["params"], strict=True):
            assert torch.equal(whole(parameter), whole(source))
