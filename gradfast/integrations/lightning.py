"""Lightning: the Trainer's `gradient_clip_val` inside gradfast's step, in every precision, and once only."""

from __future__ import annotations

from typing import Any

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # the same under its old name

from gradfast.errors import UserError
from gradfast.integrations.limit import lower_limit, unwrapped
from gradfast.optim.base import ClippedOptimizer


class ClipInStep(pl.Callback):
    """Hands the Trainer's `gradient_clip_val` to gradfast's optimisers, and logs the gradient norm.

        trainer = Trainer(gradient_clip_val=1.0, precision="16-mixed", callbacks=[ClipInStep()])

    Without it, Lightning clips by itself before the step, and the optimiser's `max_norm` would clip once more; under
    `16-mixed` Lightning refuses, since an optimiser that unscales inside its step must also clip there. With it, the
    smaller of `gradient_clip_val` and the optimiser's own `max_norm` is applied once, inside the step, and
    `gradient_clip_val` is None while fitting. Without `gradient_clip_val` nothing but the logging is done: there
    `max_norm=` of the optimiser needs no callback.

    Args:
        log: name under which the global gradient norm before clipping is logged each step; None for none. With several
            optimisers a number is appended.

    Raises:
        UserError: at the start of fitting, if `gradient_clip_algorithm` is "value", or only some of the module's
            optimisers are gradfast's.
    """

    def __init__(self, log: str | None = "grad_norm") -> None:
        super().__init__()
        self.log_name = log
        self._trainers_value: Any = None
        self._own: list[float | None] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the limit from the Trainer."""
        value = self._trainers_value = trainer.gradient_clip_val
        optimizers = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        ours = [optimizer for optimizer in optimizers if isinstance(optimizer, ClippedOptimizer)]
        self._own = [optimizer.max_norm for optimizer in ours]
        if not value or not ours:
            return
        if str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)) == "value":
            raise UserError(
                'gradient_clip_algorithm="value" cannot be done inside the step: use "norm", or leave ClipInStep and '
                "max_norm out"
            )
        if len(ours) != len(optimizers):
            others = sorted({type(o).__name__ for o in optimizers if not isinstance(o, ClippedOptimizer)})
            raise UserError(
                f"gradient_clip_val={value} with ClipInStep needs all optimizers to be gradfast's, but there is "
                f"{', '.join(others)}: convert it with gradfast.from_torch, or set max_norm on gradfast's alone"
            )
        for optimizer, own in zip(ours, self._own, strict=True):
            lower_limit(optimizer, own, float(value), 2.0)
        trainer.gradient_clip_val = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log the norm of the last step."""
        if self.log_name is None:
            return
        for number, wrapped in enumerate(trainer.optimizers):
            optimizer = unwrapped(wrapped)
            if isinstance(optimizer, ClippedOptimizer) and optimizer._engine is not None:
                name = self.log_name if len(trainer.optimizers) == 1 else f"{self.log_name}_{number}"
                pl_module.log(name, optimizer.grad_norm, on_step=True, on_epoch=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the limit back where fitting ends by an error or by Ctrl-C, too: a Trainer may be used again."""
        if trainer.training:
            self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the limit back."""
        trainer.gradient_clip_val = self._trainers_value
        ours = [o for o in map(unwrapped, trainer.optimizers) if isinstance(o, ClippedOptimizer)]
        for optimizer, own in zip(ours, self._own, strict=False):
            optimizer.max_norm = own
