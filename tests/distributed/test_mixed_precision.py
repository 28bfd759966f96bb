"""Loss scaling and low-precision parameters over several ranks: one decision, one scale."""

from __future__ import annotations

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
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import gradfast
from gradfast.amp import GradScaler


def sharded(module: nn.Module, **options: Any) -> nn.Module:
    fully_shard(module, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)), **options)
    return module


@on_ranks(2)
@pytest.mark.parametrize("scaler_type", [GradScaler, torch.amp.GradScaler])
def test_scaled_steps_are_as_one_process(scaler_type: type[torch.amp.GradScaler]) -> None:
    norms, parameters, _ = train_alone(model(), "AdamW", lr=0.05)
    module = sharded(model())
    optimizer = gradfast.AdamW(module.named_parameters(), lr=0.05, max_norm=MAX_NORM)
    scaler = scaler_type("cpu", init_scale=1024.0)
    rank = torch.distributed.get_rank()
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(loss_of(module, batch.chunk(2)[rank])).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_norm(optimizer, norms[step])
        each = torch.stack(list(optimizer.grad_norms().values()))  # unscaled, too
        torch.testing.assert_close(each.norm(), norms[step], rtol=1e-12, atol=0)
    assert_same_parameters(module, parameters)


@on_ranks(2)
@pytest.mark.parametrize("scaler_type", [GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_infinity_on_one_rank_lowers_the_scale_of_all(
    scaler_type: type[torch.amp.GradScaler], unscale_first: bool
) -> None:
    module = sharded(model())
    optimizer = gradfast.AdamW(module.named_parameters(), lr=0.05, max_norm=MAX_NORM)
    scaler = scaler_type("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(module, batches()[0])).backward()
        if step == 1 and torch.distributed.get_rank() == 1:
            module[4].weight.grad.to_local()[0, 0] = float("inf")
        before = [whole(parameter).clone() for parameter in module.parameters()]
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(whole(p), old) for p, old in zip(module.parameters(), before, strict=True))
        assert same == (step == 1)
        assert scaler.get_scale() == (1024.0 if step == 0 else 512.0)
    assert_same_on_all_ranks(optimizer.grad_norm)


@on_ranks(2)
def test_scaler_over_ranks_that_hold_different_parameters() -> None:
    """torch's scaler looks at its own rank's gradients alone; ours takes what the joined norm says."""
    rank = torch.distributed.get_rank()
    parameter = nn.Parameter(torch.ones(3))
    optimizer = gradfast.SGD([parameter], lr=0.5, max_norm=1.0, process_group=torch.distributed.group.WORLD)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(parameter.sum()).backward()
    if rank == 1:
        parameter.grad[2] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert torch.equal(parameter, torch.ones(3))


@on_ranks(2)
def test_bfloat16_computation_with_float32_parameters() -> None:
    """FSDP2's mixed precision: the gradients are reduced in float32, and the norm is of those."""
    module = sharded(
        model().float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    )
    optimizer = gradfast.AdamW(module.parameters(), lr=0.05, max_norm=MAX_NORM)
    loss_of(module, batches()[0].float().chunk(2)[torch.distributed.get_rank()]).backward()
    expected = torch.stack([(whole(p.grad).double() ** 2).sum() for p in module.parameters()]).sum().sqrt()
    optimizer.step()
    assert optimizer.grad_norm.dtype == torch.float32
    torch.testing.assert_close(optimizer.grad_norm.double(), expected, rtol=2.0**-24, atol=0)
    assert_same_on_all_ranks(optimizer.grad_norm)
    with torch.no_grad():
        assert all(torch.isfinite(whole(parameter)).all() for parameter in module.parameters())


@on_ranks(2)
@pytest.mark.parametrize(
    "precision",
    [
        {"master_weights": True},
        {"master_weights": True, "state_dtype": torch.bfloat16},
        {"stochastic_rounding": True},
    ],
    ids=lambda precision: "-".join(precision),
)
def test_low_precision_parameters_are_stepped_as_whole_ones(precision: dict[str, Any]) -> None:
    """Given the same gradients, shards with masters hold what one process holds; by chance, its expectation."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(4)
    whole_one = nn.Parameter(torch.randn(7, 4, generator=generator).bfloat16())
    shards = nn.Parameter(distribute_tensor(whole_one.detach().clone(), mesh, [Shard(0)]))
    alone = gradfast.AdamW([whole_one], lr=0.01, max_norm=1.0, **precision)
    together = gradfast.AdamW([shards], lr=0.01, max_norm=1.0, **precision)
    for _ in range(3):
        gradient = torch.randn(7, 4, generator=generator).bfloat16()
        whole_one.grad, shards.grad = gradient, distribute_tensor(gradient.clone(), mesh, [Shard(0)])
        alone.step()
        together.step()
        torch.testing.assert_close(together.grad_norm, alone.grad_norm, rtol=2.0**-23, atol=0)
    exact = precision.get("state_dtype") is None and "master_weights" in precision
    for key, value in alone.state[whole_one].items():
        found = together.state[shards][key]
        assert found.dtype == value.dtype, key
        assert isinstance(found, DTensor) == (key != "step")
        # Rounding by chance draws other bits for a shard: a step of bfloat16 each time.
        torch.testing.assert_close(whole(found), value, rtol=1e-6 if exact else 2.0**-6, atol=1e-7 if exact else 1e-3)
    torch.testing.assert_close(whole(shards), whole_one.detach(), rtol=0 if exact else 2.0**-6, atol=0)
