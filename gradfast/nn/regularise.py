"""Dropout and stochastic depth in a finished model, parameter groups that decay what should decay, and penalties."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.extras import require
from gradfast.nn.graph import read_structure
from gradfast.nn.layers import CONVOLUTIONS, is_layer, is_norm


def _check_probability(p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"the probability must be at least 0 and below 1, not {p}")


def _drop_input(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.input_dropout(arguments[0]), *arguments[1:])


def _drop_branch(module: Any, _: Any, output: Tensor) -> Tensor:
    dropped: Tensor = module.stochastic_depth(output)
    return dropped


def add_dropout(model: nn.Module, p: float, where: str | Iterable[str] = "head") -> list[str]:
    """Drop inputs of layers with probability p while training (Srivastava et al. 2014); returns the layers' names.

    The dropout becomes a child of the layer that it precedes, `LAYER.input_dropout`, run by a forward hook: no
    parameter changes its name, so checkpoints still fit. Convolutions drop whole channels. Called again, it sets a
    new p.

    Args:
        where: "head" for the last linear layer, "all" for every weight layer but the first, or names of layers.

    Raises:
        ValueError: p is out of range, or no such layer.
    """
    _check_probability(p)
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    if where == "head":
        names = [name for name, module in layers.items() if isinstance(module, nn.Linear)][-1:]
    elif where == "all":
        names = [name for name in list(layers)[1:] if not isinstance(layers[name], nn.MultiheadAttention)]
    else:
        names = [where] if isinstance(where, str) else list(where)
    missing = [name for name in names if name not in layers]
    if missing or not names:
        raise ValueError(f"add_dropout: {missing[0] if missing else where!r} is no weight layer of the model")
    for name in names:
        layer = layers[name]
        fresh = not hasattr(layer, "input_dropout")
        kinds = dict(zip(CONVOLUTIONS, (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)))
        layer.input_dropout = kinds.get(type(layer), nn.Dropout)(p).train(layer.training)
        if fresh:
            layer.register_forward_pre_hook(_drop_input)
    return names


def add_stochastic_depth(model: nn.Module, p: float, mode: str = "row") -> list[str]:
    """Skip residual branches at random while training (Huang et al. 2016); returns the names of their last modules.

    The l-th of L branches is dropped with probability p * l / L and else divided by what remains, by
    torchvision.ops.StochasticDepth. It becomes a child of the branch's last layer, `LAYER.stochastic_depth`, run by a
    forward hook: no parameter changes its name. Called again, it sets a new p.

    Args:
        mode: "row" decides for each sample, "batch" once for all.

    Raises:
        ValueError: p is out of range, or the model has no residual branch that could be traced.
        UserError: torchvision is not installed.
    """
    _check_probability(p)
    ops = require("torchvision.ops", "train", "stochastic depth")
    ends = [branch.last for branch in read_structure(model).branches]
    ends = [name for name in ends if not isinstance(model.get_submodule(name), nn.MultiheadAttention)]
    if not ends:
        raise ValueError(f"add_stochastic_depth: no residual branch was found in {type(model).__name__}")
    for number, name in enumerate(ends, start=1):
        module = model.get_submodule(name)
        fresh = not hasattr(module, "stochastic_depth")
        module.stochastic_depth = ops.StochasticDepth(p * number / len(ends), mode).train(module.training)
        if fresh:
            module.register_forward_hook(_drop_branch)
    return ends


def param_groups(
    model: nn.Module, weight_decay: float, *, l1: float = 0.0, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Two parameter groups for any optimiser: weights, which decay, and norms, biases and single numbers, which do not.

    The optimiser sees names with the parameters, so that messages name layers. Shared and frozen parameters: the first
    come once, the second not at all.

    Args:
        l1: L1 decay of the weights; only gradfast's optimisers know it.
        decay_embeddings: False puts embeddings into the second group.

    Returns:
        `[{"params": [(name, parameter), ...], "weight_decay": ...}, ...]`, empty groups left out.
    """
    still: set[int] = set()
    for module in model.modules():
        if is_norm(module) or (isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not decay_embeddings):
            still.update(id(parameter) for parameter in module.parameters(recurse=False))
    groups: list[list[tuple[str, nn.Parameter]]] = [[], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = id(parameter) in still or parameter.ndim <= 1 or name.rpartition(".")[2].endswith("bias")
            groups[exempt].append((name, parameter))
    decays = (weight_decay, 0.0), (l1, 0.0)
    made = [{"params": groups[i], "weight_decay": decays[0][i]} | ({"l1": decays[1][i]} if l1 else {}) for i in (0, 1)]
    return [group for group in made if group["params"]]


def weight_penalty(model: nn.Module, *, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    """l1 * sum |w| + l2 / 2 * sum w^2 over what `param_groups` lets decay: a 0-d tensor to add to the loss.

    For optimisers without decay of their own. gradfast's have both (`weight_decay=`, `l1=`), in the same pass.
    """
    decayed = [group["params"] for group in param_groups(model, 1.0) if group["weight_decay"]]
    weights = [weight for group in decayed for _, weight in group]
    return torch.stack([l1 * weight.abs().sum() + l2 / 2 * weight.square().sum() for weight in weights]).sum()
