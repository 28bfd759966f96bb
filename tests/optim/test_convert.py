"""from_torch: the optimiser goes on where torch's stood, with its groups, states, hooks and schedulers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from optim.pairs import Twins
from torch.optim import lr_scheduler

import gradfast

OPTIONS = {
    "SGD": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
    "Adam": {"amsgrad": True, "betas": (0.8, 0.95)},
    "AdamW": {"maximize": True},
}
GROUPS = [([(3, 4), ()], {}), ([(5,)], {"weight_decay": 0.3, "lr": 0.02, "mine": "kept"})]


@pytest.mark.parametrize("kind", [{"foreach": False}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_goes_on_as_torch_would(name: str, steps: int, kind: dict) -> None:
    twins = Twins(name, groups=GROUPS, lr=0.1, **OPTIONS[name])
    old = Twins.make(torch.optim, name, twins.ours, GROUPS, {"lr": 0.1, **OPTIONS[name], **kind})
    twins.fast = old
    twins.step(steps)
    twins.fast = gradfast.from_torch(old, nonfinite="raise")
    assert type(twins.fast) is getattr(gradfast, name)
    assert twins.fast.nonfinite == "raise"
    assert twins.fast.param_groups[1]["mine"] == "kept"
    for group, former in zip(twins.fast.param_groups, old.param_groups, strict=True):
        assert group is former
        for parameter in group["params"]:
            for key, value in old.state.get(parameter, {}).items():
                assert twins.fast.state[parameter][key] is value
    twins.step(4)
    twins.check()


def test_clips_names_and_decays() -> None:
    named = [("layer.weight", torch.zeros(2)), ("layer.bias", torch.zeros(1))]
    optimizer = gradfast.from_torch(torch.optim.SGD(named, lr=1.0), max_norm=5.0, l1=0.0)
    for _, parameter in named:
        parameter.grad = torch.full_like(parameter, 10.0)
    optimizer.step()
    assert optimizer.clip_coef.item() == pytest.approx(5 / 300**0.5)
    assert list(optimizer.grad_norms()) == ["layer.weight", "layer.bias"]
    assert "l1" not in optimizer.param_groups[0]
    optimizer.add_param_group({"params": [("head", torch.zeros(1))], "lr": 0.5})
    optimizer.step()


def test_hooks_travel_and_get_the_new_optimiser() -> None:
    old = torch.optim.Adam([torch.zeros(1)])
    seen: list = []
    old.register_step_pre_hook(lambda o, *_: seen.append(("before", o)))
    handle = old.register_step_post_hook(lambda o, *_: seen.append(("after", o)))
    old.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    new = gradfast.from_torch(old)
    new.step()
    assert seen == [("before", new), ("after", new)]
    assert new.state_dict()["note"] == 1
    del handle


def schedule(kind: str, optimizer: torch.optim.Optimizer) -> object:
    if kind == "Sequential":
        parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.8)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])
    if kind == "OneCycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=12)
    if kind == "Plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", ["Sequential", "OneCycle", "Plateau", "Cosine"])
def test_schedulers_drive_the_new_optimiser(kind: str, steps: int, handed_over: bool, tensor_lr: bool) -> None:
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    twins = Twins("SGD", lr=lr, momentum=0.9)
    twins.fast = old = Twins.make(
        torch.optim, "SGD", twins.ours, [((), {})], {"lr": copy.deepcopy(lr), "momentum": 0.9, "foreach": False}
    )
    schedules = [schedule(kind, optimizer) for optimizer in twins.optimizers]

    def train(steps: int) -> None:
        for _ in range(steps):
            twins.step()
            for scheduler in schedules:
                scheduler.step(1.0) if kind == "Plateau" else scheduler.step()

    train(steps)
    twins.fast = gradfast.from_torch(old, schedulers=schedules[0] if handed_over else None)
    if handed_over:
        assert schedules[0].optimizer is twins.fast
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(5)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it watches the old one for step(): the documented price
            train(5)
    twins.check()
    assert twins.fast.param_groups[0]["lr"] == twins.oracle.param_groups[0]["lr"]


def test_scheduler_handed_over_still_warns_of_the_wrong_order() -> None:
    old = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = lr_scheduler.StepLR(old, 1)
    gradfast.from_torch(old, schedulers=[scheduler])
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


class Mine(torch.optim.SGD):
    """A user's own way to step."""


@pytest.mark.parametrize(
    ("optimizer", "settings", "error", "message"),
    [
        (
            torch.optim.RMSprop([torch.zeros(1)]),
            {},
            TypeError,
            r"rmsprop\.RMSprop cannot be converted.*clip_grad_norm_",
        ),
        (Mine([torch.zeros(1)]), {}, TypeError, "Mine cannot be converted"),
        (gradfast.SGD([torch.zeros(1)]), {}, TypeError, "already"),
        (torch.optim.SGD([torch.zeros(1)], differentiable=True), {}, ValueError, r"\[0\].*differentiable"),
        (torch.optim.SGD([torch.zeros(1)]), {"max_norm": -1.0}, ValueError, "max_norm"),
        (torch.optim.SGD([torch.zeros(1)]), {"momentum_decay": 1}, TypeError, "momentum_decay"),
    ],
    ids=["another kind", "subclass", "ours", "differentiable", "max_norm", "unknown"],
)
def test_what_cannot_be_converted_says_so(
    optimizer: torch.optim.Optimizer, settings: dict, error: type[Exception], message: str
) -> None:
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        gradfast.from_torch(optimizer, **settings)
    assert optimizer.state_dict() == before


def test_scheduler_of_another_optimiser_is_refused() -> None:
    one, two = (torch.optim.SGD([torch.zeros(1)], lr=0.1) for _ in range(2))
    with pytest.raises(ValueError, match="StepLR belongs to another optimizer"):
        gradfast.from_torch(one, schedulers=lr_scheduler.StepLR(two, 1))
