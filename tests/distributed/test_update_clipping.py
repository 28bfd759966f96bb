"""StableAdamW on several ranks: an update's size is the whole parameter's, and the rates are the same on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed.alone import assert_same_on_all_ranks, assert_same_parameters, batches, loss_of, model, whole
from distributed.ranks import on_ranks
from distributed.test_fsdp2 import my_part, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import gradfast
from gradfast import clip

HYPER: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.8), "weight_decay": 0.1, "update_clipping": True}
CLIPPING: dict[str, dict[str, Any]] = {
    "nothing beside": {},
    "max_norm": {"max_norm": 0.5},
    "largest magnitude": {"max_norm": 0.5, "norm_type": float("inf")},
    "measured by magnitude": {"norm_type": float("inf")},
    "ZClip": {"clip": clip.ZClip(warmup=2)},
    "AdaGC": {"clip": clip.AdaGC(warmup=2, beta=0.5)},
}
STEPS = 8


def grown(loss: Tensor, step: int) -> Tensor:
    """Gradients that grow thirtyfold now and then: v lags behind, and updates are too large."""
    return loss * (30 if step % 3 == 2 else 1)


def alone(module: nn.Module, **options: Any) -> dict[str, Tensor]:
    """What one process comes to; tests/optim/test_update_clipping.py holds that against the paper."""
    optimizer = gradfast.AdamW(module.parameters(), **HYPER, **options)
    plain_module = model()
    plain = gradfast.AdamW(plain_module.parameters(), **{**HYPER, "update_clipping": False}, **options)
    for step, batch in enumerate(batches(STEPS)):
        for each, of in ((optimizer, module), (plain, plain_module)):
            each.zero_grad()
            grown(loss_of(of, batch), step).backward()
            each.step()
    differ = [(a - b).abs().max() for a, b in zip(module.parameters(), plain_module.parameters(), strict=True)]
    assert min(differ) > 1e-4, "updates were clipped"
    return {key: value.detach() for key, value in module.named_parameters()}


@on_ranks(2, 4)
@pytest.mark.parametrize("name", CLIPPING)
def test_as_one_process(name: str) -> None:
    expected = alone(model(), **CLIPPING[name])
    module = sharded(model())
    optimizer = gradfast.AdamW(module.parameters(), **HYPER, **CLIPPING[name])
    for step, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        grown(loss_of(module, my_part(batch)), step).backward()
        optimizer.step()
        means = optimizer._sharding.update_means(optimizer._engine)
        assert_same_on_all_ranks(means)
    assert_same_parameters(module, expected)


@on_ranks(4)
def test_copies_of_shards_count_once() -> None:
    expected = alone(model(), max_norm=0.5)
    module = sharded(model(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = gradfast.AdamW(module.parameters(), max_norm=0.5, **HYPER)
    for step, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        grown(loss_of(module, my_part(batch)), step).backward()
        optimizer.step()
    assert_same_parameters(module, expected)


@on_ranks(2)
def test_a_parameter_without_a_gradient() -> None:
    """The last layer's bias is frozen at first, and a rank that holds nothing of it agrees with the others."""
    runs = []
    for many in (False, True):
        module = sharded(model()) if many else model()
        optimizer = gradfast.AdamW(module.named_parameters(), **HYPER)
        for step, batch in enumerate(batches(STEPS)):
            optimizer.zero_grad()
            grown(loss_of(module, my_part(batch) if many else batch), step).backward()
            if step < 3:
                module[2].bias.grad = None
            optimizer.step()
        runs.append({key: whole(p) for key, p in module.named_parameters()})
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-11, atol=1e-13)


@on_ranks(2)
@pytest.mark.parametrize(
    ("name", "collectives"), [("nothing beside", 1), ("max_norm", 2), ("measured by magnitude", 2)]
)
def test_collectives_of_a_step(name: str, collectives: int) -> None:
    """Update sizes travel with the norm, unless they depend on it, or are joined by another operation."""
    module = sharded(model())
    optimizer = gradfast.AdamW(module.parameters(), **HYPER, **CLIPPING[name])
    loss_of(module, my_part(batches()[0])).backward()
    for _ in range(2):
        with CommDebugMode() as counted:
            optimizer.step()
        assert counted.get_total_counts() == collectives, counted.get_comm_counts()


@on_ranks(2)
def test_ranks_with_parameters_of_their_own() -> None:
    """A pipeline's stages: the norm is joined, and each finds the rates of its own parameters."""
    rank = torch.distributed.get_rank()
    stages = [model((6, 5, 3), seed=seed) for seed in (0, 1)]
    both = nn.ModuleList([model((6, 5, 3), seed=seed) for seed in (0, 1)])
    reference = gradfast.AdamW(both.parameters(), max_norm=0.5, **HYPER)
    mine = stages[rank]
    optimizer = gradfast.AdamW(mine.parameters(), max_norm=0.5, process_group=torch.distributed.group.WORLD, **HYPER)
    for step, batch in enumerate(batches(STEPS)):
        for each, modules in ((reference, list(both)), (optimizer, [mine])):
            each.zero_grad()
            for module in modules:
                grown(loss_of(module, batch), step).backward()
            with CommDebugMode() as counted:
                each.step()
        assert counted.get_total_counts() == 1
    for p, expected in zip(mine.parameters(), both[rank].parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-11, atol=1e-13)
