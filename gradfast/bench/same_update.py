"""Nothing is timed before it has shown that it does the same work: two steps, compared with float64.

The limit is about half the gradients' norm, so that a contender that forgets to clip is off by a factor of two. The
float64 step goes from the stored (rounded) initial values and gradients, a slice at a time, through torch.optim's plain
loop.

A contender's norm is judged on its own, and its update by the norm that it found: torch sums the norm in the gradients'
dtype, which in float32 is off by up to a hundredth for tens of millions of elements. That is shown, not refused. So is
what comes of hyper-parameters that a contender says it rounds to float32: the float64 step takes the rounded ones.

Lion takes a sign, which a rounding may flip where its argument is about zero: such elements may be off by twice the
learning rate, and their momentum shows that they were stepped all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from gradfast.bench.contenders import Contender, Unavailable, round_settings, torch_optimizer
from gradfast.bench.noise import LENGTH, Noise
from gradfast.bench.reference_lion import ReferenceLion
from gradfast.bench.workloads import Shape

STEPS = 2
PARAMETER, GRADIENT = 0, 1  # streams of noise: the initial value, and the gradients of steps 0, 1
PARAMETER_SCALE = 0.05
STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq")

# How far a norm may be from float64's, relatively. Beyond it the contender clips by something else.
LARGEST_NORM_ERROR = 0.02


class WrongUpdate(Exception):  # noqa: N818  reads as what it says
    """A contender whose result is not the optimiser's; the message says where."""


@dataclass(frozen=True)
class Problem:
    """What is stepped in one comparison, and everything needed to make it again."""

    shapes: Sequence[Shape]
    dtype: torch.dtype
    device: torch.device
    optimizer: str
    noise: Noise

    @property
    def max_norm(self) -> float:
        return 0.5 * sqrt(sum(torch.Size(shape).numel() for shape in self.shapes))

    def parameters(self) -> list[Tensor]:
        """New parameters, each with a gradient."""
        made = []
        for index, shape in enumerate(self.shapes):
            parameter = torch.empty(shape, dtype=self.dtype, device=self.device)
            self.noise.fill(parameter, (index, PARAMETER), PARAMETER_SCALE)
            parameter.grad = torch.empty_like(parameter)
            made.append(parameter.requires_grad_())
        self.write_gradients(made, 0)
        return made

    def write_gradients(self, parameters: Sequence[Tensor], step: int) -> None:
        for index, parameter in enumerate(parameters):
            assert parameter.grad is not None
            self.noise.fill(parameter.grad, (index, GRADIENT + step))

    def true_norm(self, step: int) -> float:
        """The norm of the gradients as they are stored, in float64."""
        total = 0.0
        for index, shape in enumerate(self.shapes):
            elements = torch.Size(shape).numel()
            for first in range(0, elements, LENGTH):
                part = self.noise.part((index, GRADIENT + step), first, min(LENGTH, elements - first))
                total += part.to(self.dtype).double().square().sum().item()
        return sqrt(total)


def check(problem: Problem, contender: Contender, true_norms: Sequence[float]) -> float:
    """Do `STEPS` steps and compare parameters and states with float64, element by element.

    Args:
        true_norms: `problem.true_norm` of each step.

    Returns:
        The largest relative error of the norms that the contender clipped by; 0 for one that does not clip.

    Raises:
        WrongUpdate: it does something else.
        Unavailable: it keeps its state in another format, and so moves other bytes.
    """
    coefficients, norm_error = [], 0.0
    for step in range(STEPS):
        problem.write_gradients(contender.parameters, step)
        contender.step()
        norm = contender.norm()
        if norm is None:
            if contender.clips:
                raise WrongUpdate("it gave no gradient norm")
            coefficients.append(1.0)
            continue
        error = abs(float(norm) / true_norms[step] - 1)
        if not error <= LARGEST_NORM_ERROR:
            raise WrongUpdate(f"its gradient norm is {float(norm):.6g}, float64's is {true_norms[step]:.6g}")
        norm_error = max(norm_error, error)
        coefficients.append(min(1.0, problem.max_norm / (float(norm) + 1e-6)))
    for index in range(len(problem.shapes)):
        _check_tensor(problem, contender, index, coefficients)
    return norm_error


def _check_tensor(problem: Problem, contender: Contender, index: int, coefficients: Sequence[float]) -> None:
    unit = torch.finfo(problem.dtype).eps / 2
    parameter = contender.parameters[index].detach().view(-1)
    states = contender.optimizer.state[contender.parameters[index]]
    for first in range(0, parameter.numel(), LENGTH):
        count = min(LENGTH, parameter.numel() - first)
        initial = (problem.noise.part((index, PARAMETER), first, count) * PARAMETER_SCALE).to(problem.dtype).double()
        expected = initial.clone().requires_grad_()
        oracle = torch_optimizer([expected], problem.optimizer, fused=False)
        if not contender.exact_settings:
            round_settings(oracle)
        leeway = torch.zeros_like(initial)
        for step, coefficient in enumerate(coefficients):
            gradient = problem.noise.part((index, GRADIENT + step), first, count).to(problem.dtype).double()
            expected.grad = gradient * coefficient
            if isinstance(oracle, ReferenceLion):
                leeway += 2 * oracle.defaults["lr"] * oracle.undecided(expected, 8 * unit)
            oracle.step()
        _compare(parameter[first : first + count], expected.detach(), initial, leeway, f"tensor {index}", first)
        for key in STATES:
            state, right = states.get(key), oracle.state[expected].get(key)
            if isinstance(state, Tensor) and isinstance(right, Tensor) and state.numel() == parameter.numel():
                if state.dtype != problem.dtype:
                    raise Unavailable(f"its {key} is {state.dtype}, which is other work than with {problem.dtype}")
                zero = torch.zeros_like(right)
                _compare(state.view(-1)[first : first + count], right, zero, zero, f"{key} of tensor {index}", first)


def _compare(value: Tensor, right: Tensor, before: Tensor, leeway: Tensor, what: str, first: int) -> None:
    """Allowed are two roundings of the stored value a step, and sixteen a step of the tensor's largest change."""
    unit, smallest = torch.finfo(value.dtype).eps / 2, torch.finfo(value.dtype).smallest_normal
    change = (right - before).abs().max()
    allowed = unit * STEPS * (2 * right.abs() + 16 * change + smallest) + leeway
    excess = (value.double() - right).abs() - allowed
    worst = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
    if not excess[worst] <= 0:
        raise WrongUpdate(
            f"after {STEPS} steps element {first + worst} of {what} is {value[worst].item():.9g}, "
            f"float64 gives {right[worst].item():.9g}"
        )
