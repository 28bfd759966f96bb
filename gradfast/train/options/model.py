"""What is trained."""

from __future__ import annotations

import dataclasses

from gradfast.train import parse
from gradfast.train.options.field import choice, option, switch


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The settings of the group `model`."""

    model: str = option(
        "resnet50",
        parse.text,
        "model",
        "a classification model of torchvision; with --task detect a detector of its",
        "NAME",
    )
    weights: str | None = option(
        None,
        parse.text,
        "model",
        "begin with the weights of this file (of torch.save) where names and shapes fit, instead of at random, or with "
        "torchvision's of a name, such as IMAGENET1K_V2 or DEFAULT, which are fetched; a classifier for other classes "
        "is drawn anew, and a detector takes a classifier's ResNet",
        "FILE|NAME",
    )
    init: str | None = option(
        None,
        parse.one_of("kaiming", "xavier", "orthogonal", "fixup", "gpt2"),
        "model",
        "draw the weights by gradfast.nn.init_model, with the gain of the activation that follows each layer "
        "(default: the model's own way)",
        "{kaiming,xavier,orthogonal,fixup,gpt2}",
    )
    zero_init_residual: bool | None = switch(
        "model",
        "start every residual block as the identity, by a zero weight in its last norm: gradients of 5 instead of 200 "
        "(default: for ResNets without --init, and for a detector's without --weights)",
        default=None,
    )
    activation: str | None = option(
        None, parse.text, "model", "relu, gelu, silu, elu ... instead of the model's own activations", "NAME"
    )
    norm: str = choice(
        "batch",
        "model",
        "normalisation: the model's own (batch); group, GroupNorm of 32 groups or the next fewer that divide the "
        "channels, for batches of a few images; or none, a scale and a shift in its place (with --init fixup)",
        "batch",
        "group",
        "none",
    )
    freeze_backbone: int | str = option(
        0,
        parse.epochs_or_all,
        "model",
        "train the classifier alone, the rest with its norms in evaluation mode: for the first N epochs, or all "
        "of them (--freeze-backbone alone); with --weights",
        "N|all",
        bare="all",
    )
