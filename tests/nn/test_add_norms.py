"""Norms put into models that have none: group norm behind convolutions, spectral norm on weights."""

from __future__ import annotations

import pytest
import torch
from nn.models import mlp
from torch import nn

import gradfast
from gradfast.nn import add_group_norm, add_spectral_norm, init_model


class Detector(nn.Module):
    """A backbone, partly normalised, with a residual branch, and a convolution that puts out predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.normed = nn.Conv2d(12, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.branch = nn.Conv2d(12, 12, 3, padding=1)
        self.relu = nn.ReLU()
        self.boxes = nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.norm(self.normed(x)))
        return self.boxes(self.relu(x + self.branch(x)))


def test_group_norm_goes_where_none_is() -> None:
    model = Detector().double()
    kept = model.stem.weight
    assert add_group_norm(model, 4) == ["stem", "branch"]
    assert model.stem[0].weight is kept and isinstance(model.normed, nn.Conv2d) and isinstance(model.boxes, nn.Conv2d)
    assert model.stem[1].num_groups == 4 and model.stem[1].weight.dtype == torch.float64
    model.branch[1].eps = 0.0
    seen = []
    model.branch.register_forward_hook(lambda module, arguments, output: seen.append(output))
    model(100 * torch.randn(2, 3, 8, 8, dtype=torch.float64))
    groups = seen[0].view(2, 4, -1)
    torch.testing.assert_close(groups.mean(2), torch.zeros(2, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(groups.var(2, correction=0), torch.ones(2, 4, dtype=torch.float64), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="add_group_norm: Detector has no convolution"):
        add_group_norm(model)


@pytest.mark.parametrize("channels, groups", [(64, 32), (48, 24), (12, 6), (7, 1), (2, 1), (1, 1)])
def test_a_group_has_two_channels_at_least(channels: int, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, 3, 3))
    add_group_norm(model.eval())
    assert model[0][1].num_groups == groups and not model[0].training


def test_resnets_have_their_norms() -> None:
    torchvision = pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="has no convolution that is followed by an activation and by no norm"):
        add_group_norm(torchvision.models.resnet18())
    bare = torchvision.models.resnet18(norm_layer=nn.Identity)
    assert len(add_group_norm(bare)) == 20
    assert bare(torch.randn(2, 3, 32, 32)).std() < 10


def test_spectral_norm_bounds_the_slope_of_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 1), nn.ReLU(), nn.Flatten(), mlp(4, 32))
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    names = add_spectral_norm(model, power_iterations=3)
    assert names == ["0", "3.0", "3.2", "3.4", "3.6"] and add_spectral_norm(model) == []
    for _ in range(200):  # the power method converges over forward passes
        model(torch.randn(3, 1, 8, dtype=torch.float64))
    for name in names:
        weight = model.get_submodule(name).weight.flatten(1)
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, rel=1e-3)
    model.eval()
    a, b = torch.randn(2, 500, 1, 8, dtype=torch.float64)
    slopes = (model(a) - model(b)).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
    assert slopes.max() <= 1.001


def test_spectral_norm_trains_and_is_named_to_the_optimiser() -> None:
    model = mlp(2, 8)
    add_spectral_norm(model)
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1, max_norm=1.0)
    before = model[0].parametrizations.weight.original.detach().clone()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].parametrizations.weight.original)
    assert "0.parametrizations.weight.original" in optimizer.grad_norms()


def test_computed_weights_are_not_initialised_in_vain() -> None:
    model = mlp(2, 8)
    add_spectral_norm(model)
    with pytest.raises(ValueError, match="weight of '0' is computed by a parametrization"):
        init_model(model, "kaiming")


def test_nothing_to_normalise() -> None:
    with pytest.raises(ValueError, match="ReLU has no linear layer"):
        add_spectral_norm(nn.ReLU())
