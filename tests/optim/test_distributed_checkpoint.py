"""What torch's state-dict helpers ask of an optimiser, in one process: states without a step, policies' memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradfast
from gradfast import clip
from gradfast.optim import OptimizerState

dcp = pytest.importorskip("torch.distributed.checkpoint")
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

POLICIES = [
    clip.GlobalNorm(0.5),
    clip.ZClip(warmup=3),
    clip.AutoClip(50, 4),
    clip.SkipSpikes(6.0, 8),
    clip.PerParameterNorm(0.1),
    clip.AdaGC(warmup=2, beta=0.5),
    clip.Value(0.01),
    clip.AGC(0.1),
    clip.Chain(clip.SkipSpikes(6.0, 8), clip.ZClip(warmup=3), clip.AdaGC(warmup=2)),
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def train(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        inputs = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        loss = module(inputs.to(next(module.parameters()).dtype)).pow(2).sum() * (1 + step % 3)
        loss.backward()
        optimizer.step()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "gradfast"]


def memory(optimizer: Any) -> Tensor:
    return optimizer.state_dict()["clip_state"]["values"]


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "l1": 0.01}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True}),
    ("AdamW", {"weight_decay": 0.1, "l1": 0.01}),
    ("Lion", {"weight_decay": 0.1}),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_states_are_made_without_a_step(name: str, options: dict[str, Any], policy: clip.Policy) -> None:
    """A run whose optimiser was asked for its states before its first step is the run that was not, to the bit."""
    ours, plain = model(), model()
    optimizer = getattr(gradfast, name)(ours.parameters(), lr=0.05, clip=policy, **options)
    other = getattr(gradfast, name)(plain.parameters(), lr=0.05, clip=policy, **options)
    called: list[str] = []
    optimizer.register_step_post_hook(lambda *_: called.append("stepped"))
    states = get_optimizer_state_dict(ours, optimizer)
    assert not called, "no step, no hook"
    assert optimizer.skipped_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    needs_states = name != "SGD" or options.get("momentum")
    assert bool(states["state"]) == bool(needs_states)
    for entries in states["state"].values():
        assert all(isinstance(value, Tensor) and not value.any() for value in entries.values()), entries
    if "clip_state" in optimizer.state_dict():
        assert not memory(optimizer).any()
    train(ours, optimizer, 0, 6)
    train(plain, other, 0, 6)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    if "clip_state" in optimizer.state_dict():
        assert torch.equal(memory(optimizer), memory(other))


def test_in_the_middle_of_a_run_without_states() -> None:
    """SGD without momentum never has a state: torch asks for a step whenever there is no gradient."""
    ours, plain = model(), model()
    optimizer = gradfast.SGD(ours.parameters(), lr=0.05, clip=clip.ZClip(warmup=2), weight_decay=0.1)
    other = gradfast.SGD(plain.parameters(), lr=0.05, clip=clip.ZClip(warmup=2), weight_decay=0.1)
    train(plain, other, 0, 8)
    for step in range(8):
        train(ours, optimizer, step, step + 1)
        norm = optimizer.grad_norm.clone()
        optimizer.zero_grad()
        get_optimizer_state_dict(ours, optimizer)
        assert torch.equal(optimizer.grad_norm, norm), "still that of the last step"
    assert torch.equal(memory(optimizer), memory(other))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}])
def test_narrow_parameters(options: dict[str, Any]) -> None:
    runs = []
    for asked in (False, True):
        module = model().bfloat16()
        optimizer = gradfast.SGD(module.parameters(), lr=0.05, momentum=0.9, dampening=0.5, **options)
        if asked:
            states = get_optimizer_state_dict(module, optimizer)["state"]
            assert all(isinstance(value, Tensor) for entries in states.values() for value in entries.values())
        train(module, optimizer, 0, 5)
        runs.append(list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_rate_of_zero_is_a_step_like_any_other() -> None:
    """A warm-up that begins at zero: moments and policies take their first sample."""
    module = model()
    optimizer = gradfast.AdamW(module.parameters(), lr=0.0, clip=clip.AutoClip(50, 4))
    train(module, optimizer, 0, 1)
    assert memory(optimizer)[0] == 1
    assert all(entries["step"] == 1 and entries["exp_avg"].any() for entries in optimizer.state.values())


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("flatten", [False, True])
def test_policies_go_on_to_the_bit(
    flatten: bool, policy: clip.Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def fresh() -> tuple[nn.Module, gradfast.AdamW]:
        module = model()
        return module, gradfast.AdamW(module.parameters(), lr=0.05, clip=policy)

    module, optimizer = fresh()
    train(module, optimizer, 0, 5)
    weights = copy.deepcopy(module.state_dict())
    dcp.save({"optimizer": OptimizerState(module, optimizer, options)}, checkpoint_id=tmp_path, no_dist=True)
    train(module, optimizer, 5, 9)

    other, resumed = fresh()
    other.load_state_dict(weights)
    dcp.load({"optimizer": OptimizerState(other, resumed, options)}, checkpoint_id=tmp_path, no_dist=True)
    assert not said(caplog)
    train(other, resumed, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    if "clip_state" in optimizer.state_dict():
        assert torch.equal(memory(optimizer), memory(resumed))


def test_torchs_helpers_read_it_and_say_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    optimizer = gradfast.AdamW(module.parameters(), lr=0.05, clip=clip.ZClip(warmup=2))
    train(module, optimizer, 0, 5)
    dcp.save({"optimizer": OptimizerState(module, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    for theirs in (torch.optim.AdamW(module.parameters()), optimizer):
        states = {"optimizer": get_optimizer_state_dict(module, theirs)}
        dcp.load(states, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(module, theirs, states["optimizer"])
        assert all(entries["step"] == 5 for entries in theirs.state.values())
    assert said(caplog) == [
        f"{optimizer.clip!r} begins anew: what is loaded says nothing of clip policies. torch.distributed.checkpoint's "
        "helpers leave their state out; gradfast.optim.OptimizerState saves and loads it, too"
    ]
    assert not memory(optimizer).any()


def test_refusals() -> None:
    module = model()
    with pytest.raises(TypeError, match="of gradfast, got AdamW"):
        OptimizerState(module, torch.optim.AdamW(module.parameters()))
    with pytest.raises(ValueError, match="leave out full_state_dict"):
        OptimizerState(module, gradfast.SGD(module.parameters()), StateDictOptions(full_state_dict=True))
