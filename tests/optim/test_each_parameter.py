"""Policies that clip the gradient of each parameter by itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from clip import policy_oracles as oracles
from torch import Tensor

import gradfast
from gradfast import clip

SHAPES = [(30, 7), (70_001,), (), (3,), (5,)]
PAIRS = {
    "per parameter": (clip.PerParameterNorm(0.4), lambda: oracles.PerParameterNorm(0.4)),
    "AdaGC": (clip.AdaGC(warmup=12, beta=0.9), lambda: oracles.AdaGC(warmup=12, beta=0.9)),
}


def make(policy: clip.Policy, name: str = "SGD", dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], object]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    return parameters, getattr(gradfast, name)(parameters, lr=0.01, clip=policy)


def give_gradients(parameters: list[Tensor], step: int, scale: float = 1.0) -> np.ndarray:
    """Parameter norms around 0.5; spikes in one, zeros in another, and the last has no gradient before step 20."""
    generator = np.random.default_rng(step)
    for number, parameter in enumerate(parameters):
        gradient = torch.from_numpy(generator.normal(size=tuple(parameter.shape)))
        norm = generator.uniform(0.3, 0.7) * (100 if number == 1 and step % 17 == 16 else 1)
        norm = 0 if number == 3 and step % 5 == 0 else norm
        parameter.grad = (scale * norm * gradient / gradient.norm()).to(parameter.dtype)
    if step < 20:
        parameters[-1].grad = None
    return np.array([0.0 if p.grad is None else float(p.grad.double().norm()) / scale for p in parameters])


@pytest.mark.parametrize("policy", PAIRS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_follows_the_paper(policy: str, name: str) -> None:
    ours, optimizer = make(PAIRS[policy][0], name)
    theirs, plain = make(clip.GlobalNorm(1e9), name)
    rule = PAIRS[policy][1]()
    clipped = 0
    for step in range(60):
        factors = rule.step(give_gradients(ours, step))
        clipped += (factors < 0.99).sum()
        for mine, other, factor in zip(ours, theirs, factors, strict=True):
            other.grad = None if mine.grad is None else mine.grad * factor
        optimizer.step()
        plain.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)
    assert clipped > 20


@pytest.mark.parametrize("policy", PAIRS)
def test_norms_that_are_not_finite_leave_no_trace(policy: str) -> None:
    ours, optimizer = make(PAIRS[policy][0])
    theirs, other = make(PAIRS[policy][0])
    for step in range(40):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        other.step()
        if step % 7 == 0:
            theirs[2].grad.fill_(float("nan") if step % 2 else float("inf"))
            other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(optimizer.state_dict()["clip_state"]["values"], other.state_dict()["clip_state"]["values"])
    assert other.skipped_steps == 6


@pytest.mark.parametrize("policy", PAIRS)
def test_same_bits_on_any_number_of_threads_and_after_a_copy(policy: str) -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            parameters, optimizer = make(PAIRS[policy][0], "AdamW", torch.float32)
            for step in range(40):
                give_gradients(parameters, step)
                optimizer.step()
                if step == 18 and count == 5:
                    parameters, optimizer = copy.deepcopy((parameters, optimizer))
            results.append(parameters)
    finally:
        torch.set_num_threads(threads)
    for parameters in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0], strict=True))


def test_after_policies_for_the_whole() -> None:
    """What PerParameterNorm sees is what GlobalNorm left."""
    parameters, optimizer = make(clip.Chain(clip.GlobalNorm(0.5), clip.PerParameterNorm(0.25)))
    before = [p.clone() for p in parameters]
    norms = give_gradients(parameters, 3)
    optimizer.step()
    whole = min(1, 0.5 / (np.sqrt((norms**2).sum()) + 1e-6))
    for parameter, old, norm in zip(parameters[:-1], before, norms, strict=False):
        factor = whole * min(1, 0.25 / (norm * whole + 1e-6))
        torch.testing.assert_close(parameter, old - 0.01 * factor * parameter.grad, rtol=1e-12, atol=0)


def test_sees_unscaled_gradients() -> None:
    ours, optimizer = make(PAIRS["AdaGC"][0])
    theirs, scaled = make(PAIRS["AdaGC"][0])
    scaled.grad_scale = torch.tensor(1024.0)
    for step in range(30):
        give_gradients(ours, step)
        give_gradients(theirs, step, 1024.0)
        optimizer.step()
        scaled.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


def test_a_group_added_later_keeps_the_memory_of_the_others() -> None:
    parameters, optimizer = make(PAIRS["AdaGC"][0])
    for step in range(20):
        give_gradients(parameters, step)
        optimizer.step()
    before = optimizer.state_dict()["clip_state"]["values"].clone()
    late = torch.ones(4, dtype=torch.float64)
    optimizer.add_param_group({"params": [late]})
    give_gradients(parameters, 20)
    late.grad = None
    optimizer.step()
    after = optimizer.state_dict()["clip_state"]["values"]
    assert len(after) == len(before) + 1
    assert after[0] == before[0] + 1
    assert (after[1:4] / before[1:4] - 1).abs().max() < 0.2


def test_memory_is_loaded_for_a_group_added_before(caplog: pytest.LogCaptureFixture) -> None:
    def fresh() -> tuple[list[Tensor], gradfast.SGD]:
        parameters = [torch.ones(3), torch.ones(4)]
        optimizer = gradfast.SGD(parameters[:1], lr=0.1, clip=clip.AdaGC(warmup=1))
        optimizer.add_param_group({"params": parameters[1:]})
        return parameters, optimizer

    parameters, optimizer = fresh()
    assert len(optimizer.state_dict()["clip_state"]["values"]) == 3
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    saved = optimizer.state_dict()
    _, resumed = fresh()
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state_dict()["clip_state"]["values"], saved["clip_state"]["values"])
    assert not caplog.records
    gradfast.SGD(parameters[:1], lr=0.1, clip=clip.AdaGC(warmup=1)).load_state_dict(
        {**saved, "param_groups": saved["param_groups"][:1], "state": {}}
    )
    assert "begins anew: the checkpoint holds its state for another number of parameters than 1" in caplog.text


def test_must_stand_last() -> None:
    with pytest.raises(ValueError, match="last"):
        clip.Chain(clip.PerParameterNorm(1.0), clip.GlobalNorm(1.0))


def test_as_a_function() -> None:
    parameters, _ = make(clip.GlobalNorm(1.0))
    policy, rule = copy.deepcopy(PAIRS["AdaGC"][0]), oracles.AdaGC(warmup=12, beta=0.9)
    for step in range(40):
        factors = rule.step(give_gradients(parameters, step))
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        policy.apply_(parameters)
        for parameter, gradient, factor in zip(parameters, before, factors, strict=True):
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-10, atol=0)


def test_a_policy_that_remembers_parameters_refuses_several_devices() -> None:
    """Its memory lies on one of them: those of the other would never be remembered, and so never clipped."""
    parameters = [torch.ones(2, requires_grad=True), torch.ones(2, device="meta", requires_grad=True)]
    parameters[0].grad = torch.ones(2)
    optimizer = gradfast.SGD(parameters, lr=0.1, clip=clip.Chain(clip.GlobalNorm(1.0), clip.AdaGC()))
    with pytest.raises(NotImplementedError, match=r"AdaGC.*on cpu, meta"):
        optimizer.step()
    assert torch.equal(parameters[0], torch.ones(2))
    gradfast.SGD(parameters, lr=0.1, clip=clip.PerParameterNorm(1.0)).step()  # meta has no gradient
    assert not torch.equal(parameters[0], torch.ones(2))
