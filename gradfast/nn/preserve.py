"""Look into a model by running it, and leave no trace: buffers, gradients, modes and random state as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def preserved(model: nn.Module, parameters: bool = False) -> Iterator[None]:
    """Restore a model bit for bit when the block ends, however it ends.

    Restored are the buffers (batch norm's statistics), `.grad` of every parameter (the same tensors, untouched, since
    they are set aside while the block runs), training modes, and the random state of the CPU and of the model's GPUs.

    Args:
        parameters: restore the parameters' values too; costs a copy of them.
    """
    weights = list(model.parameters())
    gradients = [parameter.grad for parameter in weights]
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        kept = [(tensor, tensor.clone()) for tensor in (*(weights if parameters else ()), *model.buffers())]
    devices = sorted({tensor.device.index for tensor in (*weights, *model.buffers()) if tensor.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            for parameter in weights:
                parameter.grad = None
            yield
    finally:
        with torch.no_grad():
            for tensor, copy in kept:
                tensor.copy_(copy)
        for parameter, gradient in zip(weights, gradients):
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
