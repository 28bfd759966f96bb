"""The optimiser, the learning rate and the length of the run."""

from __future__ import annotations

import dataclasses

from gradfast.train import parse
from gradfast.train.options.field import choice, option, switch

# SGD's comes from the trials behind the default run; Lion's authors take a tenth of AdamW's.
LEARNING_RATES = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3, "lion": 1e-4}


@dataclasses.dataclass(frozen=True)
class OptimisationOptions:
    """The settings of the group `optimisation`."""

    epochs: int = option(8, parse.positive_int, "optimisation", "passes over the training images", "N")
    batch_size: int = option(
        32, parse.positive_int, "optimisation", "images per forward pass, of all processes together", "N"
    )
    grad_accum: int = option(
        1, parse.positive_int, "optimisation", "batches whose gradients are averaged into one step", "N"
    )
    opt: str = choice("sgd", "optimisation", "gradfast's optimiser", *LEARNING_RATES)
    lr: float | None = option(
        None,
        parse.non_negative,
        "optimisation",
        f"peak learning rate (default: {', '.join(f'{value:g} for {name}' for name, value in LEARNING_RATES.items())})",
        "RATE",
    )
    lr_find: int = option(
        0,
        parse.natural,
        "optimisation",
        "do not train, but look for --lr: so many steps (100 if not said) with a rising rate; draws "
        "lr_find.png, suggests a rate and prints the command that takes it",
        "STEPS",
        bare="100",
    )
    momentum: float = option(0.9, parse.fraction, "optimisation", "momentum of SGD", "FACTOR")
    nesterov: bool = switch("optimisation", "Nesterov's momentum, for SGD")
    sched: str = choice(
        "one-cycle",
        "optimisation",
        "learning rate over the run: one-cycle (up, then down to nothing, by cosines), cosine, linear (to 0), poly "
        "((1 - t)^--poly-power), step (times --decay-rate every --decay-epochs), multistep (times --decay-rate after "
        "each of --decay-milestones), plateau (times --decay-rate after --patience epochs without a lower held-out "
        "loss), constant",
        "one-cycle",
        "cosine",
        "linear",
        "poly",
        "step",
        "multistep",
        "plateau",
        "constant",
    )
    warmup_epochs: float = option(
        1.0,
        parse.non_negative,
        "optimisation",
        "rise to --lr over this many epochs, linearly, or for one-cycle by a cosine (0: over 30 %% of the run)",
        "N",
    )
    decay_epochs: int = option(30, parse.positive_int, "optimisation", "--sched step: epochs between drops", "N")
    decay_milestones: str = option(
        "30,60,80", parse.milestones, "optimisation", "--sched multistep: epochs after which it drops", "N,N,..."
    )
    decay_rate: float = option(0.1, parse.positive, "optimisation", "the factor at each drop", "FACTOR")
    poly_power: float = option(0.9, parse.positive, "optimisation", "--sched poly: the exponent", "POWER")
    patience: int = option(
        5, parse.natural, "optimisation", "--sched plateau: epochs without a lower held-out loss before it drops", "N"
    )
