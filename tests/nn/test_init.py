"""init_model: each method against its formula, and the signal through fifty layers."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from nn.models import TinyGPT, mlp, residual_mlp
from torch import nn

import gradfast
from gradfast.nn import METHODS, ScalarAffine, init_model, replace_norms

torchvision = pytest.importorskip("torchvision")


def std(weight: torch.Tensor) -> float:
    return weight.double().std(correction=0).item()


def mean_squares(model: nn.Sequential, x: torch.Tensor) -> list[float]:
    """Mean square of what each linear layer puts out."""
    found = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                found.append(x.square().mean().item())
    return found


# ---------------------------------------------------------------- the signal through fifty layers


@pytest.mark.parametrize("method", ["kaiming", "orthogonal"])
@pytest.mark.parametrize(
    ("activation", "depth"),
    [(nn.ReLU, 50), (nn.LeakyReLU, 50), (nn.ELU, 50), (nn.SELU, 50), (nn.GELU, 12), (nn.SiLU, 8)],
)
def test_fifty_layers_keep_the_signal(activation: type[nn.Module], depth: int, method: str) -> None:
    """The mean square after 50 layers is within a factor of 8 of the first's; torch's default loses it altogether.

    Width 256: each layer's mean square fluctuates by about sqrt(5 / 256), over 50 layers by a factor exp(1) one sigma.
    Fewer layers of gelu and silu: what they let through grows with the signal, so that each fluctuation makes the next
    larger, and no gain holds a deeper stack without norms ("lsuv" does, see below).
    """
    model = mlp(depth, 256, activation)
    init_model(model, method, verbose=False)
    squares = mean_squares(model, torch.randn(256, 256))[:-1]  # the last layer's gain is 1: nothing follows it
    assert 1 / 8 < squares[-1] / squares[0] < 8, squares[-1] / squares[0]


def test_fifty_tanh_layers_neither_saturate_nor_vanish() -> None:
    model = mlp(50, 256, nn.Tanh)
    init_model(model, "xavier", verbose=False)
    squares = mean_squares(model, torch.randn(256, 256))
    assert 0.3 < squares[-2] < 3.0


def test_the_control_torch_default_loses_the_signal() -> None:
    squares = mean_squares(mlp(50, 256), torch.randn(256, 256))
    assert squares[-2] / squares[0] < 1e-2  # what is left is the biases'


def test_gradient_keeps_its_size_through_fifty_layers() -> None:
    model = mlp(50, 256)
    init_model(model, "kaiming", mode="fan_out", verbose=False)
    x = torch.randn(64, 256, requires_grad=True)
    out = model(x)
    out.backward(torch.randn_like(out))
    assert 1 / 8 < x.grad.square().mean().item() < 8


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Sigmoid])
def test_lsuv_gives_every_layer_unit_variance(activation: type[nn.Module]) -> None:
    model = mlp(50, 128, activation)
    batch = 5.0 * torch.randn(64, 128)
    report = init_model(model, "lsuv", batch=batch, verbose=False)
    x = batch
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                assert std(x) == pytest.approx(1.0, rel=1e-3)
    assert all("outputs of std 1" in layer.treatment for layer in report.layers)


def test_residual_stream_stays_bounded_without_norms() -> None:
    """L = 40 branches of variance 1/L of the stream's: (1 + 1/L)^L < e; unscaled it is 2^40."""
    model = residual_mlp(40, 128, 128)
    init_model(model, "kaiming", verbose=False)
    x = torch.randn(64, 128)
    with torch.no_grad():
        assert 1.5 < model[:-1](x).square().mean().item() / x.square().mean().item() < 4.5
    init_model(model, "kaiming", scale_residual=False, verbose=False)
    with torch.no_grad():
        assert model[:-1](x).square().mean().item() > 1e9


# ---------------------------------------------------------------- formulas on a ResNet50


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return torchvision.models.resnet50()


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def test_kaiming_on_resnet50(resnet50: nn.Module) -> None:
    """Sampling error of a std over n weights: 1 / sqrt(2n); the smallest layer here has 4096."""
    model = copy.deepcopy(resnet50)
    report = init_model(model, "kaiming", verbose=False)
    assert len(report.layers) == 54 and report.norms == 53 and not report.untouched
    block = model.layer1[1]
    assert std(block.conv2.weight) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)
    assert std(block.conv3.weight) == pytest.approx(math.sqrt(2 / 64), rel=0.03)  # relu after norm and sum
    assert std(model.fc.weight) == pytest.approx(math.sqrt(1 / 2048), rel=0.03)  # nothing after it
    init_model(model, "kaiming", mode="fan_out", verbose=False)
    assert std(model.conv1.weight) == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.03)


def test_fixup_numbers_on_resnet50(resnet50: nn.Module) -> None:
    """L = 16, m = 3: conv1 and conv2 std sqrt(2 / (k^2 c_out)) * 16^(-1/4), conv3 and the classifier 0."""
    model = copy.deepcopy(resnet50)
    assert replace_norms(model) == 53
    init_model(model, "fixup", verbose=False)
    for layer in (model.layer1, model.layer4):
        block = layer[1]
        assert std(block.conv1.weight) == pytest.approx(math.sqrt(2 / block.conv1.out_channels) / 2, rel=0.03)
        assert std(block.conv2.weight) == pytest.approx(math.sqrt(2 / (9 * block.conv2.out_channels)) / 2, rel=0.03)
        assert not block.conv3.weight.any()
        assert isinstance(block.bn3, ScalarAffine)
    assert not model.fc.weight.any() and not model.fc.bias.any()
    assert std(model.conv1.weight) == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.03)  # not in a branch
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()


def test_fixup_tells_of_norms_that_are_left(resnet50: nn.Module) -> None:
    report = init_model(copy.deepcopy(resnet50), "fixup", verbose=False)
    assert "replace_norms" in str(report)


def test_zero_residual_makes_blocks_the_identity(resnet50: nn.Module) -> None:
    model = copy.deepcopy(resnet50)
    init_model(model, "zero-residual", verbose=False)
    assert sum(not module.weight.any() for module in model.modules() if isinstance(module, nn.BatchNorm2d)) == 16
    x = torch.rand(2, 256, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.layer1[1](x), x, rtol=0, atol=0)


def test_zero_residual_without_norms() -> None:
    model = residual_mlp(3, 8, 2)
    init_model(model, "zero-residual", verbose=False)
    x = torch.randn(4, 8)
    torch.testing.assert_close(model[:-1](x), x, rtol=0, atol=0)


def test_orthogonal_rows() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 64))
    init_model(model, "orthogonal", verbose=False)
    for group in model[0].weight.chunk(4):  # a group at a time: 8 rows of 36
        rows = group.flatten(1)
        torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(8), rtol=0, atol=1e-5)
    columns = model[3].weight
    torch.testing.assert_close(columns.T @ columns, torch.eye(32), rtol=0, atol=1e-5)


def test_xavier_and_small() -> None:
    model = nn.Sequential(nn.Linear(300, 500), nn.Tanh(), nn.Linear(500, 10))
    init_model(model, "xavier", verbose=False)
    assert std(model[0].weight) == pytest.approx(5 / 3 * math.sqrt(2 / 800), rel=0.01)
    init_model(model, "small", std=0.003, verbose=False)
    assert std(model[0].weight) == pytest.approx(0.003, rel=0.01)
    assert not model[0].bias.any()


# ---------------------------------------------------------------- transformers, embeddings, recurrent layers


def test_gpt2_is_gpt2() -> None:
    """A model whose forward cannot be traced: the blocks inside are, and the last layers of 2 L branches are scaled."""
    model = TinyGPT(width=128, depth=6)
    report = init_model(model, "gpt2", verbose=False)
    assert std(model.wte.weight) == pytest.approx(0.02, rel=0.02)
    assert model.lm_head.weight is model.wte.weight
    assert [layer.name for layer in report.layers].count("lm_head") == 0  # shared: drawn once, as the embedding
    for block in model.h:
        assert std(block.c_fc.weight) == pytest.approx(0.02, rel=0.02)
        for last in (block.attn.c_proj, block.mlp_proj):
            assert std(last.weight) == pytest.approx(0.02 / math.sqrt(12), rel=0.02)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(norm_first: bool) -> None:
    """Two layers have four branches; a post-norm stream needs no scaling."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, norm_first=norm_first, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    init_model(model, "kaiming", verbose=False)
    scale = 1 / math.sqrt(4) if norm_first else 1.0
    assert std(model.layers[1].linear1.weight) == pytest.approx(1.5335 / math.sqrt(128), rel=0.02)
    assert std(model.layers[1].linear2.weight) == pytest.approx(scale / math.sqrt(512), rel=0.02)
    assert std(model.layers[0].self_attn.in_proj_weight) == pytest.approx(1 / math.sqrt(128), rel=0.02)
    assert std(model.layers[0].self_attn.out_proj.weight) == pytest.approx(scale / math.sqrt(128), rel=0.02)


def test_vit_b_16_has_24_branches() -> None:
    model = torchvision.models.vit_b_16()
    report = init_model(model, "gpt2", verbose=False)
    assert std(model.encoder.layers[3].mlp[3].weight) == pytest.approx(0.02 / math.sqrt(24), rel=0.02)
    assert set(report.untouched) == {"class_token", "encoder.pos_embedding"}


def test_embedding_padding_stays_zero() -> None:
    model = nn.Sequential(nn.Embedding(50, 64, padding_idx=3), nn.Linear(64, 2))
    init_model(model, "xavier", verbose=False)
    assert not model[0].weight[3].any()
    assert std(model[0].weight[4:]) == pytest.approx(1 / 8, rel=0.05)


def test_lstm_gate_by_gate() -> None:
    model = nn.LSTM(40, 32)
    report = init_model(model, "kaiming", verbose=False)
    assert not report.untouched
    for gate in model.weight_hh_l0.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(32), rtol=0, atol=1e-5)
    assert (model.bias_ih_l0[32:64] == 1).all()  # gates are input, forget, cell, output
    assert not model.bias_hh_l0.any() and not model.bias_ih_l0[:32].any()


# ---------------------------------------------------------------- the report, and what is refused


def test_report_is_printed_and_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    report = init_model(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2), nn.LayerNorm(2)), "kaiming")
    printed = capsys.readouterr().out
    assert printed.strip() == str(report)
    assert re.search(r"kaiming normal over fan in, gain 1\.534 \(gelu\); std 0\.1\d", printed)
    assert "1 norms: scale 1, shift 0" in printed
    assert report.layers[0].std == pytest.approx(1.5335 / 8, rel=0.1)


def test_activation_can_be_told() -> None:
    """For models that call functions and cannot be traced; the last layer is the output's."""
    model = mlp(3, 256, nn.Identity)
    init_model(model, "kaiming", activation="relu", verbose=False)
    assert std(model[0].weight) == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert std(model[4].weight) == pytest.approx(math.sqrt(1 / 256), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"method": "he"}, "no initialisation 'he'.*kaiming"),
        ({"mode": "fan_avg"}, "fan_avg"),
        ({"activation": "rely"}, "did you mean 'relu'"),
        ({"method": "lsuv"}, "batch="),
        ({"method": "fixup"}, "no residual branch.*Sequential"),
    ],
)
def test_refusals(arguments: dict, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        init_model(mlp(3, 4), **arguments)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_convolutions_norms_and_branches(
    method: str, resnet18: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of a ResNet18 is initialised, said in print, and passes a signal and a gradient that the doctor lets pass."""
    model = copy.deepcopy(resnet18)
    if method == "fixup":
        assert replace_norms(model) == 20
    batch = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    report = init_model(model, method, batch=batch[0])
    printed = capsys.readouterr().out
    assert f"init_model: {method}, 21 layers" in printed and "Conv2d" in printed and "Linear" in printed
    assert len(report.layers) == 21 and report.norms == (0 if method == "fixup" else 20)
    assert not [name for name in report.untouched if not name.endswith(("scale", "bias")) or method != "fixup"]
    diagnosis = gradfast.diagnose(model, batch, torch.nn.functional.cross_entropy)
    assert diagnosis.ok, str(diagnosis)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_weights_and_gradients_still_flow(method: str) -> None:
    model = residual_mlp(2, 16, 4)
    x = torch.randn(8, 16)
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        init_model(model, method, batch=x, verbose=False)
        draws.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*draws))
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    assert all(p.requires_grad for p in model.parameters())
