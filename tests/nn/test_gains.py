"""Gains and fans against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradfast.nn import ACTIVATIONS, gain
from gradfast.nn.layers import fans

# E[f(z)^2] in closed form: relu 1/2; elu 1/2 + the integral of (e^z - 1)^2 below 0, with Phi the normal distribution:
# e^2 Phi(-2) - 2 e^(1/2) Phi(-1) + 1/2.
PHI = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))  # noqa: E731
ELU = 0.5 + math.exp(2) * PHI(-2) - 2 * math.exp(0.5) * PHI(-1) + 0.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [("linear", 1), ("sigmoid", 1), ("tanh", 5 / 3), ("relu", math.sqrt(2)), ("selu", 1), ("elu", ELU**-0.5)],
)
def test_gains_known_in_closed_form(name: str, expected: float) -> None:
    assert gain(name) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_leaky_relu(slope: float) -> None:
    assert gain("leaky_relu", slope) == pytest.approx(math.sqrt(2 / (1 + slope**2)))


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in ("sigmoid", "tanh")])
def test_gain_undoes_the_activation_on_a_million_samples(name: str) -> None:
    """E[f(z)^2] = 1 / gain^2; the mean of a million samples is good to about 0.3 %."""
    samples = ACTIVATIONS[name]()(torch.randn(1_000_000)).square().mean().item()
    assert samples * gain(name) ** 2 == pytest.approx(1.0, abs=0.01)


def test_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match=r"'gelo'.*did you mean 'gelu'"):
        gain("gelo")


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(3, 5), (3, 5)),
        (nn.Conv2d(4, 8, 3), (36, 72)),
        (nn.Conv2d(4, 8, 3, groups=4), (9, 18)),  # depthwise: an input feeds 8/4 channels of 9 places
        (nn.Conv1d(4, 8, 5, groups=2), (10, 20)),
        (nn.ConvTranspose2d(4, 8, 4, stride=2), (16, 128)),  # each output meets 2 x 2 places of 4 channels
        (nn.ConvTranspose1d(4, 8, 3), (12, 24)),
    ],
)
def test_fans(layer: nn.Module, expected: tuple[float, float]) -> None:
    assert fans(layer) == expected


def test_fan_in_of_a_transposed_convolution_is_what_it_sums() -> None:
    """With weights of variance 1 / fan_in an inner output keeps the inputs' variance."""
    layer = nn.ConvTranspose2d(64, 64, 4, stride=2, bias=False)
    nn.init.normal_(layer.weight, std=fans(layer)[0] ** -0.5)
    with torch.no_grad():
        inner = layer(torch.randn(8, 64, 16, 16))[:, :, 4:-4, 4:-4]
    assert inner.var().item() == pytest.approx(1.0, abs=0.05)
