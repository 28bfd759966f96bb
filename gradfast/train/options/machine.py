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
    parallel: str = choice(
        "auto",
        "machine",
        "what the processes of torchrun have: ddp (each the whole model) or fsdp (each a shard of every block); auto "
        "is ddp where there are several",
        "auto",
        "none",
        "ddp",
        "fsdp",
    )
    sync_bn: bool = switch(
        "machine", "batch norms see the images of all processes, not each its own part's: the result of one process"
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
    compile: str = choice(
        "off",
        "machine",
        "compile the model by torch.compile (--compile alone means inductor, which needs a C++ compiler, and triton on "
        "a GPU); the first steps take minutes",
        "off",
        "inductor",
        "aot_eager",
        "eager",
        bare="inductor",
    )
    deterministic: bool = switch(
        "machine",
        "take the device's deterministic algorithms alone, slower ones where need be: same seed, same bits, on a GPU, "
        "too; an operation that has none ends the run",
    )
    seed: int = option(
        0, parse.seed, "machine", "fixes initial weights, split, order and augmentation; same seed, same run", "N"
    )
