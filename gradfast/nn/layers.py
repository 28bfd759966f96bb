"""Which modules hold weights, which normalise, and how many inputs feed one output of a layer."""

from __future__ import annotations

import math

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's norms, and others by their name (RMSNorm, FrozenBatchNorm2d, ...)."""
    return isinstance(module, NORMS) or type(module).__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d"))


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a weight layer of a feed-forward path: linear, convolution or attention."""
    return isinstance(module, (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS, *TRANSPOSED))


def fans(module: nn.Module) -> tuple[float, float]:
    """Return (fan in, fan out): how many inputs feed one output, and how many outputs one input feeds.

    torch's own count, which sees only the weight's shape, is the same for linear layers and plain convolutions. Groups
    divide the outputs that an input feeds; a transposed convolution stores its weight the other way round, and spreads
    each input over stride^d times as many outputs. Where stride does not divide the kernel this is the mean.

    Raises:
        TypeError: the module is neither linear nor a convolution.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, CONVOLUTIONS):
        window = math.prod(module.kernel_size)
        return module.in_channels // module.groups * window, module.out_channels // module.groups * window
    if isinstance(module, TRANSPOSED):
        window = math.prod(module.kernel_size)
        stride = math.prod(int(step) for step in module.stride)
        return module.in_channels / module.groups * window / stride, module.out_channels / module.groups * window
    raise TypeError(f"fans: {type(module).__name__} is neither linear nor a convolution")
