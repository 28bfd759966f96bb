"""Every scheduler of torch.optim.lr_scheduler, and swa_utils, drive gradfast as they drive torch."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from optim.pairs import Twins
from torch.optim import lr_scheduler, swa_utils

import gradfast

SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.95},
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 5]},
    "ConstantLR": {"total_iters": 4},
    "LinearLR": {"total_iters": 6},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 8, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 6},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.3, "total_steps": 12},
    "ReduceLROnPlateau": {"patience": 1, "factor": 0.5},
    "SequentialLR": {},
    "ChainedScheduler": {},
    "SWALR": {"swa_lr": 0.05, "anneal_epochs": 4},
}
OPTIONS = {"SGD": {"momentum": 0.9}, "Adam": {}, "AdamW": {"amsgrad": True}}


def make(name: str, optimizer: torch.optim.Optimizer) -> object:
    if name == "SequentialLR":
        parts = [lr_scheduler.ConstantLR(optimizer, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(optimizer, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        )
    return (swa_utils if name == "SWALR" else lr_scheduler).__dict__[name](optimizer, **SCHEDULERS[name])


def test_no_scheduler_of_torch_is_left_out() -> None:
    found = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler", "Optimizer"} <= set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("optimizer", OPTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_rates_and_weights(name: str, optimizer: str, tensor_lr: bool) -> None:
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    twins = Twins(optimizer, groups=[([(3, 4)], {}), ([(5,)], {"lr": 0.02})], lr=lr, **OPTIONS[optimizer])
    schedules = [make(name, optimizer) for optimizer in twins.optimizers]
    rate = twins.fast.param_groups[0]["lr"]
    for step in range(11):
        twins.step()
        for schedule in schedules:
            schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
        mine, other = (o.param_groups for o in twins.optimizers)
        for key in ("lr", "momentum", "betas"):
            assert [group.get(key) for group in mine] == [group.get(key) for group in other], (step, key)
    if tensor_lr:
        assert twins.fast.param_groups[0]["lr"] is rate  # written in place, as for torch
    twins.check()


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in ("ChainedScheduler", "SequentialLR")])
def test_scheduler_resumes_from_its_checkpoint(name: str) -> None:
    """Optimiser and scheduler, saved mid-way and loaded into new ones, go on as if nothing had happened."""
    twins = Twins("SGD", lr=0.1, momentum=0.9)
    schedules = [make(name, optimizer) for optimizer in twins.optimizers]
    step = (lambda s: s.step(1.0)) if name == "ReduceLROnPlateau" else (lambda s: s.step())
    for _ in range(4):
        twins.step()
        for schedule in schedules:
            step(schedule)
    saved = copy.deepcopy(twins.fast.state_dict()), schedules[0].state_dict()
    twins.fast = gradfast.SGD(twins.ours[0], lr=0.7, momentum=0.1)
    schedules[0] = make(name, twins.fast)
    twins.fast.load_state_dict(saved[0])
    schedules[0].load_state_dict(saved[1])
    for _ in range(6):
        twins.step()
        for schedule in schedules:
            step(schedule)
    twins.check()


def test_scheduler_warns_if_it_is_stepped_first() -> None:
    optimizer = gradfast.SGD([torch.ones(1)], lr=0.1)
    schedule = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()
    optimizer = gradfast.SGD([torch.ones(1)], lr=0.1)
    schedule = lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()


def test_weight_averaging() -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    averages = [swa_utils.AveragedModel(model) for model in models]
    optimizers = [gradfast.SGD(models[0].parameters(), lr=0.1), torch.optim.SGD(models[1].parameters(), lr=0.1)]
    inputs = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(5):
        for model, average, optimizer in zip(models, averages, optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).pow(2).sum().backward()
            optimizer.step()
            average.update_parameters(model)
    for average in averages:
        swa_utils.update_bn([inputs], average)
    for mine, other in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
