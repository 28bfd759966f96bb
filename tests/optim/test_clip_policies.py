"""Clip policies inside an optimiser: what a step does with them, and how their memory is kept."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import numpy as np
import pytest
import torch
from clip import policy_oracles as oracles
from torch import Tensor

import gradfast
from gradfast import clip

POLICY = clip.Chain(clip.SkipSpikes(6.0, 16), clip.ZClip(warmup=8), clip.AutoClip(60, 30), clip.GlobalNorm(2.0))


def oracle() -> oracles.Chain:
    return oracles.Chain(
        oracles.SkipSpikes(6.0, 16, exact=False),
        oracles.ZClip(warmup=8),
        oracles.AutoClip(60, 30),
        oracles.GlobalNorm(2.0),
    )


def make(
    name: str = "SGD", dtype: torch.dtype = torch.float64, seed: int = 0, **options
) -> tuple[list[Tensor], object]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(shape, generator=generator, dtype=dtype) for shape in [(30, 7), (66_001,), (), (3,)]]
    return parameters, getattr(gradfast, name)(parameters, lr=0.01, **{"clip": POLICY, **options})


def give_gradients(parameters: list[Tensor], step: int, scale: float = 1.0) -> None:
    """Gradients whose global norm is about 1, a thousand at step 20, and NaN at step 25."""
    generator = torch.Generator().manual_seed(100 + step)
    size = scale * (1000.0 if step == 20 else 1 + 0.3 * (step * 7 % 5)) / 257
    for parameter in parameters:
        parameter.grad = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
            parameter.dtype
        )
    if step == 25:
        parameters[1].grad[66_000] = float("nan")


def norm_of(parameters: list[Tensor]) -> float:
    return float(torch.sqrt(sum(p.grad.double().square().sum() for p in parameters)))


def run(parameters: list[Tensor], optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(parameters, step)
        optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Lion"])
def test_steps_by_what_the_policy_lets_through(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The same as a plain optimiser that is given gradients scaled by the oracle, and no step where it skips."""
    ours, optimizer = make(name)
    theirs, plain = make(name, clip=None)
    rule, skips = oracle(), 0
    with caplog.at_level(logging.WARNING, logger="gradfast"):
        for step in range(40):
            give_gradients(ours, step)
            norm = norm_of(ours)
            factor, skip = rule.step(norm) if np.isfinite(norm) else (1.0, True)
            skips += skip
            optimizer.step()
            if not skip:
                for mine, other in zip(ours, theirs, strict=True):
                    other.grad = mine.grad * factor
                plain.step()
                assert optimizer.clip_coef.item() == pytest.approx(factor, rel=1e-9)
            assert optimizer.skipped_steps == skips
    assert skips == 2
    assert "limit of SkipSpikes(sigmas=6.0, window=16, exact=False)" in caplog.text
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_same_bits_on_any_number_of_threads() -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            parameters, optimizer = make("AdamW", torch.float32)
            run(parameters, optimizer, 0, 30)
            results.append((parameters, optimizer.state_dict()["clip_state"]["values"]))
    finally:
        torch.set_num_threads(threads)
    for parameters, state in results[1:]:
        assert torch.equal(state, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][0], strict=True))


def saved_and_loaded(optimizer, parameters: list[Tensor], how: str):
    """A second optimiser over copies of the parameters, that goes on where the first is."""
    if how == "deepcopy":
        return copy.deepcopy((parameters, optimizer))
    if how == "pickle":
        return pickle.loads(pickle.dumps((parameters, optimizer)))
    copies = [p.clone() for p in parameters]
    other = type(optimizer)(copies, lr=0.5, clip=POLICY)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return copies, other


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("stop", [3, 18, 21, 26])
def test_goes_on_to_the_bit(how: str, stop: int) -> None:
    parameters, optimizer = make("AdamW", torch.float32)
    run(parameters, optimizer, 0, stop)
    others, resumed = saved_and_loaded(optimizer, parameters, how)
    assert resumed.clip == POLICY
    run(parameters, optimizer, stop, 40)
    run(others, resumed, stop, 40)
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert torch.equal(optimizer.state_dict()["clip_state"]["values"], resumed.state_dict()["clip_state"]["values"])
    assert not torch.equal(parameters[0], make("AdamW", torch.float32)[0][0])


def test_a_copy_has_a_memory_of_its_own() -> None:
    parameters, optimizer = make()
    run(parameters, optimizer, 0, 10)
    before = optimizer.state_dict()["clip_state"]["values"].clone()
    others, other = copy.deepcopy((parameters, optimizer))
    run(others, other, 10, 20)
    assert torch.equal(optimizer.state_dict()["clip_state"]["values"], before)


def test_checkpoints_of_torch_and_for_torch() -> None:
    parameters, optimizer = make("AdamW")
    run(parameters, optimizer, 0, 10)
    torch.optim.AdamW([p.clone() for p in parameters]).load_state_dict(optimizer.state_dict())
    plain = torch.optim.AdamW(parameters)
    optimizer.load_state_dict(plain.state_dict())
    assert not optimizer.state_dict()["clip_state"]["values"].any(), "nothing was saved: the policy begins anew"
    assert "clip_state" not in gradfast.SGD(parameters, max_norm=1.0).state_dict()


def test_another_policys_memory_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    parameters, optimizer = make()
    run(parameters, optimizer, 0, 10)
    _, other = make(clip=clip.ZClip())
    with caplog.at_level(logging.WARNING, logger="gradfast"):
        other.load_state_dict(optimizer.state_dict())
    assert "begins anew" in caplog.text
    assert not other.state_dict()["clip_state"]["values"].any()


def test_global_norm_is_max_norm() -> None:
    one, first = make(clip=clip.GlobalNorm(0.5, float("inf")))
    two, second = make(clip=None, max_norm=0.5, norm_type=float("inf"))
    for parameters, optimizer in ((one, first), (two, second)):
        run(parameters, optimizer, 0, 5)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert first.max_norm == 0.5


def test_the_policy_sees_unscaled_gradients() -> None:
    """A loss scale of 1024, as mixed precision brings it, changes neither decision nor memory."""
    ours, optimizer = make("SGD")
    theirs, scaled = make("SGD")
    run(ours, optimizer, 0, 30)
    scaled.grad_scale = torch.tensor(1024.0)
    for step in range(30):
        give_gradients(theirs, step, 1024.0)
        scaled.step()
    torch.testing.assert_close(
        optimizer.state_dict()["clip_state"]["values"], scaled.state_dict()["clip_state"]["values"], rtol=1e-12, atol=0
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


def test_a_skip_by_policy_does_not_raise() -> None:
    parameters, optimizer = make(nonfinite="raise")
    run(parameters, optimizer, 0, 24)
    assert optimizer.skipped_steps == 1
    give_gradients(parameters, 25)
    with pytest.raises(RuntimeError, match="nan"):
        optimizer.step()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="not both"):
        make(max_norm=1.0)
    with pytest.raises(ValueError, match="norm_type"):
        make(norm_type=3.0)
    with pytest.raises(TypeError, match="clip policy"):
        make(clip=1.0)
    assert "clip=Chain(SkipSpikes(" in repr(make()[1])


# ---- as a function ----------------------------------------


def test_as_a_function_for_any_optimiser() -> None:
    parameters, _ = make()
    policy, rule = copy.deepcopy(POLICY), oracle()
    for step in range(40):
        give_gradients(parameters, step)
        before = [p.grad.clone() for p in parameters]
        norm = norm_of(parameters)
        factor, skip = rule.step(norm) if np.isfinite(norm) else (1.0, True)
        if step == 30:  # a checkpoint
            saved = policy.state_dict()
            policy = copy.deepcopy(POLICY)
            policy.load_state_dict(saved)
        result = policy.apply_(parameters)
        assert bool(result.skipped) == skip
        for parameter, gradient in zip(parameters, before, strict=True):
            expected = torch.zeros_like(gradient) if skip else gradient * factor
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=0)
        if not skip:
            assert result.norm.item() == pytest.approx(norm, rel=1e-12)
            assert result.coefficient.item() == pytest.approx(factor, rel=1e-9)


def test_a_function_needs_a_gradient() -> None:
    with pytest.raises(ValueError, match="backward"):
        clip.ZClip().apply_([torch.zeros(3)])


@pytest.mark.parametrize("policy", [clip.ZClip(warmup=2), clip.AdaGC(warmup=2), clip.Value(0.1)])
def test_an_empty_group_in_front(policy: clip.Policy) -> None:
    results = []
    for groups in ([{"params": []}], []):
        parameter = torch.ones(4, dtype=torch.float64)
        optimizer = gradfast.SGD([*groups, {"params": [parameter]}], lr=0.1, clip=policy)
        for step in range(5):
            parameter.grad = torch.full_like(parameter, 1.0 + step)
            optimizer.step()
        results.append(parameter)
    assert torch.equal(*results)
