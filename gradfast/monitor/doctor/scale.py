"""Checks of scales: inputs, targets, loss, weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfast.monitor.doctor.finding import DROP_BAD, ERROR, WARNING, Finding, some
from gradfast.monitor.doctor.probe import Measurement, first_tensor, split_batch, takes
from gradfast.nn.graph import Structure
from gradfast.nn.layers import is_layer

# rms(W) sqrt(fan in): torch's default is 0.58, kaiming 1.4, torchvision's resnet50 0.3 to 2.8, GPT-2 in small 0.16.
SMALLEST_GAIN, LARGEST_GAIN = 0.02, 10.0


def inputs(batch: Any) -> Iterator[Finding]:
    values = first_tensor(split_batch(batch)[0])
    if values is None or not values.numel():
        return
    bad = (~torch.isfinite(values)).double().mean().item()
    if bad:
        yield Finding(
            "inputs",
            ERROR,
            "the batch itself holds NaN or infinity",
            f"{bad:.3%} of the inputs",
            DROP_BAD,
        )
        return
    rms = values.double().square().mean().sqrt().item()
    if rms > 20:
        yield Finding(
            "inputs",
            ERROR,
            "the inputs are not normalised",
            f"their rms is {rms:.3g}, their range {values.min().item():.3g} to {values.max().item():.3g}; layers "
            "expect about 1",
            "inputs = (inputs - inputs.mean()) / inputs.std()   # with the data set's; bytes of an image / 255 first",
        )


def loss_scale(found: Measurement, batch: Any, loss_fn: Callable[..., Tensor] | None) -> Iterator[Finding]:
    """The loss against the mean cross-entropy where this is classification, else by its gradient."""
    targets = split_batch(batch)[1] if loss_fn is None or takes(loss_fn, 2) else None
    output = found.output
    if not isinstance(output, Tensor) or not isinstance(targets, Tensor) or not math.isfinite(found.loss):
        return
    logits = _class_scores(output, targets)
    if logits is not None:
        yield from _classification(found, *logits)
    elif targets.is_floating_point():
        yield from _regression(found, output, targets)


def _class_scores(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """([n, K], [n]) where the targets are class numbers for the outputs; else None."""
    if targets.is_floating_point() or output.ndim != targets.ndim + 1 or not targets.numel():
        return None
    if output.shape[:-1] == targets.shape:
        scores = output.flatten(0, -2)
    elif output.shape[0] == targets.shape[0] and output.shape[2:] == targets.shape[1:]:
        scores = output.movedim(1, -1).flatten(0, -2)
    else:
        return None
    flat = targets.flatten()
    known = (flat >= 0) & (flat < scores.shape[1])
    return (scores[known], flat[known].long()) if known.any() else None


def _classification(found: Measurement, scores: Tensor, targets: Tensor) -> Iterator[Finding]:
    with torch.no_grad():
        mean = F.cross_entropy(scores.float(), targets).item()
    count, chance = len(targets), math.log(scores.shape[1])
    ratio = found.loss / mean if mean > 0 else math.inf
    if math.isfinite(mean) and mean > 0.05 and (ratio > 8 or 0 <= ratio < 0.02):
        summed = math.isclose(ratio, count, rel_tol=0.2)
        yield Finding(
            "loss-scale",
            ERROR,
            "the loss is a sum over the batch" if summed else "the loss is on the wrong scale",
            f"it is {found.loss:.4g}, {ratio:.4g} times the mean cross-entropy {mean:.4g} over {count} targets",
            'loss = F.cross_entropy(output, targets, reduction="mean")' if summed else f"loss = loss / {ratio:.3g}",
        )
    if mean > 3 * chance + 2:
        yield Finding(
            "logits",
            WARNING,
            "the model starts out sure and wrong",
            f"its cross-entropy is {mean:.4g}, where guessing among {scores.shape[1]} classes gives {chance:.3g}; the "
            f"logits' rms is {scores.double().square().mean().sqrt().item():.3g}",
            'gradfast.nn.init_model(model, "kaiming")   # or a last layer of std 0.01',
        )


def _regression(found: Measurement, output: Tensor, targets: Tensor) -> Iterator[Finding]:
    rms, own = (value.detach().double().square().mean().sqrt().item() for value in (targets, output))
    if rms > 50:
        yield Finding(
            "targets",
            ERROR,
            "the targets are not standardised",
            f"their rms is {rms:.4g}; the model's outputs have {own:.3g}",
            "targets = (targets - targets.mean()) / targets.std()   # with the data set's; undo it on predictions",
        )
    elif found.output_gradient > 100:
        yield Finding(
            "loss-scale",
            ERROR,
            "the loss is on the wrong scale",
            f"the norms of d loss / d output add up to {found.output_gradient:.4g} over the batch, where a mean over "
            f"samples gives about 1; the loss is {found.loss:.4g}",
            f'loss = loss / {found.output_gradient:.3g}   # a mean over the samples: reduction="mean"',
        )


def weights(model: nn.Module, found: Measurement, structure: Structure) -> Iterator[Finding]:
    yield from _constant(model, structure)
    last = {branch.layers[-1] for branch in structure.branches}
    normalised = _before_a_norm(found)
    odd: dict[str, float] = {}
    for passage in found.of_kind("layer"):
        size = passage.weight_gain
        if size is None or size == 0.0 or passage.name in normalised:
            continue
        if size > LARGEST_GAIN or (size < SMALLEST_GAIN and passage.name not in last):
            odd[passage.name] = size
    if odd:
        names = sorted(odd, key=lambda name: -abs(math.log(odd[name])))
        yield Finding(
            "weight-scale",
            ERROR,
            f"the initial weights of {some(names)} are too {'large' if odd[names[0]] > 1 else 'small'}",
            f"rms(W) sqrt(fan in) is {odd[names[0]]:.3g} in {names[0]}, where 0.2 to 3 is healthy",
            'gradfast.nn.init_model(model, "kaiming")',
            names,
        )


def _before_a_norm(found: Measurement) -> set[str]:
    """Layers whose output goes into a norm next, which takes their scale away."""
    passages = [passage for passage in found.passages if passage.kind != "other"]
    return {a.name for a, b in itertools.pairwise(passages) if a.kind == "layer" and b.kind == "norm"}


def _constant(model: nn.Module, structure: Structure) -> Iterator[Finding]:
    names, value = [], 0.0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if is_layer(module) and isinstance(weight, Tensor) and weight.numel() > 1 and weight.shape[0] > 1:
            first = weight.detach().flatten()[0].item()
            if first != 0 and bool((weight.detach() == first).all()):
                names.append(name)
                value = first
    zeros = _zero_layers(model, structure)
    if names or zeros:
        chosen = names or zeros
        yield Finding(
            "constant-weights",
            ERROR,
            f"all weights are the same in {some(chosen)}",
            f"every element is {value:g}: its units compute the same, get the same gradient, and stay the same",
            'gradfast.nn.init_model(model, "kaiming")',
            chosen,
        )


def _zero_layers(model: nn.Module, structure: Structure) -> list[str]:
    """Layers of zeros, but for those that start so on purpose: the last of a residual branch, and the output's."""
    layers = [(name, module) for name, module in model.named_modules() if is_layer(module)]
    allowed = {branch.layers[-1] for branch in structure.branches} | {name for name, _ in layers[-1:]}
    return [
        name
        for name, module in layers
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.numel()
        and name not in allowed
        and not weight.detach().any()
    ]
