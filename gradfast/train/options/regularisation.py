"""What keeps the model from learning the images by heart."""

from __future__ import annotations

import dataclasses

from gradfast.train import parse
from gradfast.train.options.field import choice, option, switch

# SGD's comes from the trials behind the default run; Lion's authors take ten times AdamW's.
WEIGHT_DECAYS = {"sgd": 1e-4, "adam": 0.0, "adamw": 0.05, "lion": 0.5}


@dataclasses.dataclass(frozen=True)
class RegularisationOptions:
    """The settings of the group `regularisation`."""

    weight_decay: float | None = option(
        None,
        parse.non_negative,
        "regularisation",
        "L2 decay, decoupled for adamw and lion (default: "
        f"{', '.join(f'{value:g} for {name}' for name, value in WEIGHT_DECAYS.items())})",
        "FACTOR",
    )
    l1: float = option(
        0.0, parse.non_negative, "regularisation", "L1 decay beside it, which drives weights to zero", "FACTOR"
    )
    norm_bias_decay: bool = switch(
        "regularisation",
        "let norms and biases decay as well, as torch's optimisers do by default",
        default=True,
    )
    label_smoothing: float = option(
        0.0, parse.fraction, "regularisation", "share of each label spread over all classes", "SHARE"
    )
    mixup: float = option(
        0.0,
        parse.non_negative,
        "regularisation",
        "train on sums of two images, weighted by Beta(ALPHA, ALPHA); 0: never. Beside --cutmix, each batch is one or "
        "the other",
        "ALPHA",
    )
    cutmix: float = option(
        0.0,
        parse.non_negative,
        "regularisation",
        "train on images with a rectangle of another, its area by Beta(ALPHA, ALPHA); 0: never",
        "ALPHA",
    )
    random_erase: float = option(
        0.0, parse.fraction, "regularisation", "blacken a random rectangle of so many of the images", "SHARE"
    )
    dropout: float = option(0.0, parse.fraction, "regularisation", "drop so many inputs of the classifier", "SHARE")
    drop_path: float = option(
        0.0,
        parse.fraction,
        "regularisation",
        "skip residual blocks at random, the last one so often and earlier ones less (stochastic depth)",
        "SHARE",
    )
    class_weights: str | None = choice(
        None,
        "regularisation",
        "weigh each class in the loss by the inverse of its number of images (balanced), or all alike (none) (default: "
        "balanced, with --sampler balanced none)",
        "balanced",
        "none",
    )
    model_ema: bool = switch(
        "regularisation",
        "keep a moving average of the weights, and measure that one on the held-out images",
    )
    model_ema_decay: float = option(
        0.999,
        parse.fraction,
        "regularisation",
        "what the average keeps at each step; less in the first steps, (1 + n) / (10 + n)",
        "FACTOR",
    )
