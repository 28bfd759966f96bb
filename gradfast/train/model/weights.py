"""What ``--weights`` means: a file, or pre-trained weights of torchvision by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from gradfast.errors import UserError
from gradfast.extras import first_line


def find_weights(model: str, given: str) -> str | Mapping[str, Tensor]:
    """The file `given`, or the tensors of torchvision's weights of that name.

    Args:
        model: whose weights a short name such as IMAGENET1K_V2 or DEFAULT is among.
        given: a path; a short name; or a whole one, also of another model, such as ResNet50_Weights.IMAGENET1K_V2.

    Raises:
        UserError: there is neither, or they could not be fetched.
    """
    if Path(given).exists() or "/" in given or Path(given).suffix in (".pt", ".pth", ".bin", ".tar"):
        return given
    try:
        own = torchvision.models.get_model_weights(model)
        weights = torchvision.models.get_weight(given) if "." in given else own[given]
    except (KeyError, ValueError) as error:
        names = ", ".join([member.name for member in own] + ["DEFAULT"]) if len(own) else "none"
        raise UserError(
            f"--weights {given}: there is no such file, and torchvision has no such weights (for {model}: {names})"
        ) from error
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # the network, the disk, the checksum
        raise UserError(
            f"--weights {given}: could not be fetched from {weights.url} into {torch.hub.get_dir()}/checkpoints "
            f"({first_line(error)}); fetch the file elsewhere, and give its path"
        ) from error
    return state
