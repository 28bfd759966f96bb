"""Torchvision's classification models by name, randomly initialised."""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import nn

from gradfast.errors import UserError
from gradfast.extras import first_line


def build_model(name: str, classes: int, img_size: int, zero_init_residual: bool = False) -> nn.Module:
    """A model with `classes` outputs, drawn from torch's global generator.

    Raises:
        UserError: torchvision has no such model, or it does not take images of this size.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "torchvision.models.list_models() lists them"
        raise UserError(f"--model: torchvision has no classification model {name!r}; {hint}")
    options: dict[str, object] = {"weights": None, "num_classes": classes}
    if zero_init_residual:
        if not name.startswith(("resnet", "resnext", "wide_resnet")):
            raise UserError(f"--zero-init-residual: {name} has no residual blocks with a last norm; leave it out")
        options["zero_init_residual"] = True
    if name.startswith("vit_"):
        options["image_size"] = img_size
    if name in ("googlenet", "inception_v3"):  # their auxiliary heads would return a tuple in training
        options |= {"aux_logits": False, "init_weights": True}
    try:
        model = torchvision.models.get_model(name, **options)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, img_size, img_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"--model {name} does not take images of {img_size} x {img_size} pixels ({first_line(error)}); change "
            "--img-size"
        ) from error
    return model


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
