"""Where and how a run computes."""

from __future__ import annotations

import dataclasses

from gradfast.train import parse
from gradfast.train.options.field import choice, option, switch


@dataclasses.dataclass(frozen=True)
class MachineOptions:
    """The settings of the group `machine`."""

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
