"""Fourteen ways to lose a run. Each function makes a task from a seed, broken or sound.

A broken task diverges, or never learns, in plain PyTorch. Its sound twin trains well, and shows whether a cure harms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from task import Batch, Task, blobs, generator, mlp, pictures
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import gradfast.nn as cures

LOG4 = math.log(4)


def init(method: str, **options: object) -> Callable[[nn.Module], None]:
    def mend(model: nn.Module) -> None:
        cures.init_model(model, method, verbose=False, **options)

    return mend


# -------------------------------------------------------------------- depth and initialisation


class NarrowResNet(nn.Module):
    """ResNet50's sixteen bottlenecks with an eighth of its channels."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inputs = 8
        for planes, count in ((8, 3), (16, 4), (32, 6), (64, 3)):
            for number in range(count):
                stride = 2 if number == 0 and planes > 8 else 1
                shortcut = None
                if inputs != 4 * planes or stride > 1:
                    shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), norm(4 * planes))
                blocks.append(Bottleneck(inputs, planes, stride, shortcut, norm_layer=norm))
                inputs = 4 * planes
        self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*blocks), nn.Linear(inputs, 4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet50_without_norm(seed: int, broken: bool) -> Task:
    return Task(
        NarrowResNet(nn.Identity if broken else nn.BatchNorm2d),
        pictures(seed, size=8 if broken else 16, count=8),
        chance=LOG4,
        good=0.7,
        options={"lr": 0.1 if broken else 0.01, "momentum": 0.9},
        steps=40 if broken else 60,
        max_norm=1.0 if broken else 50.0,  # gradients behind batch norm are large, and harmless
        mend=init("fixup") if broken else init("kaiming"),
        mend_name="fixup",
    )


def mlp_of_100_layers(seed: int, broken: bool) -> Task:
    model = mlp(100 if broken else 5, 24)
    if broken:
        init("small", std=0.45)(model)
    return Task(
        model,
        blobs(seed),
        LOG4,
        0.7,
        options={"lr": 1e-3},
        optimizer="Adam",
        mend=orthogonal_tanh if broken else init("kaiming"),
        mend_name="orthogonal, tanh",
        steps=100,
    )


def orthogonal_tanh(model: nn.Module) -> None:
    cures.replace_activation(model, "tanh")
    cures.init_model(model, "orthogonal", activation="linear", verbose=False)  # gain 1: an isometry (Saxe 2014)


def deep_linear(seed: int, broken: bool) -> Task:
    model = mlp(40 if broken else 4, 32, nn.Identity)
    init("small", std=0.28 if broken else 0.18)(model)
    return Task(model, blobs(seed), LOG4, 0.5, options={"lr": 0.01}, mend=init("orthogonal"), mend_name="orthogonal")


def sigmoid_stack(seed: int, broken: bool) -> Task:
    def mend(model: nn.Module) -> None:
        cures.replace_activation(model, "relu", init="kaiming")

    return Task(
        mlp(8 if broken else 2, 32, nn.Sigmoid),
        blobs(seed),
        LOG4,
        0.7,
        mend=mend,
        mend_name="relu, kaiming",
        options={"lr": 0.03, "momentum": 0.9},
        steps=150,
    )


def tanh_saturated(seed: int, broken: bool) -> Task:
    model = mlp(20 if broken else 8, 32, nn.Tanh)
    if broken:
        init("small", std=1.0)(model)
    return Task(model, blobs(seed), LOG4, 0.7, mend=init("xavier"), mend_name="xavier", steps=120)


# -------------------------------------------------------------------- time


class Adder(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(2, 32, batch_first=True, nonlinearity="relu"), nn.Linear(32, 1)
        nn.init.eye_(self.rnn.weight_hh_l0)
        with torch.no_grad():
            self.rnn.weight_hh_l0.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1]).squeeze(1)


def rnn_adding_problem(seed: int, broken: bool) -> Task:
    """Two marked numbers of a sequence are to be added (Hochreiter 1997; Pascanu 2013); the mean guess costs 1/6."""
    length = 20 if broken else 8

    def batch(step: int) -> Batch:
        draw = generator(seed, step)
        values = torch.rand(32, length, generator=draw)
        marks = torch.zeros(32, length)
        first = torch.randint(length // 2, (32,), generator=draw)
        second = length // 2 + torch.randint(length // 2, (32,), generator=draw)
        rows = torch.arange(32)
        marks[rows, first] = marks[rows, second] = 1.0
        return torch.stack([values, marks], 2), values[rows, first] + values[rows, second]

    def mend(model: nn.Module) -> None:
        nn.init.eye_(model.rnn.weight_hh_l0)
        nn.init.zeros_(model.rnn.bias_hh_l0), nn.init.zeros_(model.rnn.bias_ih_l0)

    return Task(
        Adder(1.2 if broken else 1.0),
        batch,
        chance=1 / 6,
        good=0.155,
        loss=F.mse_loss,
        steps=500 if broken else 300,
        optimizer="SGD" if broken else "Adam",
        options={"lr": 0.02, "momentum": 0.9} if broken else {"lr": 3e-3},
        max_norm=0.3 if broken else 1.0,
        mend=mend,
        mend_name="identity recurrence",
    )


# -------------------------------------------------------------------- bad data


class TinyTransformer(nn.Module):
    """Vectors in, a class out; two pre-norm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def spoiled(
    batch: Callable[[int], Batch], every: int, spoil: Callable[[Tensor, Tensor], Batch]
) -> Callable[[int], Batch]:
    """Spoil every so manieth batch, but for the first ones."""

    def made(step: int) -> Batch:
        inputs, targets = batch(step)
        return spoil(inputs, targets) if step % every == every - 1 and step > 20 else (inputs, targets)

    return made


def transformer_corrupted_batches(seed: int, broken: bool) -> Task:
    """Every twentieth batch comes from another file: raw integers of a million, labels shuffled; no input norm."""
    flat = blobs(seed, features=64)

    def batch(step: int) -> Batch:
        inputs, targets = flat(step)
        return inputs.view(-1, 8, 8), targets

    def spoil(inputs: Tensor, targets: Tensor) -> Batch:
        return inputs * 1e6, targets.roll(1)

    return Task(
        TinyTransformer(),
        spoiled(batch, 20, spoil) if broken else batch,
        LOG4,
        0.5,
        steps=110,
        options={"lr": 0.05, "momentum": 0.9},
    )


def nan_batch(seed: int, broken: bool) -> Task:
    def spoil(inputs: Tensor, targets: Tensor) -> Batch:
        inputs = inputs.clone()
        inputs[0, 0] = math.nan
        return inputs, targets

    batch = blobs(seed)
    return Task(mlp(3, 32), spoiled(batch, 30, spoil) if broken else batch, LOG4, 0.5)


def wild_targets(seed: int, broken: bool) -> Task:
    """Regression; one batch in forty has targets in other units."""
    weights = torch.randn(16, generator=generator(seed, 999_999)) / 4

    def batch(step: int) -> Batch:
        inputs = torch.randn(32, 16, generator=generator(seed, step))
        return inputs, torch.tanh(inputs @ weights)

    def spoil(inputs: Tensor, targets: Tensor) -> Batch:
        return inputs, targets * 1e5

    model = nn.Sequential(mlp(3, 32, inputs=16, outputs=1), nn.Flatten(0))
    return Task(model, spoiled(batch, 40, spoil) if broken else batch, chance=0.4, good=0.1, loss=F.mse_loss, steps=150)


# -------------------------------------------------------------------- scales


def fp16_overflow(seed: int, broken: bool) -> Task:
    """A model in float16; every tenth batch holds one sample beyond its range."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(3, 32).half()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.half()).float()

    def spoil(inputs: Tensor, targets: Tensor) -> Batch:
        inputs = inputs.clone()
        inputs[0] *= 3e4
        return inputs, targets

    batch = blobs(seed)
    return Task(Half(), spoiled(batch, 10, spoil) if broken else batch, LOG4, 0.6)


def loss_scale_error(seed: int, broken: bool) -> Task:
    """The loss is summed over the batch and multiplied by a forgotten loss scale of 128."""

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return 128 * F.cross_entropy(output, targets, reduction="sum")

    def evaluate(model: nn.Module) -> float:
        inputs, targets = batch(10**6)
        return F.cross_entropy(model(inputs), targets).item()

    batch = blobs(seed)
    return Task(mlp(4, 32), batch, LOG4, 0.5, loss=loss if broken else F.cross_entropy, evaluate=evaluate)


def detection_without_norm(seed: int, broken: bool) -> Task:
    """Find a bright square: four numbers, in pixels, from a deep backbone without norms that was never trained."""
    depth = 14 if broken else 4

    def batch(step: int) -> Batch:
        draw = generator(seed, step)
        images = 0.3 * torch.randn(16, 3, 32, 32, generator=draw)
        boxes = torch.stack([torch.randint(0, 20, (16,), generator=draw) for _ in range(2)], 1)
        for image, (x, y) in zip(images, boxes.tolist()):
            image[:, y : y + 12, x : x + 12] += 2.0
        return images, torch.cat([boxes, boxes + 12], 1).float() / (1 if broken else 32)

    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()]
    for number in range(depth - 1):
        layers += [nn.Conv2d(16, 16, 3, stride=2 if number == 0 else 1, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 4))
    cures.init_model(model, "kaiming", verbose=False)
    for module in model:
        if broken and isinstance(module, nn.Conv2d):
            module.weight.data.mul_(1.4)

    def loss(boxes: Tensor, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(boxes, targets, reduction="none").sum(1).mean()

    def normalised(model: nn.Module) -> None:
        cures.init_model(model, "kaiming", verbose=False)
        cures.add_group_norm(model, groups=8)

    return Task(
        model,
        batch,
        chance=18.0 if broken else 0.08,
        good=9.0 if broken else 0.04,
        loss=loss,
        steps=60,
        options={"lr": 0.02, "momentum": 0.9},
        max_norm=1.0 if broken else 35.0,  # of detection's recipes: gradients behind norms are large, and harmless
        mend=normalised,
        mend_name="kaiming, group norm",
    )


# -------------------------------------------------------------------- dynamics


class Reverse(torch.autograd.Function):
    """The identity; its gradient changes sign, so that one step trains two adversaries, one of them slower."""

    @staticmethod
    def forward(context: Any, x: Tensor, rate: float) -> Tensor:
        context.rate = rate
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -context.rate * gradient, None


class Adversaries(nn.Module):
    """A generator of points in the plane, and a critic without any bound on its slope."""

    def __init__(self, generator_rate: float) -> None:
        super().__init__()
        self.generator = mlp(3, 32, inputs=4, outputs=2)
        self.critic = mlp(3, 32, inputs=2, outputs=1)
        self.generator_rate = generator_rate

    def forward(self, real: Tensor) -> Tensor:
        fake = self.generator(torch.randn(len(real), 4))
        return self.critic(Reverse.apply(fake, self.generator_rate)).mean() - self.critic(real).mean()


def gan(seed: int, broken: bool) -> Task:
    """A Wasserstein critic without bounds, and momentum, under which adversaries circle.

    Measured: how far apart the clouds are, their means and their spreads; a generator that knows nothing is 1.6 away.
    """

    def batch(step: int) -> Batch:
        real = torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(64, 2, generator=generator(seed, step))
        return real, real

    def evaluate(model: nn.Module) -> float:
        torch.manual_seed(seed)
        fake, real = model.generator(torch.randn(512, 4)), batch(10**6)[0]
        return ((fake.mean(0) - real.mean(0)).norm() + (fake.std(0) - real.std(0)).norm()).item()

    def bound(model: nn.Module) -> None:
        cures.add_spectral_norm(model.critic)

    def two_rates(model: nn.Module) -> list[dict[str, Any]]:  # Heusel et al. 2017
        generator, critic = model.generator.named_parameters("generator"), model.critic.named_parameters("critic")
        return [{"params": list(generator)}, {"params": list(critic), "lr": 0.1, "weight_decay": 0.05}]

    model = Adversaries(1.0 if broken else 0.2)
    if not broken:
        bound(model)
    return Task(
        model,
        batch,
        chance=1.6,
        good=0.8,
        loss=lambda out, _: out,
        loss_tells=False,
        steps=300,
        evaluate=evaluate,
        mend=bound if broken else None,  # the sound twin has all of it
        mend_name="spectral norm, two rates, no momentum",
        mend_options={"lr": 0.02, "momentum": 0.0},
        mend_groups=two_rates,
        options={"lr": 0.05, "momentum": 0.7} if broken else {"lr": 0.1},
    )


def lost_scheduler(seed: int, broken: bool) -> Task:
    """Resumed after 80 steps: the schedule's state was lost, and the rate is its peak times a hundred."""

    def rate(step: int) -> float:
        return 100.0 if broken and step >= 80 else 1.0

    return Task(mlp(5, 32), blobs(seed), LOG4, 0.5, rate=rate, steps=140, options={"lr": 0.02, "momentum": 0.9})


SCENARIOS: dict[str, Callable[[int, bool], Task]] = {
    function.__name__: function
    for function in (
        resnet50_without_norm,
        mlp_of_100_layers,
        rnn_adding_problem,
        transformer_corrupted_batches,
        fp16_overflow,
        detection_without_norm,
        loss_scale_error,
        nan_batch,
        sigmoid_stack,
        tanh_saturated,
        gan,
        deep_linear,
        lost_scheduler,
        wild_targets,
    )
}
