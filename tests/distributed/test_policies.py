"""Clip policies on sharded models: every rank decides by the whole model's norms, as one process does."""

from __future__ import annotations

import pytest
import torch
from distributed.alone import assert_same_on_all_ranks, assert_same_parameters, batches, loss_of, model
from distributed.ranks import on_ranks
from distributed.test_fsdp2 import my_part, sharded

import gradfast
from gradfast import clip

STEPS = 14
POLICIES = {
    "of the whole": clip.Chain(
        clip.SkipSpikes(3.0, 6), clip.ZClip(warmup=4), clip.AutoClip(60, 8), clip.GlobalNorm(2.0)
    ),
    "by parameter": clip.Chain(clip.SkipSpikes(3.0, 6), clip.PerParameterNorm(0.2)),
    "AdaGC": clip.AdaGC(warmup=4, beta=0.9),
}


def run(module: torch.nn.Module, policy: clip.Policy, alone: bool) -> gradfast.SGD:
    optimizer = gradfast.SGD(module.named_parameters(), lr=0.05, momentum=0.9, clip=policy)
    for step, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        loss = loss_of(module, batch if alone else my_part(batch))
        (1000 * loss if step == 9 else loss).backward()
        optimizer.step()
    return optimizer


@on_ranks(2, 4)
@pytest.mark.parametrize("name", list(POLICIES))
def test_as_one_process(name: str) -> None:
    policy = POLICIES[name]
    single = model()
    reference = run(single, policy, alone=True)
    module = sharded(model())
    optimizer = run(module, policy, alone=False)
    assert optimizer.skipped_steps == reference.skipped_steps
    assert (reference.skipped_steps > 0) == (name != "AdaGC")
    assert_same_parameters(module, {key: p.detach() for key, p in single.named_parameters()}, rtol=1e-9)
    if name == "of the whole":
        values = optimizer.state_dict()["clip_state"]["values"]
        assert_same_on_all_ranks(values)
        torch.testing.assert_close(values, reference.state_dict()["clip_state"]["values"], rtol=1e-9, atol=0)
