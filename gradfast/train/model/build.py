"""Torchvision's classification models by name, with the changes that the settings ask for."""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import nn

from gradfast.errors import UserError
from gradfast.extras import first_line
from gradfast.nn import (
    add_dropout,
    add_stochastic_depth,
    group_norms,
    init_model,
    load_pretrained,
    replace_activation,
    replace_norms,
)
from gradfast.train.config import TrainConfig
from gradfast.train.model.weights import find_weights


def build_model(config: TrainConfig, classes: int) -> nn.Module:
    """A model with `classes` outputs, its weights drawn from torch's global generator or read from ``--weights``.

    Raises:
        UserError: torchvision has no such model, it does not take images of this size, or what is to be changed in it
            is not there.
    """
    model = make_model(config, classes)
    change = f"--norm {config.norm}"
    try:
        if config.norm == "none":
            replace_norms(model)
        elif config.norm == "group" and not group_norms(model):
            raise ValueError(f"{config.model} has no batch normalisation of images to replace")
        change = f"--activation {config.activation}"
        if config.activation is not None:
            replace_activation(model, config.activation)
        change = f"--dropout {config.dropout:g}"
        if config.dropout > 0:
            add_dropout(model, config.dropout)
        change = f"--drop-path {config.drop_path:g}"
        if config.drop_path > 0:
            add_stochastic_depth(model, config.drop_path)
        change = f"--init {config.init}"
        if config.init is not None:
            init_model(model, config.init, verbose=False)
    except ValueError as error:
        raise UserError(f"{change}: {first_line(error)}") from error
    if config.weights is not None:
        load_pretrained(model, find_weights(config.model, config.weights))
    check_size(model, config)
    return model


def make_model(config: TrainConfig, classes: int) -> nn.Module:
    """Torchvision's own model."""
    name = config.model
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "torchvision.models.list_models() lists them"
        raise UserError(f"--model: torchvision has no classification model {name!r}; {hint}")
    options: dict[str, object] = {"weights": None, "num_classes": classes}
    if config.zero_init_residual:
        options["zero_init_residual"] = True
    if name.startswith("vit_"):
        options["image_size"] = config.img_size
    if name in ("googlenet", "inception_v3"):  # their auxiliary heads would return a tuple in training
        options |= {"aux_logits": False, "init_weights": True}
    try:
        model: nn.Module = torchvision.models.get_model(name, **options)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise size_error(config, error) from error
    return model


def check_size(model: nn.Module, config: TrainConfig) -> None:
    """Raises:
    UserError: the model does not take images of ``--img-size``.
    """
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, config.img_size, config.img_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise size_error(config, error) from error


def size_error(config: TrainConfig, error: Exception) -> UserError:
    return UserError(
        f"--model {config.model} does not take images of {config.img_size} x {config.img_size} pixels "
        f"({first_line(error)}); change --img-size"
    )


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
