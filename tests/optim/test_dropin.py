"""What a user of torch.optim expects around the step: groups, one global norm, errors, reports."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import gradfast

NAMES = ["SGD", "Adam", "AdamW"]


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
