"""``gradfast train``: data, models, the loop, checkpoints, and the command line around them.

What a run meets, in this order::

    options, config, parse   every setting, once: default, flag, YAML key, check, help text
    settings, recipes, cli   flags over YAML over recipes over defaults
    machine      device, precision, and the processes of `torchrun`
    tasks        what classification and detection do each in its own way; `coco` is detection's data and measure
    data         from files to batches, whose order and augmentation depend on (seed, epoch, index) alone
    model        what is trained and by what: weights, changes of the model, loss, optimiser, average
    schedule, step, loop     the learning rate; one optimiser step; one epoch
    spikes, stopwatch        the guard beside the run; where its time goes
    results      what the user sees and what must survive: lines, tables, curves, logs, checkpoints, one writer a folder
    interrupt, trainer, run  stopping cleanly; all of it tied together
    lr_find      the range test of the learning rate
    trained      what is done with a checkpoint: loaded, measured, used, exported

`load_model` is for programs that use what was trained.

Nothing here is imported by ``gradfast.clip`` or ``gradfast.optim``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradfast.train.trained.load import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is asked for: it takes torchvision, which `gradfast.train` does not."""
    if name in __all__:
        from gradfast.train.trained import load as trained

        return getattr(trained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
