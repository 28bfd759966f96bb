"""What torch.distributed adds on a device, with one process: NCCL's collective, FSDP2, its CPU offload, no waiting.

The same runs here on the CPU with gloo. Several ranks are the business of tests/distributed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gpu.host import no_synchronisation
from gpu.oracle import Pair, random
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

import gradfast
from gradfast.clip.reduction import Ranks

SHAPES = [(16, 3), (7,), (), (4097,)]


@pytest.fixture(params=["the device's alone", "one for each device"])
def world(request: pytest.FixtureRequest, device: torch.device, tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A process group of this process: NCCL's on a GPU, with gloo beside it for tensors of the CPU or without."""
    backend = "gloo"
    if device.type == "cpu" and request.param == "one for each device":
        pytest.skip("the CPU has gloo either way")
    if device.type == "cuda":
        backend = "nccl" if request.param == "the device's alone" else "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def no_waiting(device: torch.device) -> AbstractContextManager[None]:
    return no_synchronisation() if device.type == "cuda" else nullcontext()


@pytest.mark.parametrize("where", ["on the device", "on the CPU"])
def test_the_collective_reaches_every_device(world: dist.ProcessGroup, device: torch.device, where: str) -> None:
    """Sums on a CPU that the group does not serve go by way of the device, and come back."""
    sums = torch.tensor([1.0, 2.0], dtype=torch.float64, device=device if where == "on the device" else "cpu")
    joined = Ranks(world).all_reduce(sums.clone(), "SUM")
    assert joined.device == sums.device
    assert joined.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_process_group(world: dist.ProcessGroup, device: torch.device, name: str, norm_type: float) -> None:
    """Measure, all-reduce, update: as the one native call does it, and without waiting."""
    once = random(SHAPES, torch.float32, device, seed=0)
    joined = [parameter.clone() for parameter in once]
    alone = getattr(gradfast, name)(once, lr=0.1, max_norm=1.0, norm_type=norm_type)
    together = getattr(gradfast, name)(joined, lr=0.1, max_norm=1.0, norm_type=norm_type, process_group=world)
    for step in range(4):
        for mine, other, gradient in zip(once, joined, random(SHAPES, torch.float32, device, seed=step + 1)):
            mine.grad, other.grad = gradient, gradient.clone()
        alone.step()
        with no_waiting(device) if step else nullcontext():
            together.step()
            _ = together.grad_norm, together.clip_coef, together.grad_norms()
        assert together.grad_norm.item() == pytest.approx(alone.grad_norm.item(), rel=2.0**-23)
    for mine, other in zip(once, joined):
        torch.testing.assert_close(mine, other, rtol=2.0**-20, atol=2.0**-22)


def test_bad_gradient_under_a_process_group(world: dist.ProcessGroup, device: torch.device) -> None:
    parameter = torch.ones(5, device=device)
    optimizer = gradfast.SGD([("weight", parameter)], lr=0.1, process_group=world)
    parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert (optimizer.skipped_steps, optimizer.nonfinite_parameter) == (1, "weight")
    assert parameter.tolist() == [1.0] * 5


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).double().to(device)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, quiet: bool = False) -> None:
    for step in range(4):
        optimizer.zero_grad()
        batch = torch.full((4, 5), 0.3 * (step + 1), dtype=torch.float64, device=device)
        module(batch).pow(2).sum().backward()
        with no_waiting(device) if quiet and step else nullcontext():
            optimizer.step()


def elements(tensor: Tensor) -> Tensor:
    """All of them: there is one rank."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().cpu()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_fsdp2(world: dist.ProcessGroup, device: torch.device, joined: bool, offload: bool) -> None:
    """Also with shards and states on the CPU while the model computes on the GPU, and with a group over the mesh."""
    if offload and device.type == "cpu":
        pytest.skip("there is nothing to offload to")
    alone = network(device)
    train(alone, gradfast.AdamW(alone.parameters(), lr=0.05, max_norm=0.5), device)
    sharded = network(device)
    policy = {"offload_policy": CPUOffloadPolicy()} if offload else {}
    fully_shard(sharded, mesh=init_device_mesh(device.type, (1,)), **policy)
    group = {"process_group": world} if joined else {}
    optimizer = gradfast.AdamW(sharded.parameters(), lr=0.05, max_norm=0.5, **group)
    train(sharded, optimizer, device, quiet=not offload)
    for mine, other in zip(sharded.parameters(), alone.parameters()):
        kept = "cpu" if offload else device.type
        assert mine.device.type == optimizer.state[mine]["exp_avg"].device.type == kept
        torch.testing.assert_close(elements(mine), elements(other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_oracle_under_a_process_group(world: dist.ProcessGroup, device: torch.device, name: str) -> None:
    pair = Pair(name, random(SHAPES, torch.float64, device, seed=0), {"lr": 0.1})
    pair.fast.process_group = world
    for step in range(3):
        pair.step([gradient + gradient.sign() for gradient in random(SHAPES, torch.float64, device, seed=step + 1)])
