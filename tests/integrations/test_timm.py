"""timm: gradfast from its factory, with decay left off biases and norms, in the loop of its train script."""

from __future__ import annotations

import pytest
import torch

import gradfast

timm = pytest.importorskip("timm")
from gradfast.integrations.timm import register  # noqa: E402


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Lion"])
def test_factory_makes_ours_with_its_options(name: str) -> None:
    assert f"gradfast{name.lower()}" in register()
    register()  # twice does no harm
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = timm.optim.create_optimizer_v2(
        model, opt=f"gradfast{name.lower()}", lr=0.1, weight_decay=0.05, momentum=0.8, max_norm=0.5, l1=0.01
    )
    assert type(optimizer) is getattr(gradfast, name)
    assert optimizer.max_norm == 0.5
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.05]
    assert all(group["lr"] == 0.1 and group["l1"] == 0.01 for group in optimizer.param_groups)
    if name == "SGD":
        assert all(group["momentum"] == 0.8 and group["nesterov"] for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw"])
def test_from_torch_takes_what_the_factory_makes(kind: str) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = gradfast.from_torch(timm.optim.create_optimizer_v2(model, opt=kind, lr=0.1), max_norm=1.0)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.clip_coef.item() < 1.0


def test_native_scaler_unscales_and_clips_in_the_step() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = gradfast.SGD([parameter], lr=1.0, max_norm=5.0)
    scaler = timm.utils.NativeScaler(device="cpu")
    scaler((parameter * torch.tensor([6.0, 8.0])).sum(), optimizer)
    assert parameter.tolist() == pytest.approx([-3.0, -4.0], rel=1e-6)
    assert optimizer.grad_norm.item() == 10.0


def test_example(example: object) -> None:
    losses, optimizer = example("timm_loop").main()
    assert losses[-1] < losses[0] / 2
    assert isinstance(optimizer, gradfast.AdamW)
