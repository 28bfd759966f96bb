"""state_dict both ways: what torch saved resumes in gradfast and back, to 1e-12, whenever it was saved and however."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from optim.pairs import Twins
from torch import Tensor

import gradfast

NAMES = ["SGD", "Adam", "AdamW"]
OPTIONS = {"SGD": {"momentum": 0.9, "dampening": 0.2}, "Adam": {"amsgrad": True}, "AdamW": {}}
GROUPS = [([(3, 4), ()], {}), ([(5,), (0,)], {"weight_decay": 0.3, "lr": 0.02})]
WAYS = [(torch.optim, gradfast), (gradfast, torch.optim), (gradfast, gradfast)]


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(twins: Twins, source: object, target: object, name: str, steps: int, partly: bool = False, **more: object):
    """Train `source` alone for some steps, go on with `target`; the other twin is torch all the way."""
    options = {"lr": 0.05, **OPTIONS[name], **more}
    foreach = {} if source is gradfast else {"foreach": False}
    twins.fast = Twins.make(source, name, twins.ours, GROUPS, {**options, **foreach})
    twins.step(steps, without=(1, 2) if partly else ())
    saved = through_a_file(twins.fast.state_dict())
    foreach = {} if target is gradfast else {"foreach": False}
    twins.fast = Twins.make(target, name, twins.ours, GROUPS, {"lr": 0.9, **foreach})
    twins.fast.load_state_dict(saved)
    twins.step(4, without=(0,))
    twins.step(3)


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize(("source", "target"), WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_resumes_to_the_same_weights(name: str, source: object, target: object, steps: int, partly: bool) -> None:
    twins = Twins(name, groups=GROUPS, lr=0.05, **OPTIONS[name])
    resume(twins, source, target, name, steps, partly)
    twins.check()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"capturable": True}])
@pytest.mark.parametrize(("source", "target"), [(torch.optim, gradfast), (gradfast, torch.optim)])
def test_checkpoints_on_cuda(source: object, target: object, kind: dict) -> None:
    """There torch keeps Adam's step count on the CPU, or with `fused` and `capturable` on the device."""
    parameters = [torch.ones(5, dtype=torch.float64, device="cuda") for _ in range(2)]
    first = [m.AdamW([p], lr=0.1, **kind) for m, p in zip((source, torch.optim), parameters, strict=True)]
    for optimizer, parameter in zip(first, parameters, strict=True):
        parameter.grad = torch.arange(5.0, dtype=torch.float64, device="cuda")
        optimizer.step()
    second = target.AdamW(parameters[:1], lr=0.9, **kind)
    second.load_state_dict(through_a_file(first[0].state_dict()))
    for optimizer in (second, first[1]):
        optimizer.step()
    # With capturable torch corrects the bias in float32, since the count of steps is a tensor of that.
    tolerance = 1e-6 if "capturable" in kind else 1e-12
    torch.testing.assert_close(parameters[0], parameters[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_torchs_other_implementations(name: str, kind: dict) -> None:
    twins = Twins(name, groups=GROUPS[:1], lr=0.05, **OPTIONS[name])
    twins.fast = Twins.make(torch.optim, name, twins.ours, GROUPS[:1], {"lr": 0.05, **OPTIONS[name], **kind})
    twins.step(3)
    saved = through_a_file(twins.fast.state_dict())
    twins.fast = getattr(gradfast, name)(twins.ours[0], max_norm=1e9)
    twins.fast.load_state_dict(saved)
    twins.step(3)
    twins.check()


def test_step_count_saved_as_a_number_by_old_torch() -> None:
    twins = Twins("Adam", lr=0.05)
    twins.step(3)
    saved = copy.deepcopy(twins.oracle.state_dict())
    for entry in saved["state"].values():
        entry["step"] = int(entry["step"])
    for group in saved["param_groups"]:  # and keys that came later
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            del group[key]
    twins.fast.load_state_dict(saved)
    twins.step(3)
    twins.check()


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_kinds_are_torchs(name: str) -> None:
    twins = Twins(name, groups=GROUPS, lr=0.05, **OPTIONS[name])
    twins.step(2)
    mine, theirs = (optimizer.state_dict() for optimizer in twins.optimizers)
    assert mine.keys() == theirs.keys()
    assert mine["state"].keys() == theirs["state"].keys()
    for index, entries in theirs["state"].items():
        assert list(mine["state"][index]) == list(entries)
        for key, value in entries.items():
            found = mine["state"][index][key]
            assert (type(found), found.shape, found.dtype) == (type(value), value.shape, value.dtype), key
    for group, other in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert group | {"foreach": False} == other


def test_l1_is_saved_where_it_is_used_and_kept_where_the_checkpoint_has_none() -> None:
    def make(first: float, second: float) -> torch.optim.Optimizer:
        return gradfast.SGD([{"params": [torch.ones(1)], "l1": first}, {"params": [torch.ones(1)], "l1": second}], lr=1)

    saved = make(0.0, 0.5).state_dict()
    assert [group.get("l1") for group in saved["param_groups"]] == [None, 0.5]
    loaded = make(0.25, 0.75)
    loaded.load_state_dict(saved)
    assert [group["l1"] for group in loaded.param_groups] == [0.25, 0.5]


def test_users_keys_in_groups_travel() -> None:
    optimizer = gradfast.AdamW([{"params": [torch.ones(2)], "lr_scale": 0.5, "layer": "head"}], lr=0.1)
    saved = through_a_file(optimizer.state_dict())
    for module in (gradfast, torch.optim):
        other = module.AdamW([torch.ones(2)], lr=0.9)
        other.load_state_dict(saved)
        group = other.param_groups[0]
        assert (group["lr_scale"], group["layer"], group["lr"]) == (0.5, "head", 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_names_travel(name: str) -> None:
    named = [("a.weight", torch.ones(2)), ("a.bias", torch.ones(1))]
    saved = through_a_file(getattr(gradfast, name)(named, lr=0.1).state_dict())
    assert saved["param_groups"][0]["param_names"] == ["a.weight", "a.bias"]
    other = getattr(gradfast, name)([p for _, p in named], lr=0.1)
    other.load_state_dict(saved)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    other.step()
    assert list(other.grad_norms()) == ["a.weight", "a.bias"]


@pytest.mark.parametrize("name", NAMES)
def test_bad_checkpoints_raise_what_torch_raises(name: str) -> None:
    parameters = [torch.ones(2), torch.ones(3)]
    fitting = getattr(torch.optim, name)(parameters).state_dict()
    fewer = getattr(torch.optim, name)(parameters[:1]).state_dict()
    more = getattr(torch.optim, name)([{"params": [p]} for p in parameters]).state_dict()
    for saved in (fewer, more, {"state": {}}):
        errors = []
        for module in (torch.optim, gradfast):
            with pytest.raises((ValueError, KeyError)) as caught:
                getattr(module, name)(parameters).load_state_dict(saved)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    getattr(gradfast, name)(parameters).load_state_dict(fitting)


def test_checkpoint_of_another_shape_is_refused_at_the_step_by_name() -> None:
    """torch loads it without a word and fails in a kernel; or, where shapes broadcast, trains on."""
    source = gradfast.Adam([("w", torch.ones(1))])
    source.param_groups[0]["params"][0].grad = torch.ones(1)
    source.step()
    target = torch.ones(3)
    optimizer = gradfast.Adam([("w", target)])
    optimizer.load_state_dict(source.state_dict())
    target.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"exp_avg of 'w' has shape \[1\]"):
        optimizer.step()
    assert torch.equal(target, torch.ones(3))


def test_loading_into_an_optimiser_that_has_stepped_forgets_its_own_past() -> None:
    twins = Twins("SGD", lr=0.05, **OPTIONS["SGD"])
    saved = copy.deepcopy(twins.oracle.state_dict())  # before any step: momentum is to start undamped
    twins.step(3)
    for optimizer in twins.optimizers:
        optimizer.load_state_dict(copy.deepcopy(saved))
    twins.step(3)
    twins.check()


def test_a_checkpoint_shares_no_memory_with_the_one_who_loads_it_twice() -> None:
    parameter = torch.ones(2)
    parameter.grad = torch.ones(2)
    source = gradfast.SGD([parameter], lr=0.1, momentum=0.9)
    source.step()
    saved = copy.deepcopy(source.state_dict())
    for _ in range(2):
        source.load_state_dict(copy.deepcopy(saved))
        source.step()
        assert source.state[parameter]["momentum_buffer"].tolist() == pytest.approx([1.9, 1.9])


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_state_dict_and_load(name: str) -> None:
    optimizer = getattr(gradfast, name)([torch.ones(1)], lr=0.1)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 7})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(f"loading {state.pop('note')}"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", "loading 7", "loaded"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_distributed_checkpoint_both_ways(name: str, tmp_path: Path) -> None:
    """torch.distributed.checkpoint in one process: the state dict API, which names states by parameter."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.full((2, 3), 0.1 * (step + 1), dtype=torch.float64)).pow(2).sum().backward()
            optimizer.step()

    def weights(*modules: object) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 4).double()
        for number, module in enumerate(modules):
            optimizer = getattr(module, name)(model.parameters(), lr=0.05, **OPTIONS[name])
            if number:
                state = get_optimizer_state_dict(model, optimizer)
                checkpoint.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
                set_optimizer_state_dict(model, optimizer, state)
            train(model, optimizer, 3)
            checkpoint.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path / "saved", no_dist=True)
        return [p.detach() for p in model.parameters()]

    expected = weights(torch.optim, torch.optim)
    for way in WAYS:
        for mine, other in zip(weights(*way), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
