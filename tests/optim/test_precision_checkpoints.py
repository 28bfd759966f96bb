"""Checkpoints of 16-bit parameters: to the bit, to torch and back."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from optim.narrow import OPTIMIZERS, assert_same, give_gradients, parameters, train

import gradfast

KEPT = [
    {"master_weights": True},
    {"stochastic_rounding": True},
    {"stochastic_rounding": True, "state_dtype": torch.bfloat16},
    {"master_weights": True, "state_dtype": torch.bfloat16},
    {"state_dtype": torch.float32},
]


@pytest.mark.parametrize("options", KEPT)
@pytest.mark.parametrize(("name", "extra"), OPTIMIZERS)
def test_resumed_run_is_the_uninterrupted_one(name: str, extra: dict, options: dict) -> None:
    straight = parameters(torch.bfloat16)
    uninterrupted = getattr(gradfast, name)(straight, **extra, **options)
    train(uninterrupted, straight, torch.bfloat16, range(6))

    first = parameters(torch.bfloat16)
    before = getattr(gradfast, name)(first, **extra, **options)
    train(before, first, torch.bfloat16, range(3))
    file = io.BytesIO()
    torch.save({"model": [p.detach() for p in first], "optimizer": before.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    for entries in checkpoint["optimizer"]["state"].values():
        assert all(value is None or value.dtype == torch.float32 for value in entries.values())
    second = [p.requires_grad_() for p in checkpoint["model"]]
    after = getattr(gradfast, name)(second, **{**extra, "lr": 9.0}, **options)
    after.load_state_dict(checkpoint["optimizer"])
    train(after, second, torch.bfloat16, range(3, 6))
    for mine, other in zip(second, straight, strict=True):
        assert_same(mine.detach(), other.detach())
        assert_same(dict(after.state[mine]), dict(uninterrupted.state[other]))
    for clone in (copy.deepcopy(uninterrupted), pickle.loads(pickle.dumps(uninterrupted))):
        assert clone.precision == uninterrupted.precision


@pytest.mark.parametrize("options", KEPT)
@pytest.mark.parametrize(("name", "extra"), [(n, e) for n, e in OPTIMIZERS if n != "Lion"])
def test_checkpoints_go_to_torch_and_back(name: str, extra: dict, options: dict) -> None:
    ours = parameters(torch.bfloat16)
    optimizer = getattr(gradfast, name)(ours, **extra, **options)
    train(optimizer, ours, torch.bfloat16, range(3))
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    foreign = getattr(torch.optim, name)(theirs, **extra)
    foreign.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(foreign, theirs, torch.bfloat16, range(3, 4))  # torch goes on in bf16
    back = [p.detach().clone().requires_grad_() for p in theirs]
    again = getattr(gradfast, name)(back, **extra, **options)
    again.load_state_dict(copy.deepcopy(foreign.state_dict()))
    for mine, other in zip(back, theirs, strict=True):
        for key, value in foreign.state[other].items():
            if key != "master_param" and torch.is_tensor(value):
                assert_same(again.state[mine][key].float(), value.float())
    train(again, back, torch.bfloat16, range(4, 5))


def test_a_torch_checkpoint_resumes_with_masters_made_of_the_parameters() -> None:
    theirs = parameters(torch.bfloat16)
    foreign = torch.optim.AdamW(theirs, lr=0.01)
    train(foreign, theirs, torch.bfloat16, range(3))
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    optimizer = gradfast.AdamW(ours, lr=0.01, master_weights=True)
    optimizer.load_state_dict(copy.deepcopy(foreign.state_dict()))
    full = [p.detach().float() for p in ours]
    reference = torch.optim.AdamW(full, lr=0.01, foreach=False)
    reference.load_state_dict(copy.deepcopy(foreign.state_dict()))
    train(optimizer, ours, torch.bfloat16, range(3, 6))
    train(reference, full, torch.bfloat16, range(3, 6))
    for mine, other in zip(ours, full, strict=True):
        torch.testing.assert_close(optimizer.state[mine]["master_param"], other, rtol=2.0**-20, atol=2.0**-22)


@pytest.mark.parametrize("options", KEPT)
def test_a_torch_optimizer_is_turned_into_ours_with_its_states_in_their_new_dtype(options: dict) -> None:
    ours = parameters(torch.bfloat16)
    foreign = torch.optim.SGD(ours, lr=0.05, momentum=0.9)
    train(foreign, ours, torch.bfloat16, range(3))
    before = [foreign.state[p]["momentum_buffer"].clone() for p in ours]
    optimizer = gradfast.from_torch(foreign, max_norm=None, **options)
    give_gradients(ours, 3, torch.bfloat16)
    optimizer.step()
    for parameter, momentum in zip(ours, before, strict=True):
        found = optimizer.state[parameter]["momentum_buffer"]
        assert found.dtype == options.get("state_dtype", torch.float32)
        exact = 0.9 * momentum.double() + parameter.grad.double()
        unit = 2.0**-7 if found.dtype == torch.bfloat16 else 2.0**-22
        torch.testing.assert_close(found.double(), exact, rtol=unit, atol=unit)


def test_without_the_option_a_checkpoint_with_masters_leaves_none_behind() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = gradfast.AdamW(ours, lr=0.01, master_weights=True)
    train(optimizer, ours, torch.bfloat16, range(2))
    plain = gradfast.AdamW(ours, lr=0.01)
    plain.load_state_dict(optimizer.state_dict())
    assert all("master_param" not in entries for entries in plain.state.values())
    assert plain.state[ours[2]]["exp_avg"].dtype == torch.bfloat16
    train(plain, ours, torch.bfloat16, range(2, 3))


def test_momentum_that_no_step_has_filled_is_saved_as_none() -> None:
    """So that dampening starts with the first update, in torch as here."""
    parameter = torch.ones(3, dtype=torch.bfloat16)
    parameter.grad = torch.full_like(parameter, math.nan)
    optimizer = gradfast.SGD(
        [parameter], lr=1.0, momentum=0.9, dampening=0.5, state_dtype=torch.bfloat16, nonfinite="skip"
    )
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["momentum_buffer"] is None


def test_users_hooks_see_the_finished_state() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = gradfast.AdamW(ours, lr=0.01, master_weights=True)
    train(optimizer, ours, torch.bfloat16, range(1))
    saved = optimizer.state_dict()
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, given: {**given, "state": dict(given["state"])})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[ours[2]]["exp_avg"].dtype))
    optimizer.load_state_dict(saved)
    assert seen == [torch.float32]
