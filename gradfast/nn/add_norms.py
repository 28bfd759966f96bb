"""Put normalisation into a model that has none: of the signal, by groups of channels, or of the weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrizations, parametrize

from gradfast.nn.graph import read_structure
from gradfast.nn.layers import CONVOLUTIONS, TRANSPOSED
from gradfast.nn.norms import group_count


def add_group_norm(model: nn.Module, groups: int = 32) -> list[str]:
    """Put a GroupNorm behind every convolution that has no norm behind it; returns the convolutions' names.

    It normalises over each sample's own channels and places, and so does the same for any size of batch (Wu and He
    2018). Networks for detection that were not pre-trained need it, with the small batches that they have (He,
    Girshick, Dollar 2019). A convolution that is followed by no activation puts out predictions, and is left as it is.

    The convolution and its norm become an `nn.Sequential` in the convolution's place: parameters change their names
    from `NAME.weight` to `NAME.0.weight`. Load checkpoints before, build the optimiser after.

    Args:
        groups: how many, at most; see `group_count`.

    Raises:
        ValueError: no convolution could be given a norm.
    """
    structure = read_structure(model)
    names = [
        name
        for name, module in model.named_modules()
        if name
        and isinstance(module, CONVOLUTIONS)
        and name not in structure.normalised
        and structure.after.get(name, "linear") != "linear"
    ]
    if not names:
        raise ValueError(
            f"add_group_norm: {type(model).__name__} has no convolution that is followed by an activation and by no "
            "norm, or torch.fx cannot trace it"
        )
    for name in names:
        parent, _, own = name.rpartition(".")
        convolution: Any = model.get_submodule(name)
        weight, channels = convolution.weight, convolution.out_channels
        norm = nn.GroupNorm(group_count(channels, groups), channels, device=weight.device, dtype=weight.dtype)
        setattr(model.get_submodule(parent), own, nn.Sequential(convolution, norm).train(convolution.training))
    return names


def add_spectral_norm(model: nn.Module, power_iterations: int = 1) -> list[str]:
    """Divide the weight of every linear layer and convolution by its largest singular value; returns their names.

        W = V / sigma(V),    sigma by `power_iterations` steps of the power method at each forward pass in training

    Between activations of slope 1 at most the model is then a function of slope 1 at most, which bounds the critic of a
    GAN (Miyato et al. 2018), and the gradient that comes through any stack of layers. Of a convolution it is the matrix
    of outputs by inputs x window, whose singular value bounds the operator's up to a factor of the window.

    This is `torch.nn.utils.parametrizations.spectral_norm` on all layers that have none yet. Parameters change their
    names from `NAME.weight` to `NAME.parametrizations.weight.original`: initialise the model and load checkpoints
    before, build the optimiser after.

    Raises:
        ValueError: there is no such layer.
    """
    layers = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
    names = [name for name, module in model.named_modules() if isinstance(module, layers)]
    if not names:
        raise ValueError(f"add_spectral_norm: {type(model).__name__} has no linear layer and no convolution")
    fresh = [name for name in names if not parametrize.is_parametrized(model.get_submodule(name), "weight")]
    for name in fresh:
        parametrizations.spectral_norm(model.get_submodule(name), n_power_iterations=power_iterations)
    return fresh
