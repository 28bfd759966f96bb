"""Every setting of a training run, in one place: its default, flag, YAML key, check, group and help text.

The command line, the YAML file, ``config.yaml`` in the run folder and the checkpoint all read this dataclass, so a
new setting is one field, in a file of `options`. A field ``batch_size`` is the flag ``--batch-size`` and the YAML key
``batch_size`` (or ``batch-size``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradfast.errors import UserError
from gradfast.train.data.data_sets import DATA_SETS
from gradfast.train.options.data import DataOptions
from gradfast.train.options.detection import DetectionOptions
from gradfast.train.options.gradients import GradientsOptions
from gradfast.train.options.machine import MachineOptions
from gradfast.train.options.model import ModelOptions
from gradfast.train.options.optimisation import LEARNING_RATES, OptimisationOptions
from gradfast.train.options.regularisation import WEIGHT_DECAYS, RegularisationOptions
from gradfast.train.options.results import ResultsOptions
from gradfast.train.options.task import TASK_DEFAULTS, TaskOptions, foreign

# Torchvision's models whose residual blocks end in a norm that can start at zero.
RESNETS = ("resnet", "resnext", "wide_resnet")

# What --data knows by name, and how the images of each may be changed.
AUGMENTATIONS = {"elpv": "dihedral", **{name: described.augment for name, described in DATA_SETS.items()}}
NAMES = tuple(AUGMENTATIONS)


@dataclasses.dataclass(frozen=True)
class TrainConfig(
    ResultsOptions,
    MachineOptions,
    DetectionOptions,
    GradientsOptions,
    RegularisationOptions,
    OptimisationOptions,
    ModelOptions,
    DataOptions,
    TaskOptions,
):
    """The settings of one run. None means "decide from the others": see `resolve`."""

    def resolve(self) -> TrainConfig:
        """Fill in every setting that was left to the others (not `workers`, which depends on the data read).

        Raises:
            UserError: two settings contradict each other.
        """
        self.check_together()
        plain = self.init is None and self.norm != "none"
        filled: dict[str, Any] = {
            "data": self.data if self.data in NAMES else str(Path(self.data).expanduser().resolve()),
            "data_root": str(Path(self.data_root).expanduser().resolve()) if self.data in DATA_SETS else self.data_root,
            "augment": AUGMENTATIONS.get(self.data, "crop") if self.augment == "auto" else self.augment,
            "lr": LEARNING_RATES[self.opt],
            "weight_decay": WEIGHT_DECAYS[self.opt],
        }
        if self.task == "detect":
            filled |= {
                "augment": "flip" if self.augment == "auto" else self.augment,
                "trainable_backbone_layers": 5 if self.weights is None else 3,
                "frozen_norm": self.weights is not None and self.norm == "batch",
                "zero_init_residual": self.weights is None,
            }
        else:
            filled |= {
                "zero_init_residual": plain and self.model.startswith(RESNETS),
                "class_weights": "none" if self.sampler == "balanced" else "balanced",
            }
        always = ("data", "data_root", "augment")
        return dataclasses.replace(
            self, **{name: value for name, value in filled.items() if name in always or getattr(self, name) is None}
        )

    def check_together(self) -> None:
        if self.parallel == "fsdp" and self.task == "detect":
            raise UserError("--parallel fsdp does not go with --task detect, whose heads run once a scale; take ddp")
        for name, owner in foreign(self.task).items():
            if getattr(self, name) != FIELDS[name].default:
                raise UserError(f"{flag(name)} is a setting of --task {owner}, and this is --task {self.task}")
        if self.task == "detect":
            self.check_detection()
        if self.amp == "fp16" and self.nonfinite != "skip":
            raise UserError("--amp fp16 needs --nonfinite skip: its loss scale is found by skipping steps")
        if self.amp == "fp16" and self.on_spike == "backoff":
            raise UserError(
                "--on-spike backoff takes the steps that --amp fp16 skips to find its loss scale for spikes; take "
                "--amp bf16, or --on-spike rollback"
            )
        if self.clip_policy == "value" and self.clip_grad is None:
            raise UserError("--clip-policy value takes its limit from --clip-grad, which is off; give a magnitude")
        if self.nesterov and (self.opt != "sgd" or self.momentum == 0):
            raise UserError("--nesterov is a kind of momentum of --opt sgd; leave it out, or give --momentum above 0")
        if self.zero_init_residual and not (self.init is None and self.norm != "none"):
            raise UserError("--zero-init-residual sets a norm's weight that --init or --norm none would undo; take one")
        if self.zero_init_residual and self.task == "classify" and not self.model.startswith(RESNETS):
            raise UserError(f"--zero-init-residual: {self.model} has no residual blocks with a last norm; leave it out")
        if self.lr_find and self.resume:
            raise UserError("--lr-find tests the start of a run; instead of --resume give --weights, which is a start")
        if 0 < self.lr_find < 20:
            raise UserError(f"--lr-find {self.lr_find}: seven decades of rates take 20 steps at least")
        if self.norm == "none" and self.model.startswith(RESNETS) and self.init is None and self.weights is None:
            raise UserError("--norm none: without norms, residual blocks add up and explode; give --init fixup, too")

    def check_detection(self) -> None:
        if self.augment not in ("auto", "none", "flip", "dihedral"):
            raise UserError(f"--augment {self.augment} does not move boxes; --task detect takes none, flip or dihedral")
        if self.norm == "none":
            raise UserError("--norm none: a detector's ResNet needs norms; take batch or group")
        if self.frozen_norm and (self.norm != "batch" or self.weights is None):
            raise UserError("--frozen-norm keeps the batch norms of --weights; give those, and leave --norm at batch")
        if self.trainable_backbone_layers is not None and self.trainable_backbone_layers > 5:
            raise UserError("--trainable-backbone-layers: a ResNet has 5 stages; give 0 to 5")

    def to_dict(self) -> dict[str, Any]:
        """What a later run needs to repeat this one; where results went and came from is not part of it."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in ("resume", "output", "lr_find") and value is not None
        } | {"clip_grad": self.clip_grad or 0.0}


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def make_config(settings: Mapping[str, Any]) -> TrainConfig:
    """The resolved settings of a run, where those not given are the task's own or else the defaults.

    Raises:
        UserError: two settings contradict each other.
    """
    task = settings.get("task", FIELDS["task"].default)
    return TrainConfig(**{**TASK_DEFAULTS[task], **settings}).resolve()


def from_dict(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that `TrainConfig.to_dict` gave, as far as this gradfast knows them."""
    settings = {name: value for name, value in saved.items() if name in FIELDS}
    return settings | ({"clip_grad": None} if settings.get("clip_grad") == 0.0 else {})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
