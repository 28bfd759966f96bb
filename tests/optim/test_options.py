"""Every option of torch.optim's SGD, Adam and AdamW: float64 parameters and states equal torch's over many steps."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from optim.pairs import Twins

import gradfast

NAMES = ["SGD", "Adam", "AdamW"]


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# Every combination of the options that change SGD's formula; the others one by one.
SGD = [
    {"lr": 0.05, "momentum": momentum, "dampening": dampening, "weight_decay": decay, "maximize": maximize}
    for momentum, dampening, decay, maximize in itertools.product((0, 0.9), (0, 0.4), (0, 0.01), (False, True))
]
SGD += [
    {"lr": 0.05, "momentum": momentum, "nesterov": True, "weight_decay": decay, "maximize": maximize}
    for momentum, decay, maximize in itertools.product((0.5, 0.9), (0, 0.01), (False, True))
]
SGD += [
    {"lr": 0, "momentum": 0.9},
    {"lr": 1, "momentum": 1},
    {"lr": double(0.05), "momentum": 0.9},
    {"lr": double(0.05).reshape(1)},
    {"lr": torch.tensor(0.25), "weight_decay": double(0.01)},
    {"lr": 0.05, "momentum": 0.9, "fused": True, "foreach": False},
    {"lr": 0.05, "weight_decay": -0.0},
]
ADAM = [
    {"lr": 0.01, "weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
    for decay, amsgrad, maximize in itertools.product((0, 0.1), (False, True), (False, True))
]
ADAM += [
    {"lr": 0.0},
    {"lr": 1},
    {"lr": double(0.01)},
    {"lr": double(0.01).reshape(1)},
    {"lr": double(0.01), "capturable": False, "amsgrad": True},
    {"betas": (double(0.8), double(0.95))},
    {"betas": (double(0.8).reshape(1), double(0.95).reshape(1)), "lr": double(0.01)},
    {"betas": (0.0, 0.0)},
    {"betas": (0.0, 0.99), "eps": 0},
    {"betas": (0.5, 0.5)},
    {"betas": (0.999, 0.9), "eps": 1.0},
    {"fused": True, "foreach": False},
]
CASES = [("SGD", options) for options in SGD] + [(name, options) for name in ("Adam", "AdamW") for options in ADAM]
CASES += [("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1})]


def torch_takes(name: str, options: dict) -> dict:
    """Without `fused`, which gradfast accepts and ignores, and which torch would obey."""
    return {key: value for key, value in options.items() if key != "fused"}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_float64_equals_torch_over_many_steps(name: str, options: dict) -> None:
    twins = Twins(name, **torch_takes(name, options))
    if "fused" in options:
        twins.fast = Twins.make(gradfast, name, twins.ours, [((), {})], options)
    twins.step(40)
    twins.check()


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_torch_is_in_a_case(name: str) -> None:
    known = set(inspect.signature(getattr(torch.optim, name).__init__).parameters) - {"self", "params"}
    tried = {key for case, options in CASES for key in options if case == name}
    assert known - tried <= {"differentiable", "capturable"}  # refused; and of no effect


@pytest.mark.parametrize("name", NAMES)
def test_options_of_groups(name: str) -> None:
    special = {"lr": 0.2, "weight_decay": 0.3, "maximize": True, "foreach": True}
    special |= {"momentum": 0.7, "nesterov": True} if name == "SGD" else {"betas": (0.3, 0.6), "amsgrad": True}
    twins = Twins(
        name, groups=[([(3, 4), (5,)], {}), ([(7,), ()], {**special, "foreach": False}), ([(2, 2)], {"lr": 0})]
    )
    twins.step(10)
    for optimizer in twins.optimizers:
        optimizer.add_param_group({"params": torch.arange(6, dtype=torch.float64).requires_grad_(), "lr": 0.03})
    twins.step(10)
    twins.check()


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameters_changed_between_steps(name: str) -> None:
    changes = [{"lr": 0.5}, {"weight_decay": 0.1}, {"weight_decay": 0}, {"maximize": True}, {"lr": double(0.01)}]
    changes += [{"momentum": 0.9}, {"dampening": 0.5}, {"momentum": 0}, {"dampening": 0, "momentum": 0.8}]
    changes += [{"nesterov": True}, {"betas": (0.5, 0.9)}, {"eps": 1e-3}]
    twins = Twins(name, lr=0.1)
    for change in changes:
        for optimizer in twins.optimizers:
            optimizer.param_groups[0].update({k: v for k, v in change.items() if k in optimizer.param_groups[0]})
        twins.step(3)
        twins.check()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_late_missing_and_frozen(name: str) -> None:
    twins = Twins(name, groups=[([(4, 5), (3,), (2, 2, 2), ()], {})], **({"momentum": 0.9} if name == "SGD" else {}))
    for without in [(1, 2), (0, 1, 2, 3), (2,), (), (0, 3), (1,), ()]:
        twins.step(2, without)
    for parameter in itertools.chain(*twins.pairs()):
        parameter.requires_grad_(False)
    twins.step(2)  # a frozen parameter with a gradient left over is stepped, as torch does
    for parameter in itertools.chain(*twins.pairs()[:2]):
        parameter.requires_grad_(True)
    twins.step(2, without=(2, 3))
    twins.check()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_zero_grad_and_accumulation(name: str, set_to_none: bool) -> None:
    """Gradients of two backward passes add up; zero_grad clears them either way, and momentum goes on after zeros."""
    twins = Twins(name, **({"momentum": 0.9} if name == "SGD" else {}))
    for _ in range(5):
        for optimizer in twins.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        for pair in twins.pairs():
            assert all(p.grad is None or not p.grad.any() for p in pair)
        for _ in range(2):
            inputs = torch.randn(1, generator=twins.generator, dtype=torch.float64)
            for mine, other in twins.pairs():
                ((mine * inputs) ** 2).sum().backward()
                ((other * inputs) ** 2).sum().backward()
        for optimizer in twins.optimizers:
            optimizer.step()
        if set_to_none:
            continue
        for optimizer in twins.optimizers:
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
    twins.check()


BAD = [
    {"lr": -1e-3},
    {"lr": float("nan")},
    {"lr": torch.ones(2)},
    {"lr": torch.tensor(-1.0)},
    {"lr": "fast"},
    {"lr": None},
    {"momentum": -0.1},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"weight_decay": -0.1},
    {"eps": -1e-8},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
    {"betas": (0.9, torch.tensor(0.9))},
    {"betas": (torch.ones(2) / 2, torch.ones(2) / 2)},
    {"betas": 0.9},
    {"betas": (0.9,)},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"unheard_of": 1},
]


def outcome(module: object, name: str, parameters: object, options: dict) -> tuple[type, str] | None:
    try:
        getattr(module, name)(parameters, **options)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(("name", "options"), [(n, o) for n in NAMES for o in BAD])
def test_bad_hyperparameters_raise_what_torch_raises(name: str, options: dict) -> None:
    theirs, ours = (outcome(module, name, [torch.ones(1)], options) for module in (torch.optim, gradfast))
    assert (ours and ours[0]) == (theirs and theirs[0]), (theirs, ours)
    if theirs and theirs[0] is ValueError:
        assert ours == theirs


NUMBERS = {"SGD": ["lr", "momentum", "dampening", "weight_decay"], "Adam": ["lr", "eps", "weight_decay"]}
NO_NUMBERS = ["0.1", None, [], {}, 1j, torch.ones(2)]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NUMBERS.items() for key in keys])
def test_what_is_no_number_is_refused_by_its_name(name: str, key: str, value: object) -> None:
    """Written into a group, where no constructor looks; SGD's does not look at dampening either."""
    parameter = torch.ones(2)
    parameter.grad = torch.ones(2)
    optimizer = getattr(gradfast, name)([parameter], lr=0.1)
    optimizer.param_groups[0][key] = value
    with pytest.raises(TypeError, match=f"{key}=.* is not a number"):
        optimizer.step()
    assert parameter.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [0.9, (0.9,), (0.9, "0.99"), (0.9, 0.99, 0.999), None])
def test_what_are_no_betas_is_refused_by_their_name(value: object) -> None:
    parameter = torch.ones(2)
    parameter.grad = torch.ones(2)
    optimizer = gradfast.AdamW([parameter])
    optimizer.param_groups[0]["betas"] = value
    with pytest.raises(TypeError, match=r"betas=.* is not a pair of numbers"):
        optimizer.step()


@pytest.mark.parametrize("value", [None, 0, "", [], 1, 0.5, "yes"])
@pytest.mark.parametrize(
    ("name", "key"),
    [("SGD", "maximize"), ("SGD", "nesterov"), ("AdamW", "maximize"), ("Adam", "decoupled_weight_decay")],
)
def test_flags_are_what_python_takes_for_true(name: str, key: str, value: object) -> None:
    twins = Twins(name, weight_decay=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
    for optimizer in twins.optimizers:
        optimizer.param_groups[0][key] = value
    twins.step(3)
    twins.check()


BAD_PARAMETERS = [
    [],
    torch.ones(2),
    [1.0],
    {torch.ones(1)},
    [{"params": {torch.ones(1)}}],
    [torch.ones(1, requires_grad=True) * 2],
    [("a", torch.ones(1)), torch.ones(1)],
    [{"lr": 0.1}],
]


@pytest.mark.parametrize("parameters", BAD_PARAMETERS, ids=range(len(BAD_PARAMETERS)))
@pytest.mark.parametrize("name", NAMES)
def test_bad_parameter_lists_raise_what_torch_raises(name: str, parameters: object) -> None:
    theirs, ours = (outcome(module, name, parameters, {}) for module in (torch.optim, gradfast))
    assert ours == theirs
    assert theirs is not None or isinstance(parameters, set)  # torch takes a set given directly, in whatever order


@pytest.mark.parametrize("name", NAMES)
def test_one_parameter_in_two_groups_is_refused(name: str) -> None:
    shared = torch.ones(1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        getattr(gradfast, name)([{"params": [shared]}, {"params": [shared]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        getattr(gradfast, name)([shared, shared])
