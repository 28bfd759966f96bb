"""Run a model forward and backward once, and measure what passes every layer on the way."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradfast.nn.gains import FUNCTIONS, METHODS
from gradfast.nn.layers import CONVOLUTIONS, TRANSPOSED, fans, is_layer, is_norm
from gradfast.nn.lsuv import call

_METHODS = {getattr(Tensor, method): name for method, name in METHODS.items()}
_SATURATED = 0.98  # of the range: where the slope of tanh is below 0.04, of sigmoid below 0.02


@dataclass
class Passage:
    """One call of one module, or of one activation function, in the order of the forward pass.

    Attributes:
        name: the module's name; an activation called as a function carries that of the module which calls it.
        kind: "layer", "norm", "activation" or "other" (a container, pooling, dropout, ...).
        activation: name of the activation, or "".
        in_rms, out_rms: root mean square of the values that go in and come out.
        out_max: largest magnitude that comes out.
        bad: share of what comes out that is NaN or infinite; rms and max are those of the rest.
        grad_norm: of the loss with respect to what comes out, over the whole batch; None where none arrived.
        grad_bad: share of that gradient that is NaN or infinite.
        grad_in_norm: of the loss with respect to what goes in, for a layer; None where none arrived.
        weight_gain: rms(W) * sqrt(fan in), by which a layer multiplies the rms of independent inputs; else None.
        dead: for relu, share of the units that are 0 for the whole batch; None where there are too few values to tell.
        saturated: for sigmoid and tanh, share of the values in the flat ends.
        wide_range: whether what comes out is bfloat16 already, which ends where float32 does.
    """

    name: str
    kind: str
    activation: str = ""
    in_rms: float = math.nan
    out_rms: float = math.nan
    out_max: float = math.nan
    bad: float = 0.0
    grad_norm: float | None = None
    grad_bad: float = 0.0
    grad_in_norm: float | None = None
    weight_gain: float | None = None
    dead: float | None = None
    saturated: float | None = None
    wide_range: bool = False

    @property
    def backward_gain(self) -> float | None:
        """By what factor the gradient's norm grows on its way back through a layer."""
        return self.grad_in_norm / self.grad_norm if self.grad_in_norm is not None and self.grad_norm else None


@dataclass
class Measurement:
    """All that one forward and backward pass showed.

    Attributes:
        passages: in the order of the forward pass.
        backward: the same passages, in the order in which their gradients came.
        loss: as the loss function returned it.
        grad_norm: over all parameters; NaN where a gradient is.
        without_gradient: names of trainable parameters that no gradient reached.
        output_gradient: sum over the samples of the norm of d loss / d output; NaN where that is no single tensor.
        output: what the model returned.
    """

    passages: list[Passage] = field(default_factory=list)
    backward: list[Passage] = field(default_factory=list)
    loss: float = math.nan
    grad_norm: float = math.nan
    without_gradient: list[str] = field(default_factory=list)
    output_gradient: float = math.nan
    output: Any = None

    def of_kind(self, kind: str) -> list[Passage]:
        return [passage for passage in self.passages if passage.kind == kind]


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in a module's input or output, however it is wrapped."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((tensor for item in value if (tensor := first_tensor(item)) is not None), None)
    return None


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(what the model takes, what the loss function takes beside its output)."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, batch


def compute_loss(model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor] | None) -> tuple[Any, Tensor]:
    """(output, loss) of a model that is given a batch; without a loss function the output's own `loss` is taken."""
    inputs, targets = split_batch(batch)
    output = call(model, inputs)
    if loss_fn is not None:
        return output, _call_loss(loss_fn, output, targets)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(output, Mapping) and loss is None:  # torchvision's detectors return their losses by name
        loss = sum(value for value in output.values() if isinstance(value, Tensor) and value.ndim == 0)
    if not isinstance(loss, Tensor):
        raise ValueError("without loss_fn the model has to return its loss, as output.loss or output['loss']")
    return output, loss


def _call_loss(loss_fn: Callable[..., Tensor], output: Any, targets: Any) -> Tensor:
    """loss_fn(output, targets), or loss_fn(output) where it takes no more."""
    given = (output, targets) if takes(loss_fn, 2) else (output,)
    if not takes(loss_fn, len(given)):
        name, signature = getattr(loss_fn, "__name__", loss_fn), inspect.signature(loss_fn)
        raise ValueError(f"loss_fn has to take (output, targets), or the output alone; {name!r} takes {signature}")
    loss = loss_fn(*given)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"loss_fn has to return one number, a tensor of one element; it returned {found}")
    return loss


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many positional arguments; True where nobody can tell."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # of some functions written in C no signature is known
        return True
    return True


def measure(model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor] | None) -> Measurement:
    """Run forward and backward once. Changes buffers and gradients: use it inside `gradfast.nn.preserved`."""
    found = Measurement()
    with watching(model, found):
        found.output, loss = compute_loss(model, batch, loss_fn)
        tensor = found.output if isinstance(found.output, Tensor) else None
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda gradient: _keep_output_gradient(found, gradient))
        found.loss = loss.item()
        if loss.requires_grad:
            loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found.without_gradient = [name for name, gradient in gradients.items() if gradient is None]
    norms = [gradient.double().norm() for gradient in gradients.values() if gradient is not None]
    found.grad_norm = torch.stack(norms).norm().item() if norms else 0.0
    return found


def _keep_output_gradient(found: Measurement, gradient: Tensor) -> None:
    found.output_gradient = gradient.double().flatten(1).norm(dim=1).sum().item() if gradient.ndim else math.nan


# -------------------------------------------------------------------- watching


@contextlib.contextmanager
def watching(model: nn.Module, found: Measurement) -> Iterator[None]:
    """Hooks on every module, and a mode that sees activations called as functions."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_enter(stack, name)))
        handles.append(module.register_forward_hook(_leave(stack, name, found), always_call=False))
    try:
        with _Activations(stack, found):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(stack: list[str], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any) -> None:
        stack.append(name)

    return hook


def _leave(stack: list[str], name: str, found: Measurement) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        stack.pop()
        result = first_tensor(output)
        if result is None or (result is first_tensor(arguments)):  # nothing was computed, or in place
            return
        kind = "layer" if is_layer(module) else "norm" if is_norm(module) else "other"
        given = first_tensor(arguments)
        passage = Passage(name, kind, in_rms=_rms(given))
        if kind == "layer" and given is not None and given.requires_grad and not given.is_leaf:

            def keep(gradient: Tensor) -> None:
                passage.grad_in_norm = gradient.double().norm().item()

            given.register_hook(keep)
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            passage.weight_gain = _rms(module.weight) * math.sqrt(fans(module)[0])
        _keep(found, passage, result)

    return hook


class _Activations(TorchFunctionMode):
    def __init__(self, stack: list[str], found: Measurement) -> None:
        super().__init__()
        self.stack, self.found = stack, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = FUNCTIONS.get(func) or _METHODS.get(func)
        if name is None or not args or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        in_rms = _rms(args[0])
        result: Tensor = func(*args, **(kwargs or {}))
        passage = Passage(self.stack[-1] if self.stack else "", "activation", name, in_rms=in_rms)
        with torch.no_grad():
            if name == "relu":
                passage.dead = _dead_units(result.detach())
            elif name in ("sigmoid", "tanh"):
                passage.saturated = _saturated(name, result.detach())
        _keep(self.found, passage, result)
        return result


def _keep(found: Measurement, passage: Passage, output: Tensor) -> None:
    with torch.no_grad():
        values = output.detach()
        passage.wide_range = values.dtype == torch.bfloat16
        finite = torch.isfinite(values)
        passage.bad = 1.0 - finite.double().mean().item() if values.numel() else 0.0
        sound = values[finite].double() if passage.bad else values.double()
        if sound.numel():
            passage.out_rms = sound.square().mean().sqrt().item()
            passage.out_max = sound.abs().max().item()
    found.passages.append(passage)
    if output.requires_grad:

        def hook(gradient: Tensor) -> None:
            passage.grad_bad = 1.0 - torch.isfinite(gradient).double().mean().item()
            passage.grad_norm = gradient.double().norm().item()
            found.backward.append(passage)

        output.register_hook(hook)


def _rms(tensor: Tensor | None) -> float:
    if tensor is None or not tensor.numel():
        return math.nan
    return tensor.detach().double().square().mean().sqrt().item()


def _dead_units(output: Tensor) -> float | None:
    """Share of the units (channels) that are 0 everywhere; None with fewer than 16 values a unit."""
    if output.ndim < 2:
        return None
    axis = output.ndim - 1 if output.ndim <= 3 else 1
    by_unit = output.movedim(axis, 0).flatten(1)
    if by_unit.shape[1] < 16:
        return None
    return (by_unit == 0).all(1).double().mean().item()


def _saturated(name: str, output: Tensor) -> float:
    distance = output.abs() if name == "tanh" else (2 * output - 1).abs()
    return (distance > _SATURATED).double().mean().item()
