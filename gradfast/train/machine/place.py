"""Where a model computes, and in which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfast.errors import UserError
from gradfast.train.machine.processes import World

# The customary statistics of natural photographs, for pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STANDARD_DEVIATION = (0.229, 0.224, 0.225)

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """A device and a precision.

    Attributes:
        amp: type of the mixed-precision forward pass, or None.
        memory_format: of images and weights.
    """

    device: torch.device
    amp: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    @classmethod
    def of(cls, device: torch.device, amp: str, channels_last: bool) -> Place:
        """As ``--amp`` and ``--channels-last`` say."""
        return cls(device, AMP_TYPES[amp], torch.channels_last if channels_last else torch.contiguous_format)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.amp) if self.amp else contextlib.nullcontext()


def normaliser(device: torch.device) -> Callable[[Tensor], Tensor]:
    """(x / 255 - mean) / deviation of each channel, for images [n, 3, height, width] uint8."""
    shape = (1, 3, 1, 1)
    mean = torch.tensor(MEAN, device=device).mul(255).view(shape)
    deviation = torch.tensor(STANDARD_DEVIATION, device=device).mul(255).view(shape)
    return lambda images: (images.float() - mean) / deviation


def unit_range(images: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """[3, height, width] float32 in [0, 1] each, of uint8, as a detector takes them: it normalises and resizes."""
    return [image.to(device, non_blocking=True).float().div_(255) for image in images]


def choose_device(name: str, world: World | None = None) -> torch.device:
    """The device of ``--device``; of several processes on a machine, each has a GPU of its own.

    Raises:
        UserError: there is no such device, it does not work here, or there is not one for each process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world is not None and world.size > 1 and name.startswith("cuda") and torch.cuda.is_available():
        if name != "cuda" or torch.cuda.device_count() < world.local_size:
            raise UserError(
                f"--device {name} with {world.local_size} processes on a machine that has {torch.cuda.device_count()} "
                "GPUs: each takes one of its own, so start no more of them than GPUs, with --device cuda"
            )
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} does not work here: {str(error).strip().splitlines()[0]}") from error
    return device
