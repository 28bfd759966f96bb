"""HF Trainer: `max_grad_norm` applied inside gradfast's step, once; `grad_norm` is logged as ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from gradfast.integrations.accelerate import clip_in_step
from gradfast.integrations.limit import unwrapped
from gradfast.optim.base import ClippedOptimizer


class ClipInStep(transformers.TrainerCallback):
    """Has the Trainer's `max_grad_norm` done by the step of gradfast's optimiser.

        trainer = Trainer(..., optimizer_cls_and_kwargs=(gradfast.AdamW, {"lr": 1e-4}))
        trainer.add_callback(ClipInStep(trainer))

    Without it the Trainer clips (or, with `max_grad_norm=0`, only measures, for its log) in passes of its own before
    the step, and a `max_norm` of the optimiser would clip once more. With it both are one: the smaller of
    `max_grad_norm` and the optimiser's `max_norm`, in the step; and the logged `grad_norm`, before clipping, comes from
    there. With another optimiser it does nothing.

    Args:
        trainer: the Trainer that it is added to.
    """

    def __init__(self, trainer: transformers.Trainer) -> None:
        self.trainer = trainer
        self._undo: Callable[[], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Take over the accelerator's clipping for the optimiser that the Trainer has made."""
        optimizer = objects.get("optimizer") or self.trainer.optimizer
        if isinstance(unwrapped(optimizer), ClippedOptimizer):
            self._undo = clip_in_step(self.trainer.accelerator, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Give it back."""
        if self._undo is not None:
            self._undo()
            self._undo = None
