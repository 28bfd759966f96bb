"""gradfast's optimisers by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import gradfast
from gradfast.nn import param_groups
from gradfast.optim.base import ClippedOptimizer
from gradfast.train.config import TrainConfig
from gradfast.train.model.clipping import clip_arguments

OPTIMISERS: dict[str, Any] = {
    "sgd": gradfast.SGD,
    "adam": gradfast.Adam,
    "adamw": gradfast.AdamW,
    "lion": gradfast.Lion,
}


def build_optimizer(config: TrainConfig, model: nn.Module) -> ClippedOptimizer:
    """The optimiser `config.opt` over the model's named parameters, so that errors name the layer.

    Clipping is the optimiser's own: it measures the norm, clips and updates in one pass.
    """
    assert config.weight_decay is not None
    common: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "l1": config.l1,
        **clip_arguments(config, model),
        "nonfinite": config.nonfinite,
    }
    if config.opt == "sgd":
        common.update(momentum=config.momentum, nesterov=config.nesterov)
    parameters: list[Any] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not config.norm_bias_decay:
        parameters = param_groups(model, config.weight_decay, l1=config.l1)
    return OPTIMISERS[config.opt](parameters, **common)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state; the hyper-parameters stay the optimiser's own, which a resumed run may have changed."""
    kept = ("weight_decay", "momentum", "nesterov")
    wanted = [
        {"l1": group.get("l1", 0.0), **{name: group[name] for name in kept if name in group}}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, mine in zip(optimizer.param_groups, wanted, strict=True):
        group.update(mine)
