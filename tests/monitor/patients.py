"""Models for the doctor to examine: healthy ones, and some that are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from nn.models import mlp, residual_mlp
from torch import Tensor, nn

from gradfast.nn import init_model

Case = tuple[nn.Module, Any, Callable[..., Tensor]]


def labelled(model: nn.Module, n: int = 64, width: int = 128, classes: int = 10) -> Case:
    return model, (torch.randn(n, width), torch.randint(classes, (n,))), F.cross_entropy


def with_init(model: nn.Module, method: str, **options: Any) -> nn.Module:
    init_model(model, method, verbose=False, **options)
    return model


def words(model: nn.Module) -> Case:
    tokens = torch.randint(101, (4, 33))
    return model, (tokens[:, :-1], tokens[:, 1:]), lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())


HEALTHY: dict[str, Callable[[], Case]] = {
    "deep relu": lambda: labelled(with_init(mlp(30, 128, outputs=10), "kaiming")),
    "tanh": lambda: labelled(with_init(mlp(10, 128, nn.Tanh, 10), "xavier")),
    "torch's default, shallow": lambda: labelled(mlp(3, 128, outputs=10)),
    "residual": lambda: labelled(with_init(residual_mlp(20, 128, 10), "kaiming")),
    "fixup": lambda: labelled(with_init(residual_mlp(20, 128, 10), "fixup")),
    "regression": lambda: (mlp(3, 16, outputs=1), (torch.randn(32, 16), torch.randn(32, 1)), F.mse_loss),
    "batch of one": lambda: labelled(with_init(mlp(5, 128, outputs=10), "kaiming"), n=1),
    "lstm": lambda: (Recurrent(nn.LSTM(8, 32, batch_first=True)), *recurrent_batch()),
}


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def recurrent_batch() -> tuple[Any, Callable[..., Tensor]]:
    return (torch.randn(16, 20, 8), torch.randint(2, (16,))), F.cross_entropy


class SquareRoot(nn.Module):
    """Its forward is fine at 0, its derivative is not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).sqrt()


class Stuck(nn.Module):
    """Detaches what comes in: the layers before learn nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Loop(nn.Module):
    """One cell, forty times over, that doubles what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(32, 32), nn.Linear(32, 2)
        nn.init.orthogonal_(self.cell.weight, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 32)
        for step in range(x.shape[1]):
            state = self.cell(state) + F.pad(x[:, step], (0, 24))
        return self.head(state)


def constant() -> Case:
    model = mlp(3, 128, outputs=10)
    nn.init.constant_(model[2].weight, 0.05)
    return labelled(model)


def one_layer_too_large() -> Case:
    model = with_init(mlp(5, 128, outputs=10), "kaiming")
    model[4].weight.data.mul_(40.0)
    return labelled(model)


def dead() -> Case:
    model = with_init(mlp(4, 128, outputs=10), "kaiming")
    nn.init.constant_(model[2].bias, -20.0)
    return labelled(model)


def images_as_bytes() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    return model, (torch.randint(256, (16, 3, 8, 8)).float(), torch.randint(10, (16,))), F.cross_entropy


def loss(function: Callable[..., Tensor]) -> Case:
    model, batch, _ = labelled(with_init(mlp(4, 128, outputs=10), "kaiming"))
    return model, batch, function


def log_of_zero(out: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(torch.log(torch.softmax(100 * out.double(), 1).float()), target)


def bad_pixel() -> Case:
    model, (inputs, targets), loss_fn = labelled(mlp(3, 128, outputs=10))
    inputs[3, 5] = float("nan")
    return model, (inputs, targets), loss_fn


def prices() -> Case:
    return mlp(3, 16, outputs=1), (torch.randn(32, 16), 250_000 + 1e5 * torch.randn(32, 1)), F.mse_loss


def huge_in_the_middle() -> Case:
    model = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 10))
    model[0].weight.data.mul_(1e6)
    return labelled(model)


def root_of_zero() -> Case:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), SquareRoot(), nn.Linear(128, 10))
    return labelled(model)


def overflowing() -> Case:
    return labelled(with_init(mlp(60, 128, outputs=10), "small", std=3.0))


# name -> (model, kinds that must be found, layer that must be named or None, a word of the line that mends it)
BROKEN: dict[str, tuple[Callable[[], Case], str, str | None, str]] = {
    "torch's default, 20 layers": (lambda: labelled(mlp(20, 128, outputs=10)), "backward-vanishes", None, "kaiming"),
    "weights of std 1": (
        lambda: labelled(with_init(mlp(20, 128, outputs=10), "small", std=1.0)),
        "forward-explodes weight-scale",
        None,
        "kaiming",
    ),
    "overflow to infinity": (overflowing, "nonfinite", None, "kaiming"),
    "sigmoid stack": (lambda: labelled(mlp(12, 128, nn.Sigmoid, 10)), "backward-vanishes", "0", "relu"),
    "saturated tanh": (
        lambda: labelled(with_init(mlp(6, 128, nn.Tanh, 10), "small", std=2.0)),
        "saturated weight-scale",
        None,
        "xavier",
    ),
    "residual without norm": (
        lambda: labelled(with_init(residual_mlp(24, 128, 10), "kaiming", scale_residual=False)),
        "residual-scaling",
        "23.second",
        "fixup",
    ),
    "recurrence above 1": (
        lambda: (Loop(), (torch.randn(8, 40, 8), torch.randint(2, (8,))), F.cross_entropy),
        "backward-explodes fp16-overflow",
        "cell",
        "kaiming",
    ),
    "constant weights": (constant, "constant-weights", "2", "kaiming"),
    "one layer too large": (one_layer_too_large, "weight-scale logits", "4", "kaiming"),
    "dead relu": (dead, "dead-relu", "3", "leaky_relu"),
    "bytes as inputs": (images_as_bytes, "inputs", None, "255"),
    "NaN in the batch": (bad_pixel, "inputs", None, "isfinite"),
    "summed loss": (lambda: loss(lambda o, t: F.cross_entropy(o, t, reduction="sum")), "loss-scale", None, "mean"),
    "loss times 1e4": (lambda: loss(lambda o, t: 1e4 * F.cross_entropy(o, t)), "loss-scale", None, "loss /"),
    "log of 0": (lambda: loss(log_of_zero), "nonfinite", None, "log_softmax"),
    "sqrt of 0": (root_of_zero, "nonfinite", "2", "clamp"),
    "targets of a quarter million": (prices, "targets", None, "mean"),
    "beyond float16": (huge_in_the_middle, "fp16-overflow", "0", "bfloat16"),
    "detached": (
        lambda: labelled(nn.Sequential(nn.Linear(128, 128), Stuck(), nn.Linear(128, 10))),
        "no-gradient",
        "0.weight",
        "detach",
    ),
}
