"""Start from somebody's weights: the surest initialisation of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.errors import UserError

_WRAPPERS = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, Lightning
_CONTAINERS = ("state_dict", "model", "model_state_dict", "model_ema")  # where checkpoints keep the weights


@dataclass
class Loaded:
    """What `load_pretrained` did, by the model's names.

    Attributes:
        loaded: copied.
        reshaped: left as they were, since the file's array has another shape: usually the classifier.
        missing: left as they were, since the file has no such name.
        unused: names that only the file has.
    """

    loaded: list[str]
    reshaped: list[str]
    missing: list[str]
    unused: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for label in ("reshaped", "missing", "unused"):
            names = getattr(self, label)
            if names:
                parts.append(f"{len(names)} {label} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})")
        return "; ".join(parts)


def load_pretrained(model: nn.Module, source: str | Path | Mapping[str, Any]) -> Loaded:
    """Copy what fits from a checkpoint into a model, and say what did not.

    Arrays are matched by name, without the prefixes that wrappers add, and must have the same shape; those of another
    shape, as a classifier of other classes, stay as the model had them.

    Args:
        source: a file that torch.save wrote (read with weights_only=True), or a state dict.

    Raises:
        UserError: the file cannot be read, or fewer than half of the model's parameters are in it.
    """
    found = read_weights(source)
    own = model.state_dict()
    loaded = [name for name in own if name in found and found[name].shape == own[name].shape]
    reshaped = [name for name in own if name in found and found[name].shape != own[name].shape]
    wanted = [name for name, _ in model.named_parameters()]
    fitting = len(set(loaded) & set(wanted))
    if 2 * fitting < len(wanted):
        raise UserError(
            f"only {fitting} of the {len(wanted)} parameters of {type(model).__name__} are in the checkpoint, whose "
            f"names begin with {', '.join(list(found)[:3]) or '(none)'}; it is of another model"
        )
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(found[name])
    missing = [name for name in own if name not in found]
    return Loaded(loaded, reshaped, missing, [name for name in found if name not in own])


def read_weights(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without what wrappers put before the names.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    content: Any = source
    if not isinstance(source, Mapping):
        try:
            content = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises what the damage happens to cause
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"cannot read weights from {source}: {reason}") from error
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UserError(f"{source} holds a {type(content).__name__}, not a dict of tensors by name")
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    while weights:
        prefix = next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights
