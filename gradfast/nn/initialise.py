"""`init_model`: initialise a whole model so that the signal keeps its size through every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradfast.nn.gains import activation_name, check_activation, gain
from gradfast.nn.graph import Branch, Structure, read_structure
from gradfast.nn.layers import CONVOLUTIONS, RECURRENT, TRANSPOSED, fans, is_layer, is_norm
from gradfast.nn.lsuv import scale_to_unit_variance

METHODS = ("kaiming", "xavier", "orthogonal", "lsuv", "fixup", "zero-residual", "gpt2", "small")


@dataclass
class LayerInit:
    """What was done to one layer.

    Attributes:
        treatment: in words, as "kaiming normal, gain 1.414 (relu)".
        std: standard deviation of its weight now.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    treatment: str
    std: float


@dataclass
class InitReport:
    """What `init_model` did. Printed, it holds a line per treatment; `layers` holds them one by one.

    Attributes:
        layers: the weight layers, in order of registration.
        norms: how many normalisation layers were set to scale 1, shift 0.
        untouched: names of parameters that were left alone, as belonging to no layer that is known here.
    """

    method: str
    layers: list[LayerInit] = field(default_factory=list)
    norms: int = 0
    untouched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        alike: dict[tuple[str, str], list[LayerInit]] = {}
        for layer in self.layers:
            alike.setdefault((layer.kind, layer.treatment), []).append(layer)
        lines = [f"init_model: {self.method}, {len(self.layers)} layers"]
        for (kind, treatment), layers in alike.items():
            low, high = min(layer.std for layer in layers), max(layer.std for layer in layers)
            spread = f"{low:.2g}" if math.isclose(low, high, rel_tol=0.05) else f"{low:.2g} to {high:.2g}"
            where = layers[0].name + (f" ... {layers[-1].name}" if len(layers) > 1 else "")
            lines.append(f"  {len(layers):4d} {kind}: {treatment}; std {spread}  ({where})")
        if self.norms:
            lines.append(f"  {self.norms:4d} norms: scale 1, shift 0")
        if self.untouched:
            lines.append(f"  left alone: {', '.join(self.untouched)}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@torch.no_grad()
def init_model(
    model: nn.Module,
    method: str = "kaiming",
    *,
    mode: str = "fan_in",
    activation: str | None = None,
    std: float = 0.02,
    scale_residual: bool = True,
    batch: Any = None,
    verbose: bool = True,
) -> InitReport:
    """Initialise every layer of a model in place, each with the gain of the activation that follows it.

    What follows a layer is read from the traced graph; where a part cannot be traced, from the order of registration.
    Biases become 0, norms scale 1 and shift 0 with fresh statistics, embeddings normal with std 1 / sqrt(dim),
    recurrent layers xavier for the inputs and orthogonal for the states, with forget gates open (bias 1). Shared
    weights are drawn once. Draws come from torch's global generator. With n = fan in, or as `mode` says, and gain a:

        "kaiming"        normal, std a / sqrt(n)                                           (He et al. 2015)
        "xavier"         normal, std a * sqrt(2 / (fan in + fan out))                      (Glorot and Bengio 2010)
        "orthogonal"     orthogonal rows or columns, times a                               (Saxe et al. 2014)
        "lsuv"           orthogonal, then each layer scaled by its measured output: needs `batch` (Mishkin, Matas 2016)
        "fixup"          kaiming over fan out; the m layers of each of L residual branches times L^(-1/(2m-2)), the last
                         of each and the classifier 0                                      (Zhang, Dauphin, Ma 2019)
        "zero-residual"  kaiming; the last norm of each residual branch, or its last layer, 0   (Goyal et al. 2017)
        "gpt2"           normal, std 0.02, embeddings too                                  (Radford et al. 2019)
        "small"          normal, std `std`

    The branches of a residual stream that no norm holds back add up: each of L branches without a norm at its end (so
    also every pre-norm transformer) has its last layer divided by sqrt(L), as GPT-2 does. `scale_residual=False` leaves
    that out.

    Args:
        mode: "fan_in" keeps the signal's size forward, "fan_out" the gradient's size backward; kaiming only.
        activation: taken instead of what follows each layer but the last.
        std: for "small" only.
        batch: for "lsuv" only: a tensor, or a tuple or dict of arguments for the model.
        verbose: print the report.

    Returns:
        What was done, layer by layer.

    Raises:
        ValueError: an argument is not one of those named, a needed batch is missing, or "fixup" or "zero-residual"
            finds no residual branch; or a weight is computed from another, as under spectral norm.
    """
    _check(method, mode, activation, batch)
    _check_weights_are_parameters(model)
    structure = read_structure(model)
    if method in ("fixup", "zero-residual") and not structure.branches:
        raise ValueError(
            f"init_model(..., {method!r}): no residual branch was found in {type(model).__name__}; its forward cannot "
            "be traced, or adds nothing to a shortcut. Use 'kaiming' or 'orthogonal'"
        )
    report = InitReport(method)
    Initialiser(model, structure, method, mode, activation, std, report).run()
    if method == "fixup":
        _fixup(model, structure.branches, report)
    elif method == "zero-residual":
        _zero_last(model, structure.branches, report)
    elif scale_residual and method != "lsuv":
        _scale_residual(model, structure.branches, report)
    if method == "lsuv":
        scale_to_unit_variance(model, batch, lambda name, note: _note(report, name, note))
    _finish(model, report)
    if verbose:
        print(report)
    return report


def _check(method: str, mode: str, activation: str | None, batch: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"there is no initialisation {method!r}; known are {', '.join(METHODS)}")
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out', not {mode!r}")
    if activation is not None:
        check_activation(activation)
    if method == "lsuv" and batch is None:
        raise ValueError("init_model(..., 'lsuv') measures the layers' outputs: give it batch=")


def _check_weights_are_parameters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):  # what is filled in would be a temporary, and nobody would know
            raise ValueError(
                f"init_model: the weight of {name!r} is computed by a parametrization, such as spectral norm; "
                "initialise the model first and add that after"
            )


class Initialiser:
    """Goes through the modules once; every known kind has its method."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        method: str,
        mode: str,
        activation: str | None,
        std: float,
        report: InitReport,
    ) -> None:
        self.model, self.method, self.mode, self.std, self.report = model, method, mode, std, report
        self.done: set[int] = set()
        self.activations = {**_following_in_order(model), **structure.after}
        if activation is not None:
            last = list(self.activations)[-1:]
            self.activations = {name: activation for name in self.activations if name not in last}

    def run(self) -> None:
        for name, module in self.model.named_modules():
            if is_norm(module):
                self.norm(module)
            elif isinstance(module, nn.MultiheadAttention):
                self.attention(name, module)
            elif isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
                self.layer(name, module)
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                self.embedding(name, module)
            elif isinstance(module, RECURRENT):
                self.recurrent(name, module)
        self.report.untouched = [
            name for name, parameter in self.model.named_parameters() if id(parameter) not in self.done
        ]

    def first_time(self, *parameters: Tensor | None) -> bool:
        """Mark parameters as done; False where the first of them was done before, as a weight shared with another."""
        fresh = id(parameters[0]) not in self.done
        self.done.update(id(parameter) for parameter in parameters if parameter is not None)
        return fresh

    def add(self, name: str, module: nn.Module, weight: Tensor, treatment: str) -> None:
        self.report.layers.append(LayerInit(name, type(module).__name__, tuple(weight.shape), treatment, 0.0))

    # ---------------------------------------------------------------- kinds of modules

    def norm(self, module: nn.Module) -> None:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor):
            nn.init.ones_(weight)
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)
        reset = getattr(module, "reset_running_stats", None)
        if callable(reset):
            reset()
        self.first_time(weight, bias)
        self.report.norms += 1

    def layer(self, name: str, module: Any) -> None:
        if not self.first_time(module.weight, module.bias):
            return
        activation = self.activations.get(name, "linear")
        fan_in, fan_out = fans(module)
        treatment = self.fill(module.weight, fan_in, fan_out, activation, getattr(module, "groups", 1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        self.add(name, module, module.weight, treatment)

    def attention(self, name: str, module: nn.MultiheadAttention) -> None:
        """Queries, keys and values are three layers, whether they share one array or not."""
        if module.in_proj_weight is not None:
            pieces = list(module.in_proj_weight.chunk(3))
        else:
            pieces = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        for piece in pieces:
            treatment = self.fill(piece, piece.shape[1], piece.shape[0], "linear")
        for bias in (module.in_proj_bias, module.bias_k, module.bias_v):
            if bias is not None:
                nn.init.zeros_(bias)
        whole = pieces[0] if module.in_proj_weight is None else module.in_proj_weight
        self.first_time(whole, *pieces, module.in_proj_bias, module.bias_k, module.bias_v)
        self.add(name, module, whole, treatment)

    def embedding(self, name: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
        if not self.first_time(module.weight):
            return
        std = {"gpt2": 0.02, "small": self.std}.get(self.method, module.embedding_dim**-0.5)
        nn.init.normal_(module.weight, std=std)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
        self.add(name, module, module.weight, f"normal, std {std:.3g}")

    def recurrent(self, name: str, module: nn.Module) -> None:
        """Gate by gate: the gates of an LSTM or a GRU are stacked in one array, of `hidden_size` rows each."""
        size: int = module.hidden_size  # type: ignore[assignment]
        for own_name, parameter in module.named_parameters(recurse=False):
            self.first_time(parameter)
            if own_name.startswith("bias"):
                nn.init.zeros_(parameter)
                if isinstance(module, (nn.LSTM, nn.LSTMCell)) and own_name.startswith("bias_ih"):
                    nn.init.ones_(parameter[size : 2 * size])  # the forget gate (Jozefowicz et al. 2015)
                continue
            for gate in parameter.split(size if parameter.shape[0] % size == 0 else parameter.shape[0]):
                if own_name.startswith("weight_hh"):
                    nn.init.orthogonal_(gate)
                else:
                    nn.init.xavier_normal_(gate)
            kind = "orthogonal" if own_name.startswith("weight_hh") else "xavier normal"
            self.add(f"{name}.{own_name}" if name else own_name, module, parameter, f"{kind}, gate by gate")

    # ---------------------------------------------------------------- one weight

    def fill(self, weight: Tensor, fan_in: float, fan_out: float, activation: str, groups: int = 1) -> str:
        """Draw one weight; returns what was done, in words."""
        factor = gain(activation)
        words = f"gain {factor:.4g} ({activation})"
        if self.method in ("gpt2", "small"):
            std = 0.02 if self.method == "gpt2" else self.std
            nn.init.normal_(weight, std=std)
            return f"normal, std {std:g}"
        if self.method in ("orthogonal", "lsuv"):
            for group in weight.chunk(groups):
                nn.init.orthogonal_(group, factor)
            return f"orthogonal, {words}"
        if self.method == "xavier":
            nn.init.normal_(weight, std=factor * math.sqrt(2.0 / (fan_in + fan_out)))
            return f"xavier normal, {words}"
        mode = "fan_out" if self.method == "fixup" else self.mode
        nn.init.normal_(weight, std=factor / math.sqrt(fan_in if mode == "fan_in" else fan_out))
        return f"kaiming normal over {mode.replace('_', ' ')}, {words}"


def _following_in_order(model: nn.Module) -> dict[str, str]:
    """Weight layer -> the activation registered after it and before the next layer; "linear" where there is none."""
    following: dict[str, str] = {}
    layer = ""
    for name, module in model.named_modules():
        if is_layer(module):
            layer = name
            following[layer] = "linear"
        elif (found := activation_name(module)) is not None and following.get(layer) == "linear":
            following[layer] = found
    return following


# -------------------------------------------------------------------- residual branches


def _weights(module: nn.Module) -> list[Tensor]:
    """What scales a layer's output: its weight and its bias; of attention, those of its last projection."""
    layer = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
    return [value for value in (layer.weight, layer.bias) if isinstance(value, Tensor)]


def _note(report: InitReport, name: str, note: str) -> None:
    for layer in report.layers:
        if layer.name == name:
            layer.treatment += f", {note}"


def _scale_layers(model: nn.Module, names: list[str], factor: float, note: str, report: InitReport) -> None:
    for name in names:
        for weight in _weights(model.get_submodule(name)):
            weight.mul_(factor)
        _note(report, name, note)


def _scale_residual(model: nn.Module, branches: list[Branch], report: InitReport) -> None:
    open_ended = [branch for branch in branches if not branch.ends_normalised and not branch.stream_normalised]
    if open_ended:
        names = [branch.layers[-1] for branch in open_ended]
        note = f"/ sqrt({len(names)}) as the last of a residual branch"
        _scale_layers(model, names, len(names) ** -0.5, note, report)


def _fixup(model: nn.Module, branches: list[Branch], report: InitReport) -> None:
    count = len(branches)
    for branch in branches:
        depth = len(branch.layers)
        if depth > 1:
            power = -1.0 / (2 * depth - 2)
            _scale_layers(model, branch.layers[:-1], count**power, f"* {count}^({power:.3g})", report)
        _scale_layers(model, branch.layers[-1:], 0.0, "0 as the last of a residual branch", report)
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    if head and not any(head[0] in branch.layers for branch in branches):
        _scale_layers(model, head, 0.0, "0 as the classifier", report)
    if any(branch.norms for branch in branches):
        report.notes.append("Fixup is for models without norms; gradfast.nn.replace_norms(model) takes them out")


def _zero_last(model: nn.Module, branches: list[Branch], report: InitReport) -> None:
    zeroed = 0
    for branch in branches:
        if branch.ends_normalised:
            scale = getattr(model.get_submodule(branch.last), "weight", None)
            if isinstance(scale, Tensor):
                nn.init.zeros_(scale)
                zeroed += 1
                continue
        _scale_layers(model, branch.layers[-1:], 0.0, "0 as the last of a residual branch", report)
    if zeroed:
        report.notes.append(f"the scale of the last norm is 0 in {zeroed} residual branches")


def _finish(model: nn.Module, report: InitReport) -> None:
    """Read the standard deviations as they are now, with all that came after the draw."""
    for layer in report.layers:
        owner: Any = model
        for part in layer.name.split(".") if layer.name else ():
            owner = getattr(owner, part)
        if isinstance(owner, nn.MultiheadAttention):
            owner = owner.in_proj_weight if owner.in_proj_weight is not None else owner.q_proj_weight
        weight: Tensor = owner if isinstance(owner, Tensor) else owner.weight
        layer.std = weight.float().std(correction=0).item()
