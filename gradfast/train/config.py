"""Every setting of a training run, in one place: its default, flag, YAML key, check, group and help text.

The command line, the YAML file, ``config.yaml`` in the run folder and the checkpoint all read this dataclass, so a
new setting is one field. A field ``batch_size`` is the flag ``--batch-size`` and the YAML key ``batch_size`` (or
``batch-size``).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gradfast.errors import UserError
from gradfast.train import parse
from gradfast.train.option import choice, option, switch

# The rate and the decay that suit an optimiser; SGD's come from the trials behind the default run.
LEARNING_RATES = {"sgd": 0.02, "adam": 1e-3, "adamw": 1e-3}
WEIGHT_DECAYS = {"sgd": 1e-4, "adam": 0.0, "adamw": 0.05}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of one run. None means "decide from the others": see `resolve`."""

    data: str = option(
        "elpv",
        parse.text,
        "data",
        "a folder with train/ and val/, each with one folder of images per class; or one folder of classes, which is "
        "split by --seed; or elpv, the photographs of solar cells of the extra gradfast[demo]",
        "PATH|elpv",
    )
    val_split: float = option(
        0.2,
        parse.open_fraction,
        "data",
        "share of the images held out for evaluation where the data has no val/ folder",
        "SHARE",
    )
    img_size: int = option(64, parse.positive_int, "data", "side of the square images, in pixels", "PIXELS")
    augment: str = choice(
        "auto",
        "data",
        "random changes of the training images: flip (left-right), dihedral (flips and right-angle rotations), crop "
        "(a random part at a random size, flipped); auto takes dihedral for elpv and crop for folders",
        "auto",
        "none",
        "flip",
        "dihedral",
        "crop",
    )
    cache: str = choice(
        "auto",
        "data",
        "keep the decoded, resized images in memory; auto does so up to 1 GiB where --augment allows it (not for crop, "
        "which cuts from the whole image)",
        "auto",
        "on",
        "off",
    )
    workers: int | None = option(
        None,
        parse.natural,
        "data",
        "processes that read and augment images; 0 does it in the main one (default: 0 for images in memory, else one "
        "per core, at most 8); the result does not depend on it",
        "N",
    )
    strict: bool = switch("data", "refuse the data if any image cannot be read, instead of skipping and counting it")

    model: str = option(
        "resnet50", parse.text, "model", "a classification model of torchvision, randomly initialised", "NAME"
    )
    zero_init_residual: bool = switch(
        "model", "ResNets: start every residual block as the identity (last norm's weight 0)"
    )

    epochs: int = option(7, parse.positive_int, "optimisation", "passes over the training images", "N")
    batch_size: int = option(32, parse.positive_int, "optimisation", "images per forward pass", "N")
    grad_accum: int = option(
        1, parse.positive_int, "optimisation", "batches whose gradients are averaged into one step", "N"
    )
    opt: str = choice("sgd", "optimisation", "gradfast's optimiser", "sgd", "adam", "adamw")
    lr: float | None = option(
        None,
        parse.non_negative,
        "optimisation",
        f"peak learning rate (default: {', '.join(f'{v:g} for {k}' for k, v in LEARNING_RATES.items())})",
        "RATE",
    )
    momentum: float = option(0.9, parse.fraction, "optimisation", "momentum of SGD", "FACTOR")
    weight_decay: float | None = option(
        None,
        parse.non_negative,
        "optimisation",
        f"L2 decay, decoupled for adamw (default: {', '.join(f'{v:g} for {k}' for k, v in WEIGHT_DECAYS.items())})",
        "FACTOR",
    )
    sched: str = choice(
        "one-cycle",
        "optimisation",
        "learning rate over the run: one-cycle (up for the first 30 %%, then down to nothing, by cosines), cosine, "
        "linear (to 0), step (times --decay-rate every --decay-epochs), constant",
        "one-cycle",
        "cosine",
        "linear",
        "step",
        "constant",
    )
    warmup_epochs: float = option(
        0.0,
        parse.non_negative,
        "optimisation",
        "rise linearly to --lr over this many epochs; for one-cycle, the length of its rise",
        "N",
    )
    decay_epochs: int = option(30, parse.positive_int, "optimisation", "--sched step: epochs between drops", "N")
    decay_rate: float = option(0.1, parse.positive, "optimisation", "--sched step: factor at each drop", "FACTOR")
    label_smoothing: float = option(
        0.0, parse.fraction, "optimisation", "share of each label spread over all classes", "SHARE"
    )
    class_weights: str = choice(
        "balanced",
        "optimisation",
        "weigh each class in the loss by the inverse of its number of images (balanced), or all alike (none)",
        "balanced",
        "none",
    )

    clip_grad: float | None = option(
        1.0,
        parse.clip_limit,
        "gradients",
        "scale gradients whose global norm is above this down to it, within the optimiser's pass; 0 or off: never",
        "NORM",
    )
    nonfinite: str = choice(
        "skip",
        "gradients",
        "on a NaN or infinite gradient: skip the step and count it, propagate it into the weights as torch does, or "
        "raise an error that names the layer",
        "skip",
        "propagate",
        "raise",
    )

    device: str = option(
        "auto", parse.text, "machine", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one", "DEVICE"
    )
    amp: str = choice(
        "off",
        "machine",
        "forward pass in mixed precision (--amp alone means bf16)",
        "off",
        "bf16",
        "fp16",
        bare="bf16",
    )
    channels_last: bool = switch("machine", "store images and weights channels-last, often faster for convolutions")
    seed: int = option(
        0, parse.seed, "machine", "fixes initial weights, split, order and augmentation; same seed, same run", "N"
    )

    resume: str | None = option(
        None,
        parse.text,
        "results",
        "continue a run exactly where it stopped: its folder, a checkpoint, or auto for the newest sound checkpoint of "
        "--output or of runs/; flags given beside it override the saved settings",
        "PATH|auto",
    )
    save_every_steps: int = option(
        0,
        parse.natural,
        "results",
        "also write last.pt after every so many optimiser steps, so that a power cut loses no more (default: after "
        "epochs only)",
        "N",
    )
    keep: int = option(
        0,
        parse.natural,
        "results",
        "keep the newest K checkpoints as step-N.pt too, for --resume auto to fall back on and for you to go back to",
        "K",
    )
    output: str | None = option(
        None,
        parse.text,
        "results",
        "folder for the results; must not exist or be empty (default: runs/MODEL-DATA-N, a new one)",
        "FOLDER",
    )

    def resolve(self) -> TrainConfig:
        """Fill in every setting that was left to the others (not `workers`, which depends on the data read).

        Raises:
            UserError: two settings contradict each other.
        """
        if self.amp == "fp16" and self.nonfinite != "skip":
            raise UserError("--amp fp16 needs --nonfinite skip: its loss scale is found by skipping steps")
        folder = self.data != "elpv"
        return dataclasses.replace(
            self,
            data=str(Path(self.data).expanduser().resolve()) if folder else self.data,
            augment=("crop" if folder else "dihedral") if self.augment == "auto" else self.augment,
            lr=LEARNING_RATES[self.opt] if self.lr is None else self.lr,
            weight_decay=WEIGHT_DECAYS[self.opt] if self.weight_decay is None else self.weight_decay,
        )

    def to_dict(self) -> dict[str, Any]:
        """What a later run needs to repeat this one; where results went and came from is not part of it."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in ("resume", "output") and value is not None
        } | {"clip_grad": self.clip_grad or 0.0}


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
