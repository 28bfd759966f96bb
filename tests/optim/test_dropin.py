"""What a user of torch.optim expects around the step: checkpoints, groups, hooks, copies, errors, reports."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import Tensor

import gradfast

NAMES = ["SGD", "Adam", "AdamW"]
OPTIONS = {"SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}, "AdamW": {}}


def train(optimizer: torch.optim.Optimizer, parameters: list[Tensor], seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()


def fresh() -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 5), (3,), (2, 2, 2))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("source", "target"), [(torch.optim, gradfast), (gradfast, torch.optim), (gradfast, gradfast)])
def test_checkpoints_go_both_ways(name: str, source: object, target: object) -> None:
    straight = fresh()
    reference = getattr(torch.optim, name)(straight, lr=0.05, foreach=False, **OPTIONS[name])
    train(reference, straight, seed=1)
    train(reference, straight, seed=2)

    first = fresh()
    before = getattr(source, name)(first, lr=0.05, **OPTIONS[name])
    train(before, first, seed=1)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    second = [p.clone() for p in first]
    after = getattr(target, name)(second, lr=0.9, **OPTIONS[name])
    after.load_state_dict(torch.load(file, weights_only=True))
    train(after, second, seed=2)
    for mine, other in zip(second, straight, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_and_pickle_go_on_alike(name: str) -> None:
    parameters = fresh()
    optimizer = getattr(gradfast, name)(parameters, lr=0.05, max_norm=0.5, nonfinite="raise", l1=0.01, **OPTIONS[name])
    train(optimizer, parameters, seed=1)
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (clone.max_norm, clone.nonfinite) == (0.5, "raise")
        assert clone.param_groups[0]["l1"] == 0.01
        twins = clone.param_groups[0]["params"]
        train(clone, twins, seed=2)
    train(optimizer, parameters, seed=2)
    for mine, other in zip(parameters, twins, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_late_frozen_and_missing_gradients(name: str) -> None:
    ours, theirs = fresh(), fresh()
    fast = getattr(gradfast, name)(ours, lr=0.05, **OPTIONS[name])
    oracle = getattr(torch.optim, name)(theirs, lr=0.05, foreach=False, **OPTIONS[name])
    present = [(0,), (0, 1), (), (1,), (0, 1, 2), (2,)]
    for step, active in enumerate(present):
        for index in range(3):
            gradient = torch.full_like(ours[index], 0.1 * (step + 1)) if index in active else None
            ours[index].grad = gradient
            theirs[index].grad = None if gradient is None else gradient.clone()
        fast.step()
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_groups_with_their_own_rules_and_one_global_norm() -> None:
    a, b, c = (torch.zeros(1, dtype=torch.float64) for _ in range(3))
    optimizer = gradfast.SGD([{"params": [a]}, {"params": [b], "momentum": 0.9, "lr": 0.1}], lr=1.0, max_norm=5.0)
    optimizer.add_param_group({"params": [c], "weight_decay": 0.5, "lr": 0.01})
    for parameter, value in ((a, 6.0), (b, 8.0), (c, 0.0)):
        parameter.grad = torch.full((1,), value, dtype=torch.float64)
    optimizer.step()
    scale = 5.0 / (10.0 + 1e-6)
    assert a.item() == pytest.approx(-6 * scale, rel=1e-14)
    assert b.item() == pytest.approx(-0.8 * scale, rel=1e-14)
    assert c.item() == 0.0
    assert optimizer.grad_norm.item() == 10.0
    assert optimizer.clip_coef.item() == pytest.approx(scale, rel=1e-14)
    assert {k: v.item() for k, v in optimizer.grad_norms().items()} == {
        "param_groups[0]['params'][0]": 6.0,
        "param_groups[1]['params'][0]": 8.0,
        "param_groups[2]['params'][0]": 0.0,
    }


def test_gradients_are_left_as_backward_wrote_them() -> None:
    parameter = torch.ones(1000)
    parameter.grad = torch.randn(1000)
    before = parameter.grad.clone()
    gradfast.AdamW([parameter], max_norm=1e-3).step()
    assert torch.equal(parameter.grad, before)


def test_l1_by_hand() -> None:
    coupled = torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64)
    coupled.grad = torch.zeros(3, dtype=torch.float64)
    gradfast.SGD([coupled], lr=0.1, l1=0.5).step()
    assert coupled.tolist() == pytest.approx([1.95, -2.95, 0.0], abs=1e-15)
    proximal = torch.tensor([2.0, -0.01, 0.0], dtype=torch.float64)
    proximal.grad = torch.zeros(3, dtype=torch.float64)
    gradfast.AdamW([proximal], lr=0.1, l1=0.5, weight_decay=0.0).step()
    assert proximal.tolist() == pytest.approx([1.95, 0.0, 0.0], abs=1e-15)


def test_state_moved_or_replaced_by_the_user_is_seen() -> None:
    parameter = torch.zeros(3, dtype=torch.float64)
    parameter.grad = torch.ones(3, dtype=torch.float64)
    optimizer = gradfast.SGD([parameter], lr=1.0, momentum=0.5)
    optimizer.step()
    optimizer.state[parameter]["momentum_buffer"] = torch.full((3,), 10.0, dtype=torch.float64)
    optimizer.step()
    assert parameter.tolist() == [-7.0] * 3  # -1, then -(0.5 * 10 + 1)
    optimizer.state.clear()
    optimizer.step()
    assert parameter.tolist() == [-8.0] * 3


def test_closure_hooks_and_versions() -> None:
    parameter = torch.ones(2, requires_grad=True)
    optimizer = gradfast.SGD([parameter], lr=0.5)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        seen.append("closure")
        return loss

    version = parameter._version
    assert optimizer.step(closure).item() == 2.0
    assert seen == ["before", "closure", "after"]
    assert parameter._version > version
    assert parameter.tolist() == [0.0, 0.0]


def test_scheduler_with_tensor_lr() -> None:
    ours, theirs = fresh(), fresh()
    fast = gradfast.Adam(ours, lr=torch.tensor(0.1, dtype=torch.float64))
    oracle = torch.optim.Adam(theirs, lr=torch.tensor(0.1, dtype=torch.float64), foreach=False)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (fast, oracle)]
    for seed in range(4):
        train(fast, ours, seed, steps=1)
        train(oracle, theirs, seed, steps=1)
        for schedule in schedules:
            schedule.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_signature_extends_torchs(name: str) -> None:
    theirs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    ours = inspect.signature(getattr(gradfast, name).__init__).parameters
    assert set(theirs) <= set(ours)
    for key, parameter in theirs.items():
        assert ours[key].default == parameter.default, key
        assert ours[key].kind == parameter.kind, key
    assert issubclass(getattr(gradfast, name), getattr(torch.optim, name))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_norm": 0.0}, ValueError, "max_norm"),
        ({"max_norm": float("nan")}, ValueError, "max_norm"),
        ({"norm_type": 0.5}, ValueError, "norm_type"),
        ({"l1": -1.0}, ValueError, "l1"),
        ({"nonfinite": "ignore"}, ValueError, "skip, propagate, raise"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"differentiable": True}, RuntimeError, "differentiable"),
        ({"foreach": True, "fused": True}, RuntimeError, "together"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_options_are_refused(name: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(gradfast, name)([torch.ones(1)], **options)


def test_what_cannot_be_stepped_is_named() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(NotImplementedError, match=r"weight.*sparse=False"):
        gradfast.SGD(embedding.named_parameters(), lr=0.1).step()
    before = torch.ones(3)
    before.grad = torch.ones(3)
    optimizer = gradfast.Adam([("layer.bias", before)], lr=0.1)
    optimizer.step()
    optimizer.state[before]["exp_avg"] = torch.zeros(4)
    value = before.clone()
    with pytest.raises(ValueError, match=r"exp_avg.*layer\.bias.*\[4\].*\[3\]"):
        optimizer.step()
    assert torch.equal(before, value)


def test_reports_before_the_first_step() -> None:
    optimizer = gradfast.SGD([torch.ones(1)], lr=0.1)
    assert optimizer.skipped_steps == 0
    with pytest.raises(RuntimeError, match="before the first step"):
        _ = optimizer.grad_norm


@pytest.mark.parametrize("fused", [True, False, None])
def test_grad_scaler_unscales_and_skips(fused: bool | None) -> None:
    parameter = torch.zeros(2)
    optimizer = gradfast.SGD([parameter], lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))  # starts the scaler
    parameter.grad = torch.tensor([1024.0, 2048.0])
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [-1.0, -2.0]
    parameter.grad = torch.tensor([float("inf"), 0.0])
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [-1.0, -2.0]
    assert scaler.get_scale() == 512.0
