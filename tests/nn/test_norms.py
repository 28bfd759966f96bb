"""Norms in other norms' places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradfast.nn import group_count, group_norms

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(64, 32), (2048, 32), (48, 24), (24, 12), (40, 20), (72, 24), (16, 8), (7, 1), (2, 1), (1, 1), (34, 17), (37, 1)],
)
def test_groups_divide_the_channels_and_hold_two_at_least(channels: int, groups: int) -> None:
    assert group_count(channels) == groups
    assert group_count(channels, most=8) <= 8


def test_what_a_group_norm_computes() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6, eps=1e-3))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6.0))
        model[0].bias.fill_(0.5)
    assert group_norms(model) == {3: 1}
    x = torch.randn(4, 6, 5, 5)
    pairs = x.double().view(4, 3, 2, 25)
    mean, variance = pairs.mean((2, 3), keepdim=True), pairs.var((2, 3), correction=0, keepdim=True)
    normal = ((pairs - mean) / (variance + 1e-3).sqrt()).view_as(x)
    expected = normal * torch.arange(6.0).double().view(6, 1, 1) + 0.5
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)  # of fp32, about 1
    # An image does not depend on its neighbours, which is the point.
    torch.testing.assert_close(model(x[:1]), model(x)[:1])


def test_scale_and_shift_are_the_same_parameters() -> None:
    model = torchvision.models.resnet18(zero_init_residual=True)
    before = dict(model.named_parameters())
    assert group_norms(model) == {32: 20}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert (model.layer1[0].bn2.weight == 0).all() and not list(model.buffers())
    assert group_norms(model) == {}


def test_a_norm_without_scale_gets_none() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False)).eval()
    group_norms(model)
    assert model[0].weight is None and not model[0].training
