"""What a run learns, and how the settings of one task differ from another's."""

from __future__ import annotations

import dataclasses
from typing import Any

from gradfast.train.options.field import choice

# Of each task, the defaults that are not those of the fields.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "classify": {},
    "detect": {
        "data": "scenes",
        "model": "fasterrcnn_resnet50_fpn",
        "img_size": 192,
        "batch_size": 4,
        "lr": 0.01,
        "clip_grad": 10.0,
    },
}

# Settings that only one task has; to give them beside another is an error.
ONLY: dict[str, tuple[str, ...]] = {
    "classify": (
        *("auto_augment", "sampler", "init", "activation", "label_smoothing", "mixup", "cutmix"),
        *("random_erase", "dropout", "drop_path", "class_weights"),
    ),
    "detect": (
        *("trainable_backbone_layers", "frozen_norm", "anchor_size", "proposals", "proposal_batch", "box_batch"),
        "boxes_per_image",
    ),
}


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """The settings of the group `task`."""

    task: str = choice(
        "classify",
        "task",
        "what to learn: one class for each image (classify), or boxes around objects, each with a class (detect)",
        *TASK_DEFAULTS,
    )


def foreign(task: str) -> dict[str, str]:
    """The settings that `task` does not have, with the task that has them."""
    return {name: owner for owner, names in ONLY.items() if owner != task for name in names}
