"""Activations swapped, dropout and stochastic depth put in, parameter groups, penalties."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from nn.models import TinyGPT, mlp
from torch import nn

import gradfast
from gradfast.nn import add_dropout, add_stochastic_depth, param_groups, replace_activation, weight_penalty

torchvision = pytest.importorskip("torchvision")


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "silu", "elu", "selu", "sigmoid", "tanh"])
def test_every_activation_goes_into_a_resnet(name: str) -> None:
    model = torchvision.models.resnet18(num_classes=3)
    keys = list(model.state_dict())
    weight = model.conv1.weight.detach().clone()
    assert replace_activation(model, name) == 9
    assert not [m for m in model.modules() if isinstance(m, nn.ReLU)] or name == "relu"
    assert list(model.state_dict()) == keys and torch.equal(model.conv1.weight, weight)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(torch.randn(2, 3, 32, 32))).all()


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("relu", 1.4142),
        ("leaky_relu", 1.4141),  # sqrt(2 / (1 + 0.01^2))
        ("gelu", 1.5335),  # 1 / sqrt(E[f(z)^2]), as of silu and elu
        ("silu", 1.6765),
        ("elu", 1.2452),
        ("selu", 1.0),
        ("sigmoid", 1.0),
        ("tanh", 1.6667),
    ],
)
def test_initialised_anew_with_the_matching_gain(name: str, gain: float) -> None:
    model = mlp(3, 256)
    assert replace_activation(model, name, init="kaiming") == 2
    assert model[0].weight.std().item() == pytest.approx(gain / 16, rel=0.02)  # of 65,536 draws: 0.3 % one sigma
    assert model[4].weight.std().item() == pytest.approx(1 / 16, rel=0.02)  # nothing follows the last


def test_gates_stay_and_options_are_passed_on() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid())
    assert replace_activation(model, "leaky_relu", negative_slope=0.2) == 1
    assert model[1].negative_slope == 0.2 and isinstance(model[3], nn.Sigmoid)
    assert replace_activation(model, "tanh", replace=("sigmoid",)) == 1
    assert isinstance(model[3], nn.Tanh)


def test_a_stack_of_sigmoids_is_swapped_whole() -> None:
    assert replace_activation(mlp(4, 4, nn.Sigmoid), "relu") == 3


def test_torch_transformer_layers_compute_the_new_activation() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    expected = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    expected.load_state_dict(layer.state_dict())
    assert replace_activation(layer, "gelu") == 1
    x = torch.randn(2, 5, 16)
    for training in (True, False):  # in eval mode torch takes a fused path, chosen by a number
        with torch.no_grad():
            torch.testing.assert_close(layer.train(training)(x), expected.train(training)(x))


def test_what_cannot_be_swapped_is_said() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'gelu'"):
        replace_activation(mlp(2, 2), "gleu")
    with pytest.raises(ValueError, match=r"F\.relu\(x\)"):
        replace_activation(TinyGPT(), "relu")


# ---------------------------------------------------------------- dropout and stochastic depth


def test_dropout_before_the_head() -> None:
    model = torchvision.models.resnet18(num_classes=1000)
    keys = list(model.state_dict())
    assert add_dropout(model, 0.5) == ["fc"]
    assert list(model.state_dict()) == keys
    nn.init.constant_(model.fc.weight, 1.0), nn.init.zeros_(model.fc.bias)
    with torch.no_grad():
        out = model.fc(torch.ones(4000, 512))[:, 0]  # 2 x Binomial(512, 1/2)
        assert out.mean().item() == pytest.approx(512, rel=0.005)  # 4000 samples of std 22.6: 0.07 %
        assert out.std().item() == pytest.approx(math.sqrt(512), rel=0.05)
        assert (model.eval().fc(torch.ones(2, 512)) == 512).all()
    assert add_dropout(model, 0.1) == ["fc"]  # a second call changes p and adds no second hook
    assert model.fc.input_dropout.p == 0.1 and len(model.fc._forward_pre_hooks) == 1


def test_dropout_everywhere_drops_channels_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    assert add_dropout(model, 0.2, "all") == ["2", "4"]
    assert isinstance(model[2].input_dropout, nn.Dropout2d) and isinstance(model[4].input_dropout, nn.Dropout)
    copy.deepcopy(model)(torch.randn(1, 3, 5, 5))  # hooks and all
    with pytest.raises(ValueError, match="'9'"):
        add_dropout(model, 0.2, ["9"])
    with pytest.raises(ValueError, match=r"1\.0"):
        add_dropout(model, 1.0)


def test_stochastic_depth_rises_linearly_and_drops_whole_branches() -> None:
    model = torchvision.models.resnet18()
    ends = add_stochastic_depth(model, 0.8)
    assert ends == [f"layer{i}.{j}.bn2" for i in (1, 2, 3, 4) for j in (0, 1)]
    rates = [model.get_submodule(name).stochastic_depth.p for name in ends]
    assert rates == pytest.approx([0.1 * number for number in range(1, 9)])
    block = model.layer1[1]
    x = torch.rand(2000, 64, 1, 1)
    with torch.no_grad():
        same = (block(x) == x).flatten(1).all(1).float().mean().item()  # relu(x + 0) = x
    assert same == pytest.approx(0.2, abs=0.04)  # 2000 coins: 0.009 one sigma


def test_stochastic_depth_needs_branches() -> None:
    with pytest.raises(ValueError, match="no residual branch"):
        add_stochastic_depth(mlp(3, 4), 0.1)


# ---------------------------------------------------------------- groups and penalties


def test_norms_and_biases_do_not_decay() -> None:
    model = torchvision.models.resnet50()
    groups = param_groups(model, 0.1, l1=1e-5)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [group["l1"] for group in groups] == [1e-5, 0.0]
    names = [[name for name, _ in group["params"]] for group in groups]
    assert len(names[0]) == 54 and len(names[1]) == 107 and "fc.bias" in names[1] and "bn1.weight" in names[1]
    optimizer = gradfast.SGD(groups, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == names[0] and "l1" not in optimizer.param_groups[1]
    assert torch.optim.AdamW(param_groups(model, 0.1)).param_groups[1]["weight_decay"] == 0.0


def test_shared_and_frozen_parameters() -> None:
    model = TinyGPT()
    model.wpe.weight.requires_grad_(False)
    decayed, exempt = param_groups(model, 0.1, decay_embeddings=False)
    names = [name for name, _ in (*decayed["params"], *exempt["params"])]
    assert "wpe.weight" not in names and len(names) == len(set(names)) and "lm_head.weight" not in names
    assert "wte.weight" in [name for name, _ in exempt["params"]]


def test_penalty_by_hand() -> None:
    """w = (1, -2): 0.5 * 3 + 0.1 / 2 * 5 = 1.75; its gradient 0.5 sign(w) + 0.1 w."""
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
    penalty = weight_penalty(layer, l1=0.5, l2=0.1)
    penalty.backward()
    assert penalty.item() == pytest.approx(1.75)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, -0.7]]))
    assert layer.bias.grad is None
