"""AGC on DTensors: whole units on each rank, and the norm of what is left of them over all."""

from __future__ import annotations

import pytest
import torch
from distributed.alone import assert_same_on_all_ranks, assert_same_parameters, batches, loss_of, model
from distributed.ranks import on_ranks
from distributed.test_fsdp2 import my_part, sharded
from distributed.test_tensor_parallel import WIDTHS, in_columns_and_rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

import gradfast
from gradfast import clip

POLICIES = {
    "alone": clip.AGC(0.02, vectors=False),
    "norm": clip.Chain(clip.AGC(0.02, vectors=False), clip.GlobalNorm(0.1)),
    "AdaGC": clip.Chain(clip.AGC(0.02, exclude=["*.bias", "4.*"]), clip.AdaGC(warmup=2, beta=0.9)),
}


def run(module: nn.Module, policy: clip.Policy, alone: bool) -> gradfast.AdamW:
    optimizer = gradfast.AdamW(module.named_parameters(), lr=0.05, clip=policy)
    for batch in batches(5):
        optimizer.zero_grad()
        loss_of(module, batch if alone else my_part(batch)).backward()
        optimizer.step()
    return optimizer


@on_ranks(2, 4)
@pytest.mark.parametrize("name", list(POLICIES))
def test_rows_on_the_ranks_as_one_process(name: str) -> None:
    """Thirteen, seven and three rows on two and four ranks: uneven shards, and an empty one."""
    single = model()
    reference = run(single, POLICIES[name], alone=True)
    module = sharded(model())
    optimizer = run(module, POLICIES[name], alone=False)
    assert_same_parameters(module, {key: p.detach() for key, p in single.named_parameters()}, rtol=1e-9)
    torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-9, atol=0)
    assert_same_on_all_ranks(optimizer.grad_norm)
    expected = reference.grad_norms()
    for key, norm in optimizer.grad_norms().items():
        torch.testing.assert_close(norm, expected[key], rtol=1e-9, atol=0, msg=lambda m, k=key: f"{k}: {m}")
    _, left = (optimizer.grad_norm, torch.stack([p.grad.full_tensor().norm() for p in module.parameters()]).norm())
    assert optimizer.grad_norm < 0.9 * left, "units were clipped"


@on_ranks(2)
def test_replicated_parameters_take_vectors_too() -> None:
    single = model()
    reference = run(single, clip.AGC(0.02), alone=True)
    mesh = init_device_mesh("cpu", (2,))
    module = distribute_module(model(), mesh)
    optimizer = gradfast.AdamW(module.named_parameters(), lr=0.05, clip=clip.AGC(0.02))
    for batch in batches(5):
        optimizer.zero_grad()
        loss_of(module, distribute_tensor(batch, mesh, [Replicate()])).backward()
        optimizer.step()
    assert_same_parameters(module, {key: p.detach() for key, p in single.named_parameters()}, rtol=1e-9)
    torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-9, atol=0)


@on_ranks(2)
def test_parts_of_units_are_refused() -> None:
    module = sharded(model())
    loss_of(module, my_part(batches(1)[0])).backward()
    with pytest.raises(ValueError, match=r"'0.bias' is sharded.*vectors=False"):
        gradfast.SGD(module.named_parameters(), lr=0.1, clip=clip.AGC()).step()
    mesh = init_device_mesh("cpu", (2,))
    module = in_columns_and_rows(model(WIDTHS), mesh)
    loss_of(module, batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"'2.weight' has the placement S.*exclude="):
        gradfast.SGD(module.named_parameters(), lr=0.1, clip=clip.AGC(vectors=False)).step()
    gradfast.SGD(module.named_parameters(), lr=0.1, clip=clip.AGC(vectors=False, exclude=["2.*"])).step()
