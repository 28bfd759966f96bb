"""Is the learning rate too high? Measured: the loss along the step, and its curvature there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.monitor.doctor.finding import ERROR, Finding
from gradfast.monitor.doctor.probe import compute_loss
from gradfast.nn.preserve import preserved

_BEYOND, _RAISED = 2.0, 1.5  # too high: so many times the limit, and a step that multiplies the loss by so much
_STEPS, _LOWER = 10, 0.95  # unless within so many further steps the loss falls to this part of what it was
_SIGNED = ("adam", "lion", "lamb", "adagrad", "rmsprop", "signsgd", "sophia")  # whose first step is about lr * sign(g)


@dataclass
class RateCheck:
    """What a step of a given learning rate would do.

    Attributes:
        lr: the rate that was asked about.
        update: "sgd" for lr * g, "sign" for lr * sign(g), the first step of Adam and its kin.
        clip: factor of clipping, 1 where nothing is clipped.
        loss, loss_after: before the step, and after it, on the same batch.
        curvature: u' H u / u' u along the step u.
        limit: the rate from which the step raises the loss, 2 g'u / u' H u; inf where the loss curves down.
        recovers: whether a first step that raised the loss is made good by the next ones on the same batch.
    """

    lr: float
    update: str
    clip: float
    loss: float
    loss_after: float
    curvature: float
    limit: float
    recovers: bool = False

    @property
    def suspicious(self) -> bool:
        """Whether the first step goes far beyond the limit, and does raise the loss."""
        return self.lr > _BEYOND * self.limit and not self.loss_after <= _RAISED * self.loss


def check_rate(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Tensor] | None,
    lr: float | None,
    optimizer: torch.optim.Optimizer | None,
) -> RateCheck | None:
    """Measure along the step that the optimiser would take first; None where the gradient is zero or not finite.

    Three more passes: the curvature is a difference of two gradients, (g(p) - g(p - e u)) / e, at a distance e |u| of a
    thousandth of |p|; and ten where the step raises the loss, to see whether it comes down again: networks with batch
    norms jump at the first step under rates that train them well. The model is restored to the bit. Momentum and Adam's
    history are not taken into account.
    """
    name = type(optimizer).__name__.lower() if optimizer is not None else "sgd"
    update = "sign" if any(word in name for word in _SIGNED) else "sgd"
    if lr is None and optimizer is not None:
        lr = float(optimizer.param_groups[0]["lr"])
    max_norm = getattr(optimizer, "max_norm", None)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with preserved(model, parameters=True):
        start, first = _gradient(model, batch, loss_fn, parameters)
        norm = _norm(first)
        if not (math.isfinite(start) and 0 < norm < math.inf):
            return None
        held = max_norm if max_norm is not None and update == "sgd" else math.inf
        step, clip = _step(first, update, held)
        with torch.no_grad():
            origin = [parameter.clone() for parameter in parameters]
        length = _norm(step)
        distance = 1e-3 * max(_norm(origin), 1e-3) / length
        _move(parameters, origin, step, distance)
        _, second = _gradient(model, batch, loss_fn, parameters)
        bend = sum(((a - b).double() * u.double()).sum().item() for a, b, u in zip(first, second, step)) / distance
        descent = sum((g.double() * u.double()).sum().item() for g, u in zip(first, step))
        limit = 2 * descent / bend if bend > 0 else math.inf
        rate = lr if lr is not None else limit
        after = math.nan
        if math.isfinite(rate):
            _move(parameters, origin, step, rate)
            with torch.no_grad():
                after = _again(model, lambda: compute_loss(model, batch, loss_fn)[1].item())
        check = RateCheck(rate, update, clip, start, after, bend / length**2, limit)
        for _ in range(_STEPS if check.suspicious else 0):
            loss, gradient = _gradient(model, batch, loss_fn, parameters)
            check.recovers = loss < _LOWER * start
            if check.recovers or not math.isfinite(loss):
                break
            with torch.no_grad():
                origin = [parameter.clone() for parameter in parameters]
            _move(parameters, origin, _step(gradient, update, held)[0], rate)
    return check


def _step(gradient: list[Tensor], update: str, max_norm: float) -> tuple[list[Tensor], float]:
    """The direction of a step, and the factor of clipping in it."""
    if update == "sign":
        return [g.sign() for g in gradient], 1.0
    clip = min(1.0, max_norm / (_norm(gradient) + 1e-6))
    return [g * clip for g in gradient], clip


def findings(check: RateCheck | None) -> Iterator[Finding]:
    """Too high is what is twice beyond the measured limit and does raise the loss, by half or to infinity, for good."""
    if check is None or not check.suspicious or check.recovers:
        return
    words = {"sgd": "gradient descent", "sign": "a step of sign(g), as Adam's first is"}[check.update]
    clipped = f", clipped by {check.clip:.3g}" if check.clip < 1 else ""
    mend = f"lr = {check.limit / 2:.1g}   # or warm up to {check.lr:g} over the first hundreds of steps"
    yield Finding(
        "learning-rate",
        ERROR,
        f"a learning rate of {check.lr:g} is too high here",
        f"one step takes the loss from {check.loss:.4g} to {check.loss_after:.4g}, and {_STEPS} more do not bring it "
        f"down; with curvature "
        f"{check.curvature:.3g} along the step, {words}{clipped} descends below lr {check.limit:.2g}",
        mend + ("" if check.clip < 1 or check.update == "sign" else "; or clip: max_norm=1.0"),
    )


def _again(model: nn.Module, run: Callable[[], Any]) -> Any:
    """Run with the same random numbers and the same buffers each time."""
    with preserved(model):
        return run()


def _gradient(
    model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor] | None, parameters: list[nn.Parameter]
) -> tuple[float, list[Tensor]]:
    def run() -> tuple[float, list[Tensor]]:
        with torch.enable_grad():
            loss = compute_loss(model, batch, loss_fn)[1]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.item(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]

    result: tuple[float, list[Tensor]] = _again(model, run)
    return result


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@torch.no_grad()
def _move(parameters: list[nn.Parameter], origin: list[Tensor], step: list[Tensor], distance: float) -> None:
    for parameter, start, direction in zip(parameters, origin, step):
        parameter.copy_(start - distance * direction)
