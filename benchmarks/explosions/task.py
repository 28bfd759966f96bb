"""What a scenario is: a model, its data, and how it is trained; and what counts as learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass
class Task:
    """One run to be made.

    Attributes:
        batch: step (from 0) -> (inputs, targets); the same for the same seed and step.
        chance: the loss of a model that knows nothing.
        good: a final loss below it counts as learnt.
        mend: what the model's own cure is, applied before training; `mend_name` says it in words. `mend_options` and
            `mend_groups`, model -> parameter groups, are what it changes in the optimiser.
        loss_tells: whether the loss says how far the training is; not that of adversaries.
        rate: step -> factor on the learning rate.
        evaluate: the final measure, on sound data; by default the loss on a batch of its own.
    """

    model: nn.Module
    batch: Callable[[int], Batch]
    chance: float
    good: float
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy
    optimizer: str = "SGD"
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.05, "momentum": 0.9})
    steps: int = 100
    max_norm: float = 1.0
    mend: Callable[[nn.Module], None] | None = None
    mend_name: str = ""
    mend_options: dict[str, Any] = field(default_factory=dict)
    mend_groups: Callable[[Any], list[dict[str, Any]]] | None = None
    loss_tells: bool = True
    rate: Callable[[int], float] = lambda step: 1.0
    evaluate: Callable[[nn.Module], float] | None = None


def generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + step)


def blobs(
    seed: int, features: int = 32, classes: int = 4, count: int = 32, noise: float = 0.7
) -> Callable[[int], Batch]:
    """Points around `classes` centres on a sphere of radius sqrt(features): inputs of rms about 1."""
    centres = torch.randn(classes, features, generator=generator(seed, 999_999))

    def batch(step: int) -> Batch:
        draw = generator(seed, step)
        targets = torch.randint(classes, (count,), generator=draw)
        return centres[targets] + noise * torch.randn(count, features, generator=draw), targets

    return batch


def pictures(seed: int, size: int = 16, classes: int = 4, count: int = 16) -> Callable[[int], Batch]:
    """Noisy pictures [count, 3, size, size] with a coarse pattern for each class."""
    patterns = torch.randn(classes, 3, 4, 4, generator=generator(seed, 999_999))
    patterns = F.interpolate(patterns, size=size, mode="nearest")

    def batch(step: int) -> Batch:
        draw = generator(seed, step)
        targets = torch.randint(classes, (count,), generator=draw)
        return patterns[targets] + 0.5 * torch.randn(count, 3, size, size, generator=draw), targets

    return batch


def mlp(
    depth: int, width: int, activation: type[nn.Module] = nn.ReLU, inputs: int = 32, outputs: int = 4
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(inputs, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))
