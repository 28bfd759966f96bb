"""The check before the timing: it lets the right ones pass, and catches each way to be wrong."""

from __future__ import annotations

import pytest
import torch

import gradfast
from gradfast.bench.contenders import (
    OPTIMIZERS,
    PEERS,
    Contender,
    Gradfast,
    StepAlone,
    Unavailable,
    build_gradfast,
    round_settings,
)
from gradfast.bench.noise import LENGTH, Noise
from gradfast.bench.same_update import STEPS, Problem, WrongUpdate, check
from gradfast.bench.workloads import DTYPES

SHAPES = [(7,), (33, 65), (), (1,), (70_001,)]


def problem_of(optimizer: str, dtype: str = "fp32") -> Problem:
    device = torch.device("cpu")
    return Problem(SHAPES, DTYPES[dtype], device, optimizer, Noise(device))


def norms(problem: Problem) -> list[float]:
    return [problem.true_norm(step) for step in range(STEPS)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradfast_passes_with_an_exact_norm(optimizer: str, dtype: str) -> None:
    problem = problem_of(optimizer, dtype)
    contender = build_gradfast(problem.parameters(), optimizer, problem.max_norm)
    assert check(problem, contender, norms(problem)) <= 2.0**-23


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("peer", ["torch-default", "torch-fused", "torch-scaled", "torch-unclipped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_torch_passes(optimizer: str, peer: str, dtype: str) -> None:
    if optimizer not in PEERS[peer].optimizers:
        pytest.skip("torch has no Lion")
    problem = problem_of(optimizer, dtype)
    contender = PEERS[peer].build(problem.parameters(), optimizer, problem.max_norm)
    assert check(problem, contender, norms(problem)) <= 2.0**-6


class ForgetsToClip(Gradfast):
    """Steps with the whole gradient, and tells the norm that it should have clipped by."""

    def step(self) -> None:
        self.optimizer.max_norm = None
        self.optimizer.step()


class ForgetsOneElement(Gradfast):
    """The last element of the largest tensor stays, as with a tail that a kernel leaves out."""

    def step(self) -> None:
        last = self.parameters[-1].detach()[-1].clone()
        self.optimizer.step()
        with torch.no_grad():
            self.parameters[-1][-1] = last


class StepsTwice(Gradfast):
    """Two updates for one."""

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.step()


class ClipsByAnotherNorm(Gradfast):
    """Says so, too."""

    def norm(self) -> torch.Tensor:
        return self.optimizer.grad_norm * 1.05


class LeavesNan(Gradfast):
    """One NaN among seventy thousand numbers."""

    def step(self) -> None:
        self.optimizer.step()
        with torch.no_grad():
            self.parameters[-1][12_345] = float("nan")


class KeepsNoMomentum(Gradfast):
    """The parameters are right after both steps; the state is not."""

    steps = 0

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        for state in self.optimizer.state.values():
            state["momentum_buffer"].mul_(self.steps < STEPS)


class TellsNoNorm(StepAlone):
    """Claims to clip."""

    clips = True


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ForgetsToClip, "float64 gives"),
        (ForgetsOneElement, "element 70000 of tensor 4"),
        (StepsTwice, "float64 gives"),
        (ClipsByAnotherNorm, "gradient norm"),
        (LeavesNan, "element 12345 of tensor 4 is nan"),
        (KeepsNoMomentum, "momentum_buffer of tensor 0"),
        (TellsNoNorm, "no gradient norm"),
    ],
)
def test_wrong_contenders_are_refused(wrong: type[Contender], message: str, dtype: str) -> None:
    problem = problem_of("SGD", dtype)
    parameters = problem.parameters()
    optimizer = gradfast.SGD(parameters, max_norm=problem.max_norm, **OPTIMIZERS["SGD"])
    with pytest.raises(WrongUpdate, match=message):
        check(problem, wrong(parameters, optimizer, problem.max_norm), norms(problem))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_settings_rounded_to_float32_are_said_or_refused(optimizer: str) -> None:
    """As the kernels of apex, TransformerEngine and DeepSpeed take them; Adam's 1 - beta2 is off by 1.3e-5 then."""
    problem = problem_of(optimizer)
    contender = PEERS["torch-fused"].build(problem.parameters(), optimizer, problem.max_norm)
    round_settings(contender.optimizer)
    contender.exact_settings = False
    check(problem, contender, norms(problem))
    if optimizer != "SGD":
        contender = PEERS["torch-fused"].build(problem.parameters(), optimizer, problem.max_norm)
        round_settings(contender.optimizer)
        with pytest.raises(WrongUpdate, match="exp_avg_sq of tensor 0"):
            check(problem, contender, norms(problem))


def test_states_of_another_format_are_other_work() -> None:
    problem = problem_of("AdamW", "bf16")
    parameters = problem.parameters()
    settings = {**OPTIMIZERS["AdamW"], "state_dtype": torch.float32}
    optimizer = gradfast.AdamW(parameters, max_norm=problem.max_norm, **settings)
    with pytest.raises(
        Unavailable, match=r"its exp_avg is torch\.float32, which is other work than with torch\.bfloat16"
    ):
        check(problem, Gradfast(parameters, optimizer, problem.max_norm), norms(problem))


def test_noise_is_the_same_wherever_it_is_made() -> None:
    noise = Noise(torch.device("cpu"))
    whole = torch.empty(2 * LENGTH + 5)
    noise.fill(whole, (3, 1), scale=2.0)
    for first in (0, 1, LENGTH - 1, LENGTH, 2 * LENGTH):
        assert torch.equal(whole[first : first + 5], 2.0 * noise.part((3, 1), first, 5))
    assert whole.abs().min().item() >= 1.0
    assert abs(whole.mean().item()) < 0.01
    assert not torch.equal(noise.part((3, 1), 0, 100), noise.part((4, 1), 0, 100))
