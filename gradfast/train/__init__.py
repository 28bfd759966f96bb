"""``gradfast train``: data, models, the loop, checkpoints, and the command line around them.

The modules, in the order in which a run meets them::

    options, config    every setting, once: default, flag, YAML key, check, help text
    settings, recipes, cli      flags over YAML over recipes over defaults
    folder, elpv, split     which images there are, and which of them are held out
    images, augment, batches, data   from files to batches, whose order and augmentation depend on (seed, epoch, index)
    models, optimizers, schedule, criterion     what is trained, and how
    mixing, averaging       mixtures of images; the moving average of the weights
    step, loop, tally, metrics   one optimiser step; one epoch; the numbers it leaves behind
    progress, report, history, curves    what the user sees: bar or lines, CSV files, plots
    checkpoint, resume, output, claim    what must survive: checkpoints, the run folder, and that it has one writer
    interrupt, trainer, run              stopping cleanly; all of it tied together
    trained, preprocess, evaluate, predict, export   what is done with a checkpoint: loaded, measured, used

`load_model` is for programs that use what was trained.

Nothing here is imported by ``gradfast.clip`` or ``gradfast.optim``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradfast.train.trained import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is asked for: it takes torchvision, which `gradfast.train` does not."""
    if name in __all__:
        from gradfast.train import trained

        return getattr(trained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
