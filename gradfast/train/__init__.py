"""``gradfast train``: data, models, the loop, checkpoints, and the command line around them.

The modules, in the order in which a run meets them::

    config      every setting, once: default, flag, YAML key, check, help text
    cli         flags over YAML over defaults
    folder, elpv, split     which images there are, and which of them are held out
    images, augment, data   from files to batches; order and augmentation depend on (seed, epoch, index) only
    models, optimizers, schedule, criterion     what is trained, and how
    step, loop, tally, metrics   one optimiser step; one epoch; the numbers it leaves behind
    progress, history, curves    what the user sees: bar or lines, CSV files, plots
    files, checkpoint, output    what must survive: atomic writes, checkpoints, the run folder
    interrupt, run               stopping cleanly; all of it tied together

Nothing here is imported by ``gradfast.clip`` or ``gradfast.optim``.
"""
