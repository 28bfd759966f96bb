"""One step of every optimiser written plainly in float64, with a bound on what rounding may do to the result.

The bound is a running error analysis, not a tolerance found by trial: beside each value stands the sum of the
magnitudes of all that was added to make it, and a result may be off by ROUNDINGS units of rounding of that sum.
Whatever cancels keeps the error of its parts, as it must in any arithmetic of that width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Half-ulps of that sum: four ulps. Two ulps are never exceeded in the cases drawn, and half an ulp often is.
ROUNDINGS = 8


@dataclass
class Value:
    """A float64 value and the most that the arithmetic may be off by, both elementwise."""

    value: Tensor
    error: Tensor


@dataclass
class Decision:
    """What clipping decides for a whole step."""

    norm: float
    scale: float
    skip: bool


def unit(dtype: torch.dtype) -> float:
    """Unit of rounding of the arithmetic: float64 for float64, else float32. Half an ulp."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def rounding(u: float, magnitude: Tensor) -> Tensor:
    """The error of a chain of operations on numbers that add up to `magnitude`; relative, and absolute near zero."""
    smallest = 2.0**-1074 if u < 2.0**-50 else 2.0**-149
    return ROUNDINGS * (u * magnitude + smallest)


def within(value: Tensor, u: float) -> Tensor:
    """What the arithmetic makes of an intermediate result: infinite beyond float32's largest number."""
    return (
        value
        if u < 2.0**-50
        else torch.where(value.abs() > torch.finfo(torch.float32).max, value.sign() * math.inf, value)
    )


def total_norm(gradients: list[Tensor], p: float) -> float:
    """By the definition: powers summed in extended precision, the sum then rounded to float64."""
    flat = np.concatenate([g.detach().double().numpy().ravel() for g in gradients] or [np.zeros(0)])
    magnitudes = np.abs(flat).astype(np.longdouble)
    if not flat.size:
        return 0.0
    if math.isinf(p):
        return float(magnitudes.max())
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.float64(np.sum(magnitudes**p))) ** (1 / p)


def decide(norm: float, max_norm: float | None, nonfinite: str) -> Decision:
    """The clip coefficient is min(1, max_norm / (norm + 1e-6)), NaN for a NaN norm."""
    finite = math.isfinite(norm)
    ratio = 1.0 if max_norm is None else max_norm / (norm + 1e-6)
    return Decision(norm, 1.0 if ratio > 1.0 else ratio, nonfinite == "skip" and not finite)


def sgd(p: Tensor, g: Tensor, state: dict, options: dict, scale: float, u: float) -> dict[str, Value]:
    """One step. `state` holds momentum_buffer as before the step, or nothing at the first one."""
    g, g_error = decayed(p, g, options, scale, u)
    results = {}
    update, update_error = g, g_error
    if options["momentum"]:
        if "momentum_buffer" in state:
            old, gain = options["momentum"] * state["momentum_buffer"], 1 - options["dampening"]
            m = within(old + gain * g, u)
            m_error = gain * g_error + rounding(u, old.abs() + abs(gain) * g.abs())
        else:
            m, m_error = g, g_error
        results["momentum_buffer"] = Value(m, m_error)
        update, update_error = m, m_error
        if options["nesterov"]:
            update = within(g + options["momentum"] * m, u)
            magnitude = g.abs() + options["momentum"] * m.abs()
            update_error = g_error + options["momentum"] * m_error + rounding(u, magnitude)
    lr = options["lr"]
    step_error = lr * update_error + rounding(u, p.abs() + lr * update.abs())
    results["parameter"] = Value(p - lr * update, step_error)
    return results


def adam(p: Tensor, g: Tensor, state: dict, options: dict, scale: float, u: float, step: int) -> dict[str, Value]:
    """One step, the `step`-th of this parameter, of Adam or (`decoupled`) AdamW."""
    decoupled = options["decoupled"]
    g, g_error = decayed(p, g, {**options, "weight_decay": 0, "l1": 0} if decoupled else options, scale, u)
    lr, (beta1, beta2) = options["lr"], options["betas"]
    kept = p
    if decoupled:
        kept = p * (1 - lr * options["weight_decay"])
        kept = kept - torch.sign(kept) * kept.abs().clamp(max=lr * options["l1"]) if options["l1"] else kept
    m = within(beta1 * state["exp_avg"] + (1 - beta1) * g, u)
    m_error = g_error + rounding(u, beta1 * state["exp_avg"].abs() + (1 - beta1) * g.abs())
    # torch and gradfast add a part of g - m, which may be infinite where neither g nor m is.
    m_error = torch.where(within(state["exp_avg"].abs() + g.abs(), u).isinf(), math.inf, m_error)
    v = within(beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g, u)
    v_error = (1 - beta2) * (2 * g.abs() + g_error) * g_error + rounding(u, v)
    results = {"exp_avg": Value(m, m_error), "exp_avg_sq": Value(v, v_error)}
    largest = v
    if options["amsgrad"]:
        largest = torch.maximum(v, state["max_exp_avg_sq"])
        results["max_exp_avg_sq"] = Value(largest, v_error)
    correction = math.sqrt(1 - beta2**step)
    denominator = largest.sqrt() / correction + options["eps"]
    root_error = torch.minimum(v_error / (2 * largest.sqrt()), v_error.sqrt()).nan_to_num(0.0)
    denominator_error = root_error / correction + rounding(u, denominator)
    size = lr / (1 - beta1**step)
    least = (denominator - denominator_error).clamp(min=0.0)
    update_error = (m_error + m.abs() * denominator_error / denominator) / least
    # m / inf is zero, whatever the errors of the parts.
    update_error = torch.where(denominator.isinf() & m_error.isfinite(), 0.0, update_error)
    change = size * m / denominator
    step_error = size * update_error + rounding(u, p.abs() + lr * options["l1"] + change.abs())
    results["parameter"] = Value(kept - change, step_error.nan_to_num(nan=math.inf))
    return results


def decayed(p: Tensor, g: Tensor, options: dict, scale: float, u: float) -> tuple[Tensor, Tensor]:
    """The gradient scaled, turned round for maximising, and with coupled decay added."""
    g, error = scaled(g, -scale if options["maximize"] else scale, u)
    magnitude = torch.zeros_like(g)
    if options["weight_decay"]:
        g = g + options["weight_decay"] * p
        magnitude = g.abs() + 2 * options["weight_decay"] * p.abs()
    if options["l1"]:
        g = g + options["l1"] * torch.sign(p)
        magnitude = magnitude + options["l1"]
    return within(g, u), error + rounding(u, magnitude)


def scaled(g: Tensor, scale: float, u: float) -> tuple[Tensor, Tensor]:
    """The gradient times the clip coefficient, which itself is a number of the arithmetic's type: maybe a denormal.

    The norm is summed in float64 whatever the type. Beside float32 its own error vanishes; in float64 it is some units
    for the thousands of squares of a case.
    """
    wide = u < 2.0**-50
    smallest = 2.0**-1074 if wide else 2.0**-149
    return g * scale, g.abs() * smallest + rounding(u, (g * scale).abs() * (4 if wide else 1))


def check(found: Tensor, expected: Value, what: str) -> None:
    """`found`, of a storage type, is the expected value within its error and half a unit of the storage type."""
    dtype, value = found.dtype, expected.value
    info = torch.finfo(dtype)
    half_ulp = info.eps / 2 if dtype != torch.float64 else 0.0
    spacing = info.smallest_normal * info.eps
    allowed = expected.error * (1 + half_ulp) + half_ulp * value.abs() + spacing
    found = found.double()
    close = (found - value).abs() <= allowed
    # Not finite is not finite: an infinity may meet another, or a zero, and be NaN, in one order of operations only.
    nan = ~found.isfinite() & ~value.isfinite()
    # Infinite in the storage type: a value beyond its largest number, or so near that rounding may take it there.
    huge = found.isinf() & (value.abs() + allowed >= info.max) & ((found > 0) == (value > 0))
    good = close | nan | huge | (found == value) | allowed.isinf()
    if not bool(good.all()):
        where = int((~good).flatten().nonzero()[0])
        numbers = [t.flatten()[where].item() for t in (found, value, allowed)]
        raise AssertionError(f"{what} at {where}: found {numbers[0]!r}, expected {numbers[1]!r} +- {numbers[2]!r}")
