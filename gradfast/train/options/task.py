"""What a run learns, and in which defaults one task differs from another."""

from __future__ import annotations

import dataclasses
from typing import Any

from gradfast.train.options.field import choice

# Of each task, the defaults that are not those of the fields.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {"classify": {}}


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """The settings of the group `task`."""

    task: str = choice("classify", "task", "what to learn: the class of each image (classify)", *TASK_DEFAULTS)
