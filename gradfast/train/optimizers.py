"""gradfast's optimisers by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import gradfast
from gradfast.optim.base import ClippedOptimizer
from gradfast.train.config import TrainConfig


def build_optimizer(config: TrainConfig, model: nn.Module) -> ClippedOptimizer:
    """The optimiser `config.opt` over the model's named parameters, so that errors name the layer.

    Clipping is the optimiser's own: it measures the norm, clips and updates in one pass.
    """
    common: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "max_norm": config.clip_grad,
        "nonfinite": config.nonfinite,
    }
    named = list(model.named_parameters())
    if config.opt == "sgd":
        return gradfast.SGD(named, momentum=config.momentum, **common)
    return {"adam": gradfast.Adam, "adamw": gradfast.AdamW}[config.opt](named, **common)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], config: TrainConfig) -> None:
    """Load a saved state; the hyper-parameters are the configuration's, which a resumed run may have changed."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay
        if config.opt == "sgd":
            group["momentum"] = config.momentum
